"""Generating from token ids in batches: greedily, or sampled from a stream of numbers a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from dtune.evaluate.schema import SamplingConfig
from dtune.runtime.watch.heartbeat import beat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer


class Question(Protocol):
    """What is generated from."""

    @property
    def number(self) -> int:
        """Its number among all that are asked, which chooses its random numbers."""
        ...

    @property
    def input_ids(self) -> list[int]:
        """The whole prompt; at least one token."""
        ...


def stop_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """End tokens of the model, of which there may be several, and of the tokenizer."""
    owner: Any = model
    defaults = owner.generation_config
    found = defaults.eos_token_id if defaults is not None else None
    stops = set(found) if isinstance(found, list) else {found}
    return {token for token in (*stops, tokenizer.eos_token_id) if token is not None}


def plan_generation(
    stops: set[int], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> GenerationConfig:
    """One sequence a prompt, each next token the one of the highest score, until a stop."""
    pad: int | None = tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=sorted(stops) or None,
        # Any token will do where there is none for padding: it is masked out.
        pad_token_id=pad if pad is not None else min(stops, default=0),
    )


@contextmanager
def without_defaults(model: nn.Module) -> Iterator[None]:
    """Hide the model's own generation config: ``generate`` takes from it whatever is not given."""
    generator: Any = model
    own = generator.generation_config
    generator.generation_config = GenerationConfig()
    try:
        yield
    finally:
        generator.generation_config = own


def generate_batch(
    model: nn.Module,
    questions: Sequence[Question],
    config: GenerationConfig,
    device: torch.device,
    *,
    synced: bool = False,
    processors: Sequence[LogitsProcessor] = (),
    streamer: BaseStreamer | None = None,
    criteria: Any = None,
) -> list[list[int]]:
    """Tokens that follow each prompt, as long as the longest answer.

    ``synced``: other ranks generate as well and share every forward pass.
    """
    beat()
    width = max(len(question.input_ids) for question in questions)
    input_ids = torch.full((len(questions), width), int(config.pad_token_id))
    mask = torch.zeros_like(input_ids)
    for b, question in enumerate(questions):
        # On the left: what is generated follows the last column.
        input_ids[b, width - len(question.input_ids) :] = torch.tensor(question.input_ids)
        mask[b, width - len(question.input_ids) :] = 1
    # The type of self of GenerationMixin.generate is one that no class can be told to have.
    generator: Any = model
    output: torch.Tensor = generator.generate(
        input_ids=input_ids.to(device),
        attention_mask=mask.to(device),
        generation_config=config,
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=criteria,
        streamer=streamer,
        synced_gpus=synced,
    )
    new: list[list[int]] = output[:, width:].tolist()
    return new


def until_stop(tokens: Sequence[int], stops: set[int]) -> tuple[list[int], bool]:
    """What was said before the first stop token, and whether there was one."""
    length = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
    return list(tokens[:length]), length < len(tokens)


class RowSampling(LogitsProcessor):
    """Draws each row's next token from random numbers of its own, by the Gumbel-max trick.

    The largest of logits plus Gumbel noise is a draw from their softmax, so that greedy decoding
    after this samples. What is drawn for a prompt depends on the seed and its number alone, not
    on the others in its batch.
    """

    def __init__(
        self, sampling: SamplingConfig, numbers: Sequence[int], device: torch.device
    ) -> None:
        self._warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(sampling.temperature)]
        if sampling.top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        self._generators = [
            torch.Generator(device).manual_seed(hash((sampling.seed, number)) & (2**63 - 1))
            for number in numbers
        ]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        """[B, V] logits -> [B, V] in fp32, whose largest element is the draw."""
        found: Any = scores.float()
        for warper in self._warpers:
            found = warper(input_ids, found)
        for b, generator in enumerate(self._generators):
            found[b] -= torch.empty_like(found[b]).exponential_(generator=generator).log()
        return found


def sampling_processors(
    sampling: SamplingConfig, questions: Sequence[Question], device: torch.device
) -> list[LogitsProcessor]:
    """What makes greedy decoding sample as the config says; nothing for temperature 0."""
    if sampling.temperature == 0:
        return []
    return [RowSampling(sampling, [question.number for question in questions], device)]
