"""BitFit, Ben Zaken et al. 2021, arXiv:2106.10199: biases, and here norms, are trained."""

from __future__ import annotations

from torch import nn

from dtune.errors import ConfigError
from dtune.peft.base import is_norm
from dtune.peft.schema.bitfit import BitfitConfig
from dtune.peft.whole import WholeModel
from dtune.types import ModelSpec


class Bitfit(WholeModel):
    """Biases and the parameters of norms are trained; every matrix is frozen."""

    name = "bitfit"

    def __init__(self, config: BitfitConfig) -> None:
        self.config = config

    def plan_trained(self, model: nn.Module, spec: ModelSpec) -> frozenset[str]:
        """Parameters called a bias, and those of modules whose class is a norm.

        A norm's own bias is one of the norm. ConfigError for a model that has neither.
        """
        biases: set[str] = set()
        norms: set[str] = set()
        for path, module in model.named_modules():
            for leaf, _ in module.named_parameters(recurse=False):
                name = f"{path}.{leaf}" if path else leaf
                if is_norm(module):
                    norms.add(name)
                elif leaf == "bias" or leaf.endswith("_bias"):
                    biases.add(name)
        chosen = (biases if self.config.biases else set()) | (norms if self.config.norms else set())
        trained = chosen & {name for name, _ in model.named_parameters()}
        if not trained:
            raise self._nothing(spec, left_out=bool(biases or norms))
        return frozenset(trained)

    def _nothing(self, spec: ModelSpec, *, left_out: bool) -> ConfigError:
        config = self.config
        wanted = {"biases": config.biases, "norms": config.norms}
        other = next((kind for kind, chosen in wanted.items() if not chosen), "")
        advice = f"set peft.{other}=true" if left_out else "use peft=lora"
        lacking = " and no ".join(kind for kind, chosen in wanted.items() if chosen)
        return ConfigError(
            f"peft=bitfit: {spec.family} ({spec.path}) has no {lacking} to train; {advice}"
        )
