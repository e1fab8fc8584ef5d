"""Next-token prediction on plain text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from dtune.errors import ConfigError
from dtune.objectives.causal import causal_loss
from dtune.types import Batch, Example, LossParts, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dtune.objectives.schema.pretrain import PretrainConfig


class Pretrain:
    """Trains on every token of a document and on the token that ends it."""

    def __init__(self, config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check that the tokenizer can end a document.

        Raises:
            ConfigError: It has no end-of-sequence token.
        """
        self.config = config
        self._tokenizer: Any = tokenizer
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "objective=pretrain ends each document with the end-of-sequence token, and the "
                "tokenizer has none; set model.tokenizer to one that has"
            )

    def render(self, row: Row) -> Example:
        """Text with the special tokens that the tokenizer adds, and one end token."""
        if not row.text:
            raise ConfigError(
                f"{row.origin} is a conversation, but objective=pretrain trains on plain text; set "
                "data.format=text, or objective=sft"
            )
        input_ids: list[int] = self._tokenizer(row.text, verbose=False)["input_ids"]
        end = self._tokenizer.eos_token_id
        if input_ids[-1:] != [end]:
            input_ids.append(end)
        return Example(row=row.index, input_ids=input_ids, labels=list(input_ids))

    def prompt(self, row: Row) -> None:
        """Return None: plain text asks for nothing."""

    def loss(self, model: nn.Module, batch: Batch) -> LossParts:
        """Return the sum of the cross entropies of all tokens but the first of each document."""
        return causal_loss(model, batch)
