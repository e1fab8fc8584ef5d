"""Config of the model to load."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


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
    # Run Python code that comes with the model. Only for sources you trust.
    trust_remote_code: bool = False
