"""Answers to prompts, by a trained model or by one base with several adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from dtune.evaluate.adapters import NamedAdapters
from dtune.evaluate.generation import (
    generate_batch,
    plan_generation,
    sampling_processors,
    stop_tokens,
    until_stop,
    without_defaults,
)
from dtune.evaluate.mode import evaluating
from dtune.evaluate.questions import AskedRow
from dtune.evaluate.schema import SamplingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Write = Callable[[str], None]


@dataclass(frozen=True)
class Said:
    """An answer."""

    question: AskedRow
    answer: str
    tokens: int
    finished: bool
    """Whether it ended by itself, and not at max_new_tokens."""
    adapter: str


@dataclass
class Speaker:
    """A model that answers, on one device."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    compute: Callable[[], AbstractContextManager[None]]
    """Around a forward pass: it computes in the precision's dtype."""
    adapters: NamedAdapters | None = None
    """Where there are several; ``model`` is then the base with the one that is used."""

    def use(self, adapter: str) -> None:
        """Answer with another of the adapters from now on."""
        assert self.adapters is not None, adapter
        self.model = self.adapters.use(adapter)

    @property
    def adapter(self) -> str:
        """Name of the adapter that answers; empty where there is no choice."""
        return "" if self.adapters is None else self.adapters.active

    def answer(
        self, questions: Sequence[AskedRow], sampling: SamplingConfig, *, batch_size: int
    ) -> list[Said]:
        """Answer all, in their order; prompts of like length are generated from together."""
        said: list[Said] = []
        for adapter in dict.fromkeys(question.adapter for question in questions):
            if adapter:
                self.use(adapter)
            group = [question for question in questions if question.adapter == adapter]
            group.sort(key=lambda question: -len(question.input_ids))
            for start in range(0, len(group), batch_size):
                said += self._answer_batch(group[start : start + batch_size], sampling)
        return sorted(said, key=lambda one: one.question.number)

    def _answer_batch(self, batch: Sequence[AskedRow], sampling: SamplingConfig) -> list[Said]:
        stops = stop_tokens(self.model, self.tokenizer)
        generation = plan_generation(stops, self.tokenizer, sampling.max_new_tokens)
        processors = sampling_processors(sampling, batch, self.device)
        with self.compute(), evaluating(self.model), without_defaults(self.model):
            rows = generate_batch(self.model, batch, generation, self.device, processors=processors)
        found = []
        for question, row in zip(batch, rows, strict=True):
            tokens, finished = until_stop(row, stops)
            text = str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
            found.append(Said(question, text, len(tokens), finished, self.adapter))
        return found

    def stream(
        self,
        question: AskedRow,
        sampling: SamplingConfig,
        *,
        write: Write,
        stopped: Callable[[], bool],
    ) -> str:
        """Answer one prompt, writing the text as it comes, until it ends or is ``stopped``."""
        stops = stop_tokens(self.model, self.tokenizer)
        streamer = _Stream(self.tokenizer, write)
        with self.compute(), evaluating(self.model), without_defaults(self.model):
            generate_batch(
                self.model,
                [question],
                plan_generation(stops, self.tokenizer, sampling.max_new_tokens),
                self.device,
                processors=sampling_processors(sampling, [question], self.device),
                streamer=streamer,
                criteria=StoppingCriteriaList([_Asked(stopped)]),
            )
        return "".join(streamer.parts).strip()


class _Stream(TextStreamer):
    """Text as it becomes certain, word by word."""

    def __init__(self, tokenizer: Any, write: Write) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write
        self.parts: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.parts.append(text)
        self._write(text)


class _Asked(StoppingCriteria):
    """Ends generation after the token during which it was asked to."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> Any:
        return torch.full((input_ids.shape[0],), self._stopped(), device=input_ids.device)
