"""Any other method of the installed HF ``peft``."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dtune.errors import ConfigError
from dtune.peft.schema import PEFT
from dtune.peft.schema.tuners import TunerConfig

if TYPE_CHECKING:
    from dtune.types import PeftMethod

TYPES = (
    "BEFT",
    "BOFT",
    "C3A",
    "FOURIERFT",
    "GLORA",
    "GRALORA",
    "HIRA",
    "HRA",
    "MISS",
    "PEANUT",
    "PVERA",
    "RANDLORA",
    "ROAD",
    "WAVEFT",
)
"""Types that are tested; HF ``peft`` 0.18 and later has most of them."""

READS_WEIGHT = frozenset({"GLORA", "HIRA", "HRA", "PEANUT"})
"""Types whose layers compute with the weight of their base, which must be a float then."""

OWN = {
    "ADALORA": "peft=adalora",
    "ADAPTION_PROMPT": "peft=prefix",
    "CPT": "peft=prompt",
    "IA3": "peft=ia3",
    "LN_TUNING": "peft=layernorm",
    "LOHA": "peft=loha",
    "LOKR": "peft=lokr",
    "LORA": "peft=lora",
    "MULTITASK_PROMPT_TUNING": "peft=prompt",
    "OFT": "peft=oft",
    "PREFIX_TUNING": "peft=prefix",
    "PROMPT_TUNING": "peft=prompt",
    "P_TUNING": "peft=p_tuning",
    "VERA": "peft=vera",
}
"""Types that a method of its own serves."""

REFUSED = {
    "ADAMSS": "clusters the weights of the base",
    "BONE": "is MISS by now; set peft.type=MISS",
    "CARTRIDGE": "is a cache of keys and values, not a layer",
    "DEFT": "starts from the weights of the base",
    "DELORA": "starts from the weights of the base",
    "FROD": "starts from the weights of the base",
    "LILY": "shares trained matrices between layers, which cannot be sharded by blocks",
    "OSF": "starts from the weights of the base",
    "POLY": "needs the task of each row, which batches do not have",
    "PSOFT": "starts from the weights of the base",
    "SHADOW": "adds a second model, not a layer",
    "SHIRA": "picks the elements that it trains from weights in memory",
    "SUPERTUNING": "chooses by the weights of the base what it trains",
    "TINYLORA": "starts from the weights of the base",
    "TRAINABLE_TOKENS": "is about embeddings; see model.added_tokens",
    "UNILORA": "trains one vector for all layers, which cannot be sharded by blocks",
    "VBLORA": "trains one bank of vectors for all layers, which cannot be sharded by blocks",
    "XLORA": "mixes adapters that are trained already",
}
"""Types that do not fit, and why."""


@PEFT.register
@dataclass
class HfConfig(TunerConfig):
    """A method of the installed HF ``peft`` by its name there, with the options of its config."""

    name: str = "hf"
    # Name of the method in HF peft, a PeftType: BOFT, FOURIERFT, RANDLORA, MISS, HRA, ...
    type: str = "GRALORA"
    # Fields of that method's config in HF peft, such as {r: 16}.
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.type = self.type.upper()
        if self.type in OWN:
            raise ConfigError(f"peft.type={self.type} has a group of its own: {OWN[self.type]}")
        if self.type in REFUSED:
            raise ConfigError(f"peft.type={self.type} cannot be used: it {REFUSED[self.type]}")
        if self.type not in TYPES:
            near = difflib.get_close_matches(self.type, [*TYPES, *OWN], n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ConfigError(f"peft.type={self.type} is unknown; {hint}Types: {', '.join(TYPES)}")

    def build(self) -> PeftMethod:
        """Import and construct the method."""
        from dtune.peft.hf import Hf

        return Hf(self)
