"""Learned rotations of inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtune.peft.schema import PEFT
from dtune.peft.schema.tuners import TunerConfig, check_at_least

if TYPE_CHECKING:
    from dtune.types import PeftMethod


@PEFT.register
@dataclass
class OftConfig(TunerConfig):
    """OFT, Qiu et al. 2023, arXiv:2306.07280, of inputs as in arXiv:2506.19847: y = W R x."""

    name: str = "oft"
    # Inputs that are rotated together; divides the number of inputs of every target.
    block_size: int = 16
    # Whether all blocks of a layer share one rotation.
    share_blocks: bool = False
    # Terms of the series that stands for the inverse in the Cayley transform; 0: the inverse.
    neumann_terms: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("block_size", self.block_size, 2)
        check_at_least("neumann_terms", self.neumann_terms, 0)

    def build(self) -> PeftMethod:
        """Import and construct the method."""
        from dtune.peft.oft import Oft

        return Oft(self)
