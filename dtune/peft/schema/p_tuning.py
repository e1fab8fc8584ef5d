"""P-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from dtune.errors import ConfigError
from dtune.peft.schema import PEFT, PeftConfig

if TYPE_CHECKING:
    from dtune.types import PeftMethod

MLP_LAYERS = 2
"""Hidden layers of peft's MLP, which cannot be chosen."""


class Encoder(Enum):
    """What computes the embeddings of virtual tokens."""

    mlp = "mlp"
    lstm = "lstm"


@PEFT.register
@dataclass
class PTuningConfig(PeftConfig):
    """P-tuning, Liu et al. 2021, arXiv:2103.10385: embeddings before every row, from an encoder."""

    name: str = "p_tuning"
    # Tokens before every row (and every packed document), whose embeddings are computed.
    num_virtual_tokens: int = 20
    # mlp: three linear layers; lstm: a bidirectional LSTM and two linear layers.
    encoder: Encoder = Encoder.mlp
    # Width of the encoder; 0: hidden size of the model.
    hidden: int = 0
    # Layers of the LSTM. An MLP has two hidden ones.
    layers: int = 2

    def __post_init__(self) -> None:
        if self.num_virtual_tokens < 1:
            raise ConfigError(
                f"peft.num_virtual_tokens={self.num_virtual_tokens} must be at least 1"
            )
        if self.hidden < 0:
            raise ConfigError(f"peft.hidden={self.hidden} must be 0 (as the model) or more")
        if self.layers < 1:
            raise ConfigError(f"peft.layers={self.layers} must be at least 1")
        if self.encoder is Encoder.mlp and self.layers != MLP_LAYERS:
            raise ConfigError(
                f"peft.layers={self.layers} is of the LSTM, an MLP has {MLP_LAYERS}; set "
                f"peft.encoder=lstm, or leave peft.layers={MLP_LAYERS}"
            )

    def build(self) -> PeftMethod:
        """Import and construct the method."""
        from dtune.peft.p_tuning import PTuning

        return PTuning(self)
