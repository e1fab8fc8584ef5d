"""Config of the model to load."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from dtune.errors import ConfigError


class Attention(Enum):
    """Implementation of attention. ``auto``: flash_attention_2, then varlen, then sdpa."""

    auto = "auto"
    sdpa = "sdpa"
    eager = "eager"
    flex = "flex"
    flash_attention_2 = "flash_attention_2"
    varlen = "varlen"


class Init(Enum):
    """Where weights come from."""

    pretrained = "pretrained"
    random = "random"


@dataclass
class ModelConfig:
    """Which model, from where, and how it computes attention."""

    name: str = "custom"
    # Folder in Hugging Face layout, a Hub name, or dtune://tiny for the embedded model.
    path: str = "???"
    # Revision of a Hub name: branch, tag or commit.
    revision: str = "main"
    # pretrained: read the weights; random: only the architecture, initialised from the seed.
    init: Init = Init.pretrained
    # auto: flash_attention_2 where it is installed, else varlen on CUDA, else sdpa.
    attention: Attention = Attention.auto
    # Tokenizer folder or Hub name; "same": that of path.
    tokenizer: str = "same"
    # A Jinja file that replaces the tokenizer's chat template; "same": keep it.
    chat_template: str = "same"
    # Texts that become one token each; their rows of the embedding and head are trained.
    added_tokens: list[str] = field(default_factory=list)
    # Run Python code that comes with the model. Only for sources you trust.
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        tokens = self.added_tokens
        if any(not token.strip() for token in tokens):
            raise ConfigError("model.added_tokens holds a blank text; leave it out")
        twice = sorted({token for token in tokens if tokens.count(token) > 1})
        if twice:
            raise ConfigError(f"model.added_tokens names {', '.join(map(repr, twice))} twice")
