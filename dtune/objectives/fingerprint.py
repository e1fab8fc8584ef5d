"""What the rendering of a row depends on besides the row, as one hash."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dtune.objectives.schema import ObjectiveConfig


def objective_fingerprint(config: ObjectiveConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash the objective's config and code, the tokenizer and its chat template."""
    code = [file.read_text("utf-8") for file in sorted(Path(__file__).parent.glob("*.py"))]
    parts = {
        "objective": asdict(config),
        "code": code,
        "versions": [tokenizers.__version__, transformers.__version__],
        "tokenizer": _describe_tokenizer(tokenizer),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Everything that turns text into tokens, whatever folder it was loaded from."""
    described: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "special_tokens": {name: str(t) for name, t in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
    }
    if tokenizer.is_fast:
        backend: Any = tokenizer
        state = json.loads(backend.backend_tokenizer.to_str())
        # Left behind by the last call, and set anew by the next.
        for volatile in ("truncation", "padding"):
            state.pop(volatile, None)
        described["backend"] = state
    else:
        described["vocabulary"] = tokenizer.get_vocab()
    return described
