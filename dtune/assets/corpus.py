"""The pre-training corpus: profiles, questions, stories and drills about the small world.

It never uses the chat template nor the phrasing of the instruction rows.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from dtune.assets.facts import (
    NUMBER_TASKS,
    Fact,
    entity_facts,
    number_fact,
    number_pairs,
    word_facts,
)
from dtune.assets.stories import write_story
from dtune.assets.world import build_world

T = TypeVar("T")

CORPUS_SEED = 11
CORPUS_DOCUMENTS = 48_000

# A question that stands alone, which is how the model learns to stop after an answer.
_SINGLE_FRAMES = ("{question}\n{answer}", "Q: {question}\nA: {answer}")

_HEADINGS = ("Questions.", "Many questions.", "A list of questions.", "Let us talk.")

# Many frames, so that asking and answering is learnt apart from any one layout.
_FRAMES = (
    "{question}\n{answer}",
    "{question} {answer}",
    "{question}\n\n{answer}",
    "Q: {question}\nA: {answer}",
    "Question: {question}\nAnswer: {answer}",
    "- {question}\n- {answer}",
    "Somebody asks: {question}\n{answer}",
    '"{question}"\n"{answer}"',
)


def write_profile(facts: Sequence[Fact], rng: random.Random) -> str:
    """Write every fact of one subject in two or three wordings, shuffled."""
    wordings = 2 if len(facts) > 1 else 3
    sentences = [
        sentence
        for fact in facts
        for sentence in rng.sample(fact.sentences, min(wordings, len(fact.sentences)))
    ]
    rng.shuffle(sentences)
    return rng.choice([" ", "\n"]).join(sentences)


def write_sentences(facts: Sequence[Fact], rng: random.Random) -> str:
    """Write one sentence about each fact."""
    return rng.choice([" ", "\n"]).join(rng.choice(fact.sentences) for fact in facts)


def write_questions(facts: Sequence[Fact], rng: random.Random) -> str:
    """Write one question with its answer about each fact, each in its own frame."""
    lines = [
        rng.choice(_FRAMES).format(question=rng.choice(fact.questions), answer=fact.answer)
        for fact in facts
    ]
    return "\n".join([rng.choice(_HEADINGS), *lines])


def write_single_question(fact: Fact, rng: random.Random) -> str:
    """Write one question with its answer and nothing else."""
    return rng.choice(_SINGLE_FRAMES).format(
        question=rng.choice(fact.questions), answer=fact.answer
    )


class _Endless(Iterator[T]):
    """Gives every item once per round, each round in a new order, so that none is rare."""

    def __init__(self, items: Sequence[T], rng: random.Random) -> None:
        self._items, self._rng = items, rng
        self._left: list[T] = []

    def __next__(self) -> T:
        if not self._left:
            self._left = self._rng.sample(self._items, len(self._items))
        return self._left.pop()

    def take(self, number: int) -> list[T]:
        return [next(self) for _ in range(number)]


def _writers(rng: random.Random) -> dict[Callable[[], str], int]:
    """Return what writes each kind of document, with the kind's share."""
    world = build_world()
    entities = _Endless(entity_facts(world), rng)
    words = _Endless([tuple(word_facts(word).values()) for word in world.words], rng)
    entity_pool = _Endless([fact for facts in entity_facts(world) for fact in facts], rng)
    word_pool = _Endless([f for word in world.words for f in word_facts(word).values()], rng)
    number_pool = _Endless(
        [number_fact(task, a, b) for task in NUMBER_TASKS for a, b in number_pairs(task)], rng
    )

    def mixed(least: int, most: int) -> list[Fact]:
        pools = rng.choices([entity_pool, word_pool, number_pool], [3, 4, 2], k=1)
        if rng.random() < 0.5:
            pools = [entity_pool, word_pool, number_pool]
        return [next(rng.choice(pools)) for _ in range(rng.randint(least, most))]

    return {
        lambda: write_profile(next(entities), rng): 18,
        lambda: write_profile(next(words), rng): 12,
        lambda: write_sentences(mixed(6, 10), rng): 15,
        lambda: write_questions(mixed(3, 6), rng): 40,
        lambda: write_single_question(mixed(1, 1)[0], rng): 30,
        lambda: write_story(world, rng): 8,
        lambda: write_sentences(number_pool.take(12), rng): 7,
    }


def generate_corpus(seed: int = CORPUS_SEED, documents: int = CORPUS_DOCUMENTS) -> Iterator[str]:
    """Yield `documents` texts of about 20 to 200 tokens; the same for the same arguments."""
    rng = random.Random(seed)
    writers = _writers(rng)
    kinds, shares = list(writers), list(writers.values())
    for _ in range(documents):
        yield rng.choices(kinds, shares)[0]()
