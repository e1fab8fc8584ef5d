"""The embedded default: a small world, its corpus, instruction data, tokenizer and tiny model."""

from pathlib import Path

ASSETS = Path(__file__).parent
