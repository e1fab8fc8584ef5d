"""Settings that the commands which use trained weights have of their own. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from dtune.errors import ConfigError
from dtune.evaluate.schema import SamplingConfig


@dataclass
class SpeakSettings(SamplingConfig):
    """What ``dtune chat`` and ``dtune generate`` have in common."""

    # Folder of the run whose weights answer; without it the model of the settings (model.path=...).
    run_dir: str = ""
    # Weights of the run: last, or best by checkpoint.best.
    export: str = ""
    # Folders of adapters in PEFT's layout, each by a name of its own: adapters.NAME=FOLDER.
    adapters: dict[str, str] = field(default_factory=dict)
    # Refuse adapters that name another base than model.path.
    check_base: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.adapters:
            if name in RESERVED:
                raise ConfigError(f"adapters.{name}: {name} means {RESERVED[name]}; choose another")


RESERVED = {"none": "the base alone", "run": "the adapter of run_dir"}
"""Names that adapters cannot have."""


@dataclass
class GenerateSettings(SpeakSettings):
    """Settings of ``dtune generate``."""

    # File of prompts: rows as training reads them (jsonl, json, csv, parquet), or txt, one a line.
    prompts: str = ""
    # File of the answers as JSON Lines; without it they are printed.
    out: str = ""
    # Prompts generated from at once.
    batch_size: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompts:
            raise ConfigError("prompts names the file of prompts: prompts=FILE")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size} must be at least 1")


@dataclass
class ChatSettings(SpeakSettings):
    """Settings of ``dtune chat``."""

    # What the conversation begins with in the system's turn; empty: nothing.
    system: str = ""


@dataclass
class MergeSettings:
    """Settings of ``dtune merge``."""

    # Folder of the run whose adapter is merged.
    run_dir: str = ""
    # Weights of the run: last, or best by checkpoint.best.
    export: str = ""
    # Without run_dir: folder of an adapter in PEFT's layout, merged into model.path.
    adapter: str = ""
    # Folder that the merged model is written to; it must not exist, or be empty.
    out: str = ""
    # Dtype that is written: bf16, fp16, fp32, or base for that of the base's files.
    dtype: str = "base"
    # Quantise what was merged: none, nf4, fp4 or int8 (bitsandbytes' layout).
    quantize: str = "none"
    # Rows that are compared before anything is published.
    rows: int = 8
    # Largest mean difference of logits, in their standard deviations; 0: what rounding explains.
    max_logit_difference: float = 0.0
    # Largest ratio of the two perplexities; 0: 1.02 for floats, 1.25 for 4 and 8 bits.
    max_perplexity_ratio: float = 0.0
    # Refuse an adapter that names another base than model.path.
    check_base: bool = True

    def __post_init__(self) -> None:
        if not self.out:
            raise ConfigError("out names the folder of the merged model: out=FOLDER")
        if self.run_dir and self.adapter:
            raise ConfigError("run_dir and adapter both name what is merged; set one of them")
        if not self.run_dir and not self.adapter:
            raise ConfigError(
                "nothing to merge: set run_dir=RUN, or adapter=FOLDER model.path=BASE"
            )
        for key, value, known in (
            ("dtype", self.dtype, DTYPES),
            ("quantize", self.quantize, QUANTIZE),
        ):
            if value not in known:
                raise ConfigError(f"{key}={value} is not one of {', '.join(known)}")
        if self.rows < 1:
            raise ConfigError(f"rows={self.rows} must be at least 1")
        if self.max_logit_difference < 0:
            raise ConfigError(f"max_logit_difference={self.max_logit_difference} must be 0 or more")
        if self.max_perplexity_ratio and self.max_perplexity_ratio < 1:
            raise ConfigError(f"max_perplexity_ratio={self.max_perplexity_ratio} must be 1 or more")


DTYPES = ("base", "bf16", "fp16", "fp32")
QUANTIZE = ("none", "nf4", "fp4", "int8")
