"""Exact match of greedy answers to held-out prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin

from dtune.data.prompts import Prompt
from dtune.evaluate.mode import evaluating
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
) -> ExactMatch:
    """Generate greedily from every prompt and compare.

    ``model`` is the module that has ``generate``, with the engine's hooks on it. Collective:
    every rank makes the same number of calls, and within a call of forward passes.
    """
    assert prompts, "nothing to generate from: see read_prompts"
    assert isinstance(model, GenerationMixin), type(model)
    stops = _stop_tokens(model, tokenizer)
    generation = GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=sorted(stops) or None,
        pad_token_id=_pad_token(tokenizer, stops),
    )
    answers: list[Answer] = []
    with evaluating(model), _without_defaults(model):
        for share in plan_shares(prompts, config.batch_size, world.rank, world.size):
            # A rank without a prompt of its own generates all the same, for the collectives.
            said = _generate(model, share or prompts[:1], generation, world)
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


@contextmanager
def _without_defaults(model: GenerationMixin) -> Iterator[None]:
    """Hide the model's own generation config: ``generate`` takes from it whatever is not given."""
    generator: Any = model
    own = generator.generation_config
    generator.generation_config = GenerationConfig()
    try:
        yield
    finally:
        generator.generation_config = own


def _stop_tokens(model: GenerationMixin, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """End tokens of the model, of which there may be several, and of the tokenizer."""
    defaults: Any = model.generation_config
    found = defaults.eos_token_id if defaults is not None else None
    stops = set(found) if isinstance(found, list) else {found}
    return {token for token in (*stops, tokenizer.eos_token_id) if token is not None}


def _pad_token(tokenizer: PreTrainedTokenizerBase, stops: set[int]) -> int:
    """Any token will do where there is none for padding: it is masked out."""
    pad: int | None = tokenizer.pad_token_id
    return pad if pad is not None else min(stops, default=0)


def _generate(
    model: GenerationMixin, prompts: Sequence[Prompt], config: GenerationConfig, world: World
) -> list[list[int]]:
    """Tokens that follow each prompt, as long as the longest answer."""
    width = max(len(prompt.input_ids) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), int(config.pad_token_id))
    mask = torch.zeros_like(input_ids)
    for b, prompt in enumerate(prompts):
        # On the left: what is generated follows the last column.
        input_ids[b, width - len(prompt.input_ids) :] = torch.tensor(prompt.input_ids)
        mask[b, width - len(prompt.input_ids) :] = 1
    # Its type of self is one that no class can be told to have.
    generator: Any = model
    output: torch.Tensor = generator.generate(
        input_ids=input_ids.to(world.device),
        attention_mask=mask.to(world.device),
        generation_config=config,
        # A sharded model needs all ranks in every forward, until the last is done.
        synced_gpus=world.size > 1,
    )
    new: list[list[int]] = output[:, width:].tolist()
    return new


def _judge(
    prompt: Prompt, tokens: list[int], stops: set[int], tokenizer: PreTrainedTokenizerBase
) -> Answer:
    length = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
    answer = str(tokenizer.decode(tokens[:length])).strip()
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
