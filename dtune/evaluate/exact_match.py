"""Exact match of greedy answers to held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from transformers import GenerationMixin

from dtune.data.prompts import Prompt
from dtune.evaluate.generation import (
    generate_batch,
    plan_generation,
    stop_tokens,
    until_stop,
    without_defaults,
)
from dtune.evaluate.mode import AsksToStop, EvaluationStopped, evaluating, never
from dtune.evaluate.schema import EvaluateConfig
from dtune.runtime.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """What the model said to one prompt."""

    prompt: Prompt
    answer: str
    ok: bool


@dataclass(frozen=True)
class ExactMatch:
    """Share of prompts answered exactly as expected, apart from blanks around the answer."""

    score: float
    answers: tuple[Answer, ...]
    """All of them, in the order of the prompts, on every rank."""
    by_task: dict[str, float]
    """Score of each task, where rows name tasks."""


def evaluate_exact_match(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: EvaluateConfig,
    world: World,
    *,
    asks_to_stop: AsksToStop = never,
) -> ExactMatch:
    """Generate greedily from every prompt and compare.

    ``model`` is the module that has ``generate``, with the engine's hooks on it. Collective:
    every rank makes the same number of calls, and within a call of forward passes. Raises
    EvaluationStopped where it is asked to stop before a batch.
    """
    assert prompts, "nothing to generate from: see read_prompts"
    assert isinstance(model, GenerationMixin), type(model)
    stops = stop_tokens(model, tokenizer)
    generation = plan_generation(stops, tokenizer, config.max_new_tokens)
    answers: list[Answer] = []
    with evaluating(model), without_defaults(model):
        for share in plan_shares(prompts, config.batch_size, world.rank, world.size):
            if asks_to_stop():
                raise EvaluationStopped
            # A rank without a prompt of its own generates all the same, for the collectives.
            asked = share or prompts[:1]
            # A sharded model needs all ranks in every forward, until the last is done.
            said = generate_batch(model, asked, generation, world.device, synced=world.size > 1)
            for prompt, tokens in zip(share, said, strict=False):
                answers.append(_judge(prompt, tokens, stops, tokenizer))
    gathered = [answer for part in world.gather(answers) for answer in part]
    gathered.sort(key=lambda answer: answer.prompt.number)
    return _summarise(gathered)


def plan_shares(
    prompts: Sequence[Prompt], batch_size: int, rank: int, world_size: int
) -> list[list[Prompt]]:
    """Prompts of one rank, batch by batch: as many batches on each rank, each prompt on one.

    Prompts of like length go together, on all ranks, so that little is padded.
    """
    ordered = sorted(prompts, key=lambda prompt: (-len(prompt.input_ids), prompt.number))
    together = batch_size * world_size
    return [
        ordered[start : start + together][rank::world_size]
        for start in range(0, len(ordered), together)
    ]


def _judge(
    prompt: Prompt, tokens: list[int], stops: set[int], tokenizer: PreTrainedTokenizerBase
) -> Answer:
    said, _ = until_stop(tokens, stops)
    answer = str(tokenizer.decode(said)).strip()
    return Answer(prompt=prompt, answer=answer, ok=answer == prompt.expected.strip())


def _summarise(answers: list[Answer]) -> ExactMatch:
    tasks: dict[str, list[bool]] = {}
    for answer in answers:
        if answer.prompt.task:
            tasks.setdefault(answer.prompt.task, []).append(answer.ok)
    return ExactMatch(
        score=sum(answer.ok for answer in answers) / len(answers),
        answers=tuple(answers),
        by_task={task: sum(oks) / len(oks) for task, oks in sorted(tasks.items())},
    )
