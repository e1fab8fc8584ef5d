"""Supervised fine-tuning: a conversation through the chat template, loss on the assistant."""

from __future__ import annotations

import re
from bisect import bisect_left
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from torch import nn
from transformers.utils.chat_template_utils import render_jinja_template

from dtune.errors import ConfigError, DataError
from dtune.objectives.causal import causal_loss
from dtune.types import IGNORE_INDEX, Batch, Example, LossParts, Message, Row

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from dtune.objectives.schema.sft import SftConfig

ASSISTANT = "assistant"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_REMEDY = (
    "wrap what the assistant says in {% generation %}...{% endgeneration %}, "
    "put it in a file and set model.chat_template=FILE.jinja"
)

Span = tuple[int, int]
"""Characters [start, end)."""


class Sft:
    """Trains on what the template puts between its generation markers."""

    def __init__(self, config: SftConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check that the tokenizer can say which tokens are the assistant's.

        Raises:
            ConfigError: No chat template, one without generation markers, or a slow tokenizer.
        """
        self.config = config
        self._tokenizer: Any = tokenizer
        self._template = check_template(tokenizer)
        # Declared to return one text, though it returns all and their spans.
        self._render_template: Any = render_jinja_template
        self._special_tokens = dict(self._tokenizer.special_tokens_map)

    def render(self, row: Row) -> Example:
        """Render the whole conversation; labels on the tokens inside the generation markers."""
        text, spans = self._apply(row, row.messages, prompt=False)
        encoded = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        input_ids: list[int] = encoded["input_ids"]
        mask = mark_tokens(encoded["offset_mapping"], spans)
        labels = [
            token if marked else IGNORE_INDEX for token, marked in zip(input_ids, mask, strict=True)
        ]
        return Example(row=row.index, input_ids=input_ids, labels=labels)

    def prompt(self, row: Row) -> tuple[list[int], str] | None:
        """Everything before the last assistant turn with the generation prompt, and that turn."""
        turns = [i for i, message in enumerate(row.messages) if message.role == ASSISTANT]
        if not turns:
            return None
        last = turns[-1]
        text, _ = self._apply(row, row.messages[:last], prompt=True)
        input_ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return input_ids, row.messages[last].content

    def loss(self, model: nn.Module, batch: Batch) -> LossParts:
        """Return the sum of the cross entropies of the assistant's tokens."""
        return causal_loss(model, batch)

    def _apply(
        self, row: Row, messages: Sequence[Message], *, prompt: bool
    ) -> tuple[str, list[Span]]:
        """Text of the conversation and where its generation markers were."""
        if not row.messages:
            raise ConfigError(
                f"{row.origin} is plain text, but objective=sft trains on conversations; set "
                "objective=pretrain, or data.format to what the rows are"
            )
        try:
            rendered: tuple[list[str], list[list[Span]]] = self._render_template(
                conversations=[[{"role": m.role, "content": m.content} for m in messages]],
                chat_template=self._template,
                return_assistant_tokens_mask=True,
                add_generation_prompt=prompt,
                **self._special_tokens,
            )
        except TemplateSyntaxError as error:
            raise ConfigError(f"model.chat_template is not valid Jinja: {error}") from error
        except TemplateError as error:
            raise DataError(f"{row.origin}: the chat template refuses this row: {error}") from error
        texts, spans = rendered
        return texts[0], spans[0]


def check_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template that the tokenizer renders with.

    Raises:
        ConfigError: It cannot be trained with; says why and what to do.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            "objective=sft needs a fast tokenizer (a tokenizer.json), which knows which text each "
            "token stands for; set model.tokenizer to a folder or Hub name that has one"
        )
    if tokenizer.chat_template is None:
        raise ConfigError(
            "objective=sft needs a chat template, and the tokenizer has none: write one as Jinja, "
            + _REMEDY
        )
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:
        raise ConfigError(f"the tokenizer's chat template cannot be chosen: {error}") from error
    if _GENERATION.search(template) is None:
        raise ConfigError(
            "the chat template has no {% generation %} markers, so that objective=sft cannot tell "
            "what the assistant says; model.chat_template must name one that has: copy the "
            "template, " + _REMEDY
        )
    return template


def mark_tokens(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Say for each token whether any of its text lies in one of the spans.

    A character that is several tokens marks all of them. A token whose offsets are empty because
    the tokenizer trims blanks stands for the character before.
    """
    spans = [(start, end) for start, end in spans if end > start]
    starts = [start for start, _ in spans]
    mask = []
    for first, stop in offsets:
        # The last span that begins before the token ends; spans follow each other.
        nearest = bisect_left(starts, stop) - 1
        mask.append(nearest >= 0 and min(first, stop - 1) < spans[nearest][1])
    return mask
