"""Prefix tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtune.errors import ConfigError
from dtune.peft.schema import PEFT, PeftConfig

if TYPE_CHECKING:
    from dtune.types import PeftMethod


@PEFT.register
@dataclass
class PrefixConfig(PeftConfig):
    """Prefix tuning, Li and Liang 2021, arXiv:2101.00190: keys and values in every layer."""

    name: str = "prefix"
    # Tokens before every row (and every packed document), whose keys and values are trained.
    num_virtual_tokens: int = 20
    # Compute keys and values from embeddings, by two linear layers; else they are trained directly.
    projection: bool = False
    # With projection: features between its layers; 0: the size of all keys of a token in a layer.
    hidden: int = 0

    def __post_init__(self) -> None:
        if self.num_virtual_tokens < 1:
            raise ConfigError(
                f"peft.num_virtual_tokens={self.num_virtual_tokens} must be at least 1"
            )
        if self.hidden < 0:
            raise ConfigError(f"peft.hidden={self.hidden} must be 0 (as the keys) or more")
        if self.hidden and not self.projection:
            raise ConfigError(
                f"peft.hidden={self.hidden} is of the projection; set peft.projection=true"
            )

    def build(self) -> PeftMethod:
        """Import and construct the method."""
        from dtune.peft.prefix import Prefix

        return Prefix(self)
