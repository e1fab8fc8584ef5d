"""P-tuning, Liu et al. 2021, arXiv:2103.10385: an encoder computes embeddings of virtual tokens."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PretrainedConfig

from dtune.peft.prompt import PromptTokens
from dtune.peft.schema.p_tuning import PTuningConfig
from dtune.peft.virtual import VirtualTokens


class PTuning(VirtualTokens):
    """The embeddings of virtual tokens are computed by an MLP, or by an LSTM before one."""

    name = "p_tuning"
    peft_type = "P_TUNING"
    trait = PromptTokens
    decisive = ("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers")

    def __init__(self, config: PTuningConfig) -> None:
        self.config = config
        self.num_virtual_tokens = config.num_virtual_tokens

    def make_encoder(self) -> nn.Module:
        """``peft``'s encoder."""
        from peft import PromptEncoder

        encoder: nn.Module = PromptEncoder(self.peft_config())
        for module in encoder.modules():
            if isinstance(module, nn.LSTM):
                module.register_forward_pre_hook(_refresh)
        return encoder

    def fields(self, config: PretrainedConfig) -> dict[str, object]:
        """Of the encoder."""
        return {
            "encoder_reparameterization_type": self.config.encoder.value.upper(),
            "encoder_hidden_size": self.config.hidden or config.hidden_size,
            "encoder_num_layers": self.config.layers,
            "encoder_dropout": 0.0,
        }


def _refresh(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Have an LSTM compute with the parameters that it holds now.

    It keeps a list of them, which an engine that puts others in their places does not know.
    """
    own: Any = module
    own._flat_weights = [own.get_parameter(name) for name in own._flat_weights_names]
