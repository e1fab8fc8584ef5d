"""Training of some of the base's own parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from dtune.errors import ConfigError
from dtune.peft.schema import PEFT, PeftConfig

if TYPE_CHECKING:
    from dtune.types import PeftMethod

# Of last_blocks: as many as are usual, or none where patterns say what is trained.
AUTO = -1
USUAL = 2


@PEFT.register
@dataclass
class FreezeConfig(PeftConfig):
    """The last blocks, or parameters chosen by name, are trained; all else is frozen."""

    exports_model: ClassVar[bool] = True

    name: str = "freeze"
    # Blocks at the end of the model that are trained; -1: 2, or 0 where there are peft.patterns.
    last_blocks: int = AUTO
    # Also trained: roles (all-linear, attention, mlp, head), components of names (q_proj, bias),
    # or globs over dotted names (model.layers.3, model.layers.*.mlp.*).
    patterns: list[str] = field(default_factory=list)
    # Train the embeddings as well.
    embeddings: bool = False
    # Train the head as well; where it shares the embeddings' weight, set peft.embeddings too.
    head: bool = False
    # Train the norms that are in no block as well, such as the one before the head.
    final_norm: bool = False

    def __post_init__(self) -> None:
        if self.last_blocks < AUTO:
            raise ConfigError(
                f"peft.last_blocks={self.last_blocks} must be at least 0, or -1 for the usual"
            )
        if not (
            self.num_blocks or self.patterns or self.embeddings or self.head or self.final_norm
        ):
            raise ConfigError(
                f"peft.last_blocks={self.last_blocks} trains nothing; set peft.last_blocks=2, or "
                "name what is trained in peft.patterns"
            )

    @property
    def num_blocks(self) -> int:
        """Blocks at the end that are trained."""
        if self.last_blocks != AUTO:
            return self.last_blocks
        return 0 if self.patterns else USUAL

    def build(self) -> PeftMethod:
        """Import and construct the method."""
        from dtune.peft.freeze import Freeze

        return Freeze(self)
