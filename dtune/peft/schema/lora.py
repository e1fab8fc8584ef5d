"""Low-rank adaptation."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from dtune.errors import ConfigError
from dtune.peft.schema import PEFT, PeftConfig

if TYPE_CHECKING:
    from dtune.types import PeftMethod

SVD_ITERATIONS = 4
"""With twice the rank of directions to find it among; 16 takes four times as long."""


class LoraInit(Enum):
    """What A and B are at the start."""

    default = "default"
    pissa = "pissa"
    olora = "olora"


@dataclass
class LowRankConfig(PeftConfig):
    """What every method with the factors A and B has."""

    # Rank of the update of each target.
    rank: int = 16
    # Scale: the update is multiplied by alpha / rank (rslora: alpha / sqrt(rank)).
    alpha: float = 32.0
    # Probability of dropping an element of the adapter's input.
    dropout: float = 0.0
    # Roles (all-linear, attention, mlp, head), module names (q_proj), or globs over dotted paths.
    targets: list[str] = field(default_factory=lambda: ["all-linear"])

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"peft.rank={self.rank} must be at least 1")
        if self.alpha <= 0:
            raise ConfigError(f"peft.alpha={self.alpha} must be above 0; 2 x peft.rank is usual")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"peft.dropout={self.dropout} must be in [0, 1)")
        if not self.targets:
            raise ConfigError("peft.targets is empty; set it to [all-linear] or name the layers")


@PEFT.register
@dataclass
class LoraConfig(LowRankConfig):
    """LoRA, Hu et al. 2021, arXiv:2106.09685: y = W x + (alpha / rank) B A dropout(x)."""

    name: str = "lora"
    # default: A random, B zero. pissa, olora: A and B take over the largest singular directions
    # (the first directions of a QR decomposition) of W, and the frozen base is what is left.
    init: LoraInit = LoraInit.default
    # Power iterations of the randomised SVD of pissa; 0: an exact SVD, which is slow.
    svd_iterations: int = SVD_ITERATIONS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.svd_iterations < 0:
            raise ConfigError(f"peft.svd_iterations={self.svd_iterations} must be at least 0")
        if self.svd_iterations != SVD_ITERATIONS and self.init is not LoraInit.pissa:
            raise ConfigError(
                f"peft.svd_iterations={self.svd_iterations} has no use with "
                f"peft.init={self.init.value}; leave it out, or set peft.init=pissa"
            )

    def build(self) -> PeftMethod:
        """Import and construct the method."""
        from dtune.peft.lora import Lora

        return Lora(self)


@PEFT.register
@dataclass
class PissaConfig(LoraConfig):
    """LoRA with ``init=pissa``, Meng et al. 2024, arXiv:2404.02948; with ``quant`` QPiSSA."""

    name: str = "pissa"
    # What makes it PiSSA.
    init: LoraInit = LoraInit.pissa

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_init(self, LoraInit.pissa)


@PEFT.register
@dataclass
class OloraConfig(LoraConfig):
    """LoRA with ``init=olora``, Buyukakyuz 2024, arXiv:2406.01775."""

    name: str = "olora"
    # What makes it OLoRA.
    init: LoraInit = LoraInit.olora

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_init(self, LoraInit.olora)


def _check_init(config: LoraConfig, only: LoraInit) -> None:
    if config.init is not only:
        raise ConfigError(
            f"peft={config.name} is LoRA with peft.init={only.value}; for "
            f"peft.init={config.init.value} set peft=lora"
        )
