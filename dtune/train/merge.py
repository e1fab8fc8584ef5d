"""An adapter merged into its base by HF ``peft``, as a model that others load."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dtune.errors import CheckpointError, ConfigError


def untie_if_touched(base: PreTrainedModel, keys: Mapping[str, tuple[int, ...]]) -> bool:
    """Give the head weights of its own where the adapter changes it or the embedding alone.

    Both are one tensor in many models. Merged into one of them, an update would reach both.
    """
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if not isinstance(head, nn.Module) or not isinstance(embedding, nn.Module):
        return False
    shared = dict(head.named_parameters()).get("weight")
    if shared is None or shared is not dict(embedding.named_parameters()).get("weight"):
        return False
    names = [name for name, module in base.named_modules() if module in (head, embedding)]
    # Rows of new tokens are for both; peft puts them into either.
    updates = [key for key in keys if ".token_adapter." not in key]
    if not any(f".{name}." in f".{key}" for name in names for key in updates):
        return False
    head.register_parameter("weight", nn.Parameter(shared.detach().clone(), requires_grad=False))
    config: Any = base.config
    config.tie_word_embeddings = False
    config.get_text_config().tie_word_embeddings = False
    return True


def merge_into_base(wrapped: Any, *, kind: str) -> PreTrainedModel:
    """The base of a ``PeftModel`` with the adapter in its weights; the wrapper is used up.

    ConfigError where peft has no such merge.
    """
    try:
        with warnings.catch_warnings():
            # Of tied weights, which ``untie_if_touched`` has seen to.
            warnings.filterwarnings("ignore", ".*tie_word_embeddings.*")
            merged = wrapped.merge_and_unload(safe_merge=True)
    except (NotImplementedError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"an adapter of type {kind} cannot be merged into weights: {error}; use it as it is, "
            "with dtune chat or dtune generate"
        ) from error
    return cast(PreTrainedModel, merged)


def save_merged(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype
) -> None:
    """Write the model in a dtype, with its tokenizer. CheckpointError where the disk refuses."""
    owner: Any = model  # attributes that differ between versions of transformers
    # Not the buffers: some are stored in fp32 beside 16-bit weights.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    owner.config.architectures = [type(model).__name__]
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ConfigError(
                f"dtype={dtype}: {name} has values that it cannot hold; set dtype=bf16"
            )
    # Declared as one, though a model may have none.
    generation: GenerationConfig | None = owner.generation_config
    owner.generation_config = GenerationConfig()
    try:
        with warnings.catch_warnings():
            # save_pretrained calls what transformers itself calls deprecated.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            model.save_pretrained(str(folder), safe_serialization=True)
        # Not by save_pretrained, which refuses a base whose sampling settings contradict.
        file = folder / "generation_config.json"
        if generation is None:
            file.unlink(missing_ok=True)
        else:
            file.write_text(generation.to_json_string(), encoding="utf-8")
        tokenizer.save_pretrained(str(folder))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error


def load_written(folder: Path, device: torch.device) -> PreTrainedModel:
    """What was written, as others load it: in the dtype of its files."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    if "quantization_config" not in model.config.to_dict():
        model = model.to(device)
    return cast(PreTrainedModel, model.eval())


def quantize_written(
    source: Path, folder: Path, tokenizer: PreTrainedTokenizerBase, kind: str
) -> None:
    """Write a model of float weights once more with the linears of its blocks in 4 or 8 bits."""
    if kind == "int8":
        # bitsandbytes computes with 8 bits in fp16, whatever it is given.
        config, dtype = BitsAndBytesConfig(load_in_8bit=True), "float16"
    else:
        dtype = "auto"
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, quantization_config=config)
    try:
        model.save_pretrained(str(folder), safe_serialization=True)
        tokenizer.save_pretrained(str(folder))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error
