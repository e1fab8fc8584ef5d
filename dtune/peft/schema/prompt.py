"""Prompt tuning."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from dtune.errors import ConfigError
from dtune.peft.schema import PEFT, PeftConfig

if TYPE_CHECKING:
    from dtune.types import PeftMethod


class PromptInit(Enum):
    """What the embeddings of virtual tokens are at the start."""

    random = "random"
    vocab = "vocab"
    text = "text"


@PEFT.register
@dataclass
class PromptConfig(PeftConfig):
    """Prompt tuning, Lester et al. 2021, arXiv:2104.08691: embeddings before every row."""

    name: str = "prompt"
    # Tokens before every row (and every packed document), whose embeddings are trained.
    num_virtual_tokens: int = 20
    # vocab: embeddings of tokens drawn from the vocabulary; text: of init_text; random: normal.
    init: PromptInit = PromptInit.vocab
    # With init=text: its tokens, repeated or cut to num_virtual_tokens.
    init_text: str = ""

    def __post_init__(self) -> None:
        if self.num_virtual_tokens < 1:
            raise ConfigError(
                f"peft.num_virtual_tokens={self.num_virtual_tokens} must be at least 1"
            )
        if self.init is PromptInit.text and not self.init_text:
            raise ConfigError("peft.init=text needs peft.init_text; or set peft.init=vocab")
        if self.init is not PromptInit.text and self.init_text:
            raise ConfigError(
                f"peft.init_text={self.init_text!r} is read only with peft.init=text, this is "
                f"{self.init.value}; set peft.init=text"
            )

    def build(self) -> PeftMethod:
        """Import and construct the method."""
        from dtune.peft.prompt import Prompt

        return Prompt(self)
