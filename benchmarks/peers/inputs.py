"""The weights, adapter and tokens that all contestants share; made once, from seeds."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.peers.work import TARGETS, Work
from dtune.measure.flops import FlopsModel, MatrixCounts

SHAPES: Mapping[str, Mapping[str, Any]] = {
    # The embedded model of dtune: about 1 M parameters.
    "tiny": {
        "vocab_size": 1536,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    # 13 M parameters: 52 MB in fp32. Its head is as large beside its blocks as that of Llama 1B.
    "random50m": {
        "vocab_size": 8192,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    # Llama 3.2 1B and Llama 3.1 8B.
    "llama1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
"""Architectures by name, as Hugging Face's Llama takes them."""

END = 2
"""Token that ends every document."""
_SPECIAL = ("<pad>", "<s>", "</s>")
_SEED = 1
_ADAPTER_SCALE = 0.02
"""Standard deviation of B: an update that is felt, and is no more than the weights."""


def make_inputs(work: Work) -> None:
    """Write checkpoint, adapter, tokenizer and tokens into ``work.folder``."""
    Path(work.folder).mkdir(parents=True, exist_ok=True)
    vocabulary = SHAPES[work.model]["vocab_size"]
    _write_model(work)
    if work.device == "cuda":
        # This process goes on while the contestants need the memory.
        gc.collect()
        torch.cuda.empty_cache()
    _write_tokenizer(work, vocabulary)
    np.save(work.tokens, draw_tokens(work, vocabulary), allow_pickle=False)
    _write_texts(work)


def draw_tokens(work: Work, vocabulary: int) -> npt.NDArray[np.int64]:
    """Tokens [rows, length] with the frequencies of words (Zipf); each document ends with END."""
    random = np.random.default_rng(_SEED)
    first = len(_SPECIAL)
    weights = 1.0 / np.arange(1, vocabulary - first + 1)
    ids = random.permutation(np.arange(first, vocabulary))
    drawn = random.choice(ids, size=(work.rows, work.length), p=weights / weights.sum())
    each = work.length // work.documents
    drawn[:, each - 1 :: each] = END
    return drawn.astype(np.int64)


def flops_per_token(work: Work) -> float:
    """FLOPs of forward and backward for one token; recomputation is not counted."""
    shape = SHAPES[work.model]
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    narrow = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    wide = shape["intermediate_size"]
    linears = [(hidden, hidden), (hidden, narrow), (hidden, narrow), (hidden, hidden)]
    linears += [(hidden, wide), (hidden, wide), (wide, hidden)]
    counts = MatrixCounts(
        frozen=layers * sum(i * o for i, o in linears),
        trained=layers * sum(work.rank * (i + o) for i, o in linears),
        head_frozen=hidden * shape["vocab_size"],
        head_trained=0,
    )
    # Nothing predicts the first token of a document.
    targets = (work.length - work.documents) / work.length
    return FlopsModel(counts, layers, hidden).per_token(
        work.length / work.documents, targets=targets
    )


def read_documents(work: Work) -> npt.NDArray[np.int64]:
    """The tokens by document: [rows, documents, length of each]."""
    tokens: npt.NDArray[np.int64] = np.load(work.tokens, allow_pickle=False)
    return tokens.reshape(work.rows, work.documents, -1)


def texts_path(work: Work) -> Path:
    """The same tokens as text, for who tokenises: a JSON line a document."""
    return Path(work.folder) / "texts.jsonl"


def _write_texts(work: Work) -> None:
    documents = read_documents(work).reshape(work.rows * work.documents, -1)
    # The end is left to who writes it anyway.
    lines = (json.dumps({"text": " ".join(map(str, one[:-1]))}) + "\n" for one in documents)
    texts_path(work).write_text("".join(lines), encoding="utf-8")


def _write_model(work: Work) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(_SEED)
    config = LlamaConfig(
        **SHAPES[work.model],
        max_position_embeddings=max(2048, work.length),
        rms_norm_eps=1e-5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=END,
    )
    dtype = torch.float32 if work.precision == "fp32" else torch.bfloat16
    with torch.device(work.device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(work.checkpoint)
    lora = LoraConfig(
        r=work.rank,
        lora_alpha=work.alpha,
        lora_dropout=0.0,
        target_modules=list(TARGETS),
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=_ADAPTER_SCALE)
    adapted.save_pretrained(work.adapter)


def _write_tokenizer(work: Work, vocabulary: int) -> None:
    """A tokenizer to which the text "17 4" is the tokens 17 and 4."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = dict(zip(_SPECIAL, range(len(_SPECIAL)), strict=True))
    words.update({str(number): number for number in range(len(_SPECIAL), vocabulary)})
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, begin, end = _SPECIAL
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=begin, eos_token=end
    )
    fast.save_pretrained(work.checkpoint)
