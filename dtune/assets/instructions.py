"""Instruction rows about the small world, in Alpaca form with the name of their task.

An entity, word or pair of numbers is either in the training rows or held out, never both, so
the exact output of a held-out row is in no training row. The corpus tells the answers of both.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from dtune.assets.facts import (
    Fact,
    number_fact,
    number_pairs,
    person_facts,
    place_facts,
    thing_facts,
    word_facts,
)
from dtune.assets.world import build_world

INSTRUCTION_SEED = 23

_HELDOUT_SHARE = 5  # one entity or word in five
_HELDOUT_PAIRS = 20  # of numbers, for each of the three tasks
_TRAIN_PAIRS = 150

# `{x}` in the instruction: no input. Otherwise the subject is the row's input.
_PHRASINGS: dict[str, tuple[str, ...]] = {
    "person_home": (
        "Where does {x} live?",
        "Tell me which town {x} lives in.",
        "Name the town in which this person lives.",
        "Which town does the following person live in?",
        "Say where {x} lives.",
    ),
    "person_job": (
        "What is the job of {x}?",
        "Tell me what {x} does for a living.",
        "Name the job of this person.",
        "Which job does the following person have?",
        "Say what {x} does all day.",
    ),
    "person_pet": (
        "Which animal does {x} have?",
        "Tell me which animal lives with {x}.",
        "Name the animal that this person has.",
        "Which animal does the following person own?",
        "Say which animal {x} has.",
    ),
    "place_goods": (
        "What is {x} known for?",
        "Tell me what {x} is famous for.",
        "Name the goods this town is known for.",
        "What is the following town famous for?",
        "Say what {x} is known for.",
    ),
    "thing_material": (
        "What is the {x} made of?",
        "Tell me the material of the {x}.",
        "Name the material of this object.",
        "Which material is the following object made of?",
        "Say what the {x} is made of.",
    ),
    "thing_room": (
        "Where can I find the {x}?",
        "Tell me where to look for the {x}.",
        "Name the room of this object.",
        "In which room is the following object?",
        "Say where the {x} is kept.",
    ),
    "word_reverse": (
        "Write the word {x} in reverse.",
        "Reverse the word.",
        "Give the letters of this word from last to first.",
    ),
    "word_sort": (
        "Sort the letters of the word {x}.",
        "Sort the letters.",
        "Give the letters of this word in alphabetical order.",
    ),
    "word_upper": (
        "Write the word {x} in upper case.",
        "Make it upper case.",
        "Give this word in upper case letters.",
    ),
    "word_count": (
        "How many characters are in the word {x}?",
        "Count the characters.",
        "Give the number of characters of this word.",
    ),
    "word_last": (
        "What is the last letter of the word {x}?",
        "Find the last letter.",
        "Give the final letter of this word.",
    ),
    "add": (
        "Add {a} and {b}.",
        "What is {a} + {b}?",
        "Give the sum of {a} and {b}.",
    ),
    "subtract": (
        "Subtract {b} from {a}.",
        "What is {a} - {b}?",
        "Take {b} away from {a}.",
    ),
    "compare": (
        "Which is larger, {a} or {b}?",
        "Compare {a} and {b}.",
        "Tell me the larger one of {a} and {b}.",
    ),
}


@dataclass(frozen=True)
class Row:
    """One instruction with its answer; `task` names the family for scores by family."""

    instruction: str
    input: str
    output: str
    task: str

    def as_dict(self) -> dict[str, str]:
        """Return the row as it stands in the JSONL."""
        return asdict(self)


@dataclass(frozen=True)
class Split:
    """Training rows and held-out rows."""

    train: list[Row]
    heldout: list[Row]


@dataclass(frozen=True)
class _Item:
    """One subject of one task: what fills the phrasing, and the answer."""

    task: str
    subject: str
    output: str

    def row(self, phrasing: str) -> Row:
        inline = "{x}" in phrasing
        text = phrasing.format(x=self.subject) if inline else phrasing
        return Row(text, "" if inline else self.subject, self.output, self.task)


def _items(kind: str, subject: str, facts: Mapping[str, Fact]) -> list[_Item]:
    tasks = {f"{kind}_{name}": fact for name, fact in facts.items()}
    return [_Item(t, subject, fact.answer) for t, fact in tasks.items() if t in _PHRASINGS]


def _subjects() -> dict[str, list[list[_Item]]]:
    """Return the items of each entity and word, by kind."""
    world = build_world()
    return {
        "person": [_items("person", one.name, person_facts(one)) for one in world.people],
        "place": [_items("place", one.name, place_facts(one)) for one in world.places],
        "thing": [_items("thing", one.name, thing_facts(one)) for one in world.things],
        "word": [_items("word", word, word_facts(word)) for word in world.words],
    }


def _number_rows(task: str, rng: random.Random) -> list[Row]:
    """Return one row for each pair of numbers, shuffled."""
    rows = []
    for a, b in number_pairs(task):
        text = rng.choice(_PHRASINGS[task]).format(a=a, b=b)
        rows.append(Row(text, "", number_fact(task, a, b).answer, task))
    rng.shuffle(rows)
    return rows


def _split_numbers(task: str, rng: random.Random) -> Split:
    rows = _number_rows(task, rng)
    return Split(rows[_HELDOUT_PAIRS:][:_TRAIN_PAIRS], rows[:_HELDOUT_PAIRS])


def _split_subjects(rng: random.Random) -> Split:
    split = Split([], [])
    for subjects in _subjects().values():
        rng.shuffle(subjects)
        cut = len(subjects) // _HELDOUT_SHARE
        for item in (item for items in subjects[cut:] for item in items):
            split.train.extend(item.row(phrasing) for phrasing in _PHRASINGS[item.task])
        for item in (item for items in subjects[:cut] for item in items):
            phrasings = _PHRASINGS[item.task]
            number = 2 if len(phrasings) > 3 else 1
            split.heldout.extend(item.row(text) for text in rng.sample(phrasings, number))
    return split


def _without_leaks(train: Sequence[Row], heldout: Sequence[Row]) -> list[Row]:
    """Drop the training rows whose output contains a held-out output ("4 + 1 = 5" in 15)."""
    outputs = {row.output for row in heldout}
    return [row for row in train if not any(output in row.output for output in outputs)]


def generate_instructions(seed: int = INSTRUCTION_SEED) -> Split:
    """Return the split, shuffled; the same for the same seed."""
    rng = random.Random(seed)
    split = _split_subjects(rng)
    for task in ("add", "subtract", "compare"):
        numbers = _split_numbers(task, rng)
        split.train.extend(numbers.train)
        split.heldout.extend(numbers.heldout)
    train = _without_leaks(split.train, split.heldout)
    rng.shuffle(train)
    rng.shuffle(split.heldout)
    return Split(train, split.heldout)
