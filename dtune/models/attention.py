"""Attention that stays inside each document, by every implementation.

A model is called with ``input_ids``, ``position_ids``, ``attention_mask``, ``use_cache=False`` and
the number of documents, whatever its attention. A hook on the model makes of them what the
implementation reads, once a forward: masks, or the bounds of documents. What it does not know it
leaves to transformers, which turns position ids that restart into block-diagonal masks.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dtune.errors import ConfigError
from dtune.models.attention_backends import Capability, MaskKind, backends, in_words
from dtune.models.masks import causal_masks, document_bounds
from dtune.models.schema import Attention
from dtune.runtime.capabilities import is_installed
from dtune.types import NUM_DOCUMENTS, SharedPrefix

VARLEN = "dtune_varlen"

_NAMES = {
    Attention.sdpa: "sdpa",
    Attention.eager: "eager",
    Attention.flex: "flex_attention",
    Attention.flash_attention_2: "flash_attention_2",
    Attention.varlen: VARLEN,
}


def _flash_problem(device: torch.device) -> str:
    if not is_installed("flash_attn"):
        return "the package flash-attn is not installed"
    return "" if device.type == "cuda" else "it needs an NVIDIA GPU"


def _varlen_problem(device: torch.device) -> str:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return "it needs torch 2.10 or newer"
    if device.type != "cuda":
        return "it needs an NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    return ""


def _flex_problem(device: torch.device) -> str:
    return "" if device.type == "cuda" else "its backward pass needs a GPU"


_PROBLEMS: Mapping[Attention, Callable[[torch.device], str]] = {
    Attention.flash_attention_2: _flash_problem,
    Attention.varlen: _varlen_problem,
    Attention.flex: _flex_problem,
}


def resolve_attention(
    wanted: Attention,
    device: torch.device,
    *,
    softcap: bool = False,
    half: bool = True,
) -> str:
    """Return the transformers name of the implementation to use.

    Args:
        wanted: What the config asks for.
        device: Where the model will compute.
        softcap: Whether the model bounds its attention scores (Gemma 2), which the kernels of
            torch cannot.
        half: Whether it computes in bf16 or fp16; the variable-length kernels take nothing else.

    Raises:
        ConfigError: An implementation is asked for by name that cannot run here.
    """
    if wanted is Attention.auto:
        return _NAMES[_best(device, softcap=softcap, half=half)]
    problem = _PROBLEMS[wanted](device) if wanted in _PROBLEMS else ""
    if not half and wanted in (Attention.varlen, Attention.flash_attention_2):
        problem = problem or "it computes in bf16 or fp16 only (precision=bf16)"
    if softcap and wanted in (Attention.sdpa, Attention.varlen):
        problem = problem or "it cannot bound attention scores as this model does (softcap)"
    if problem:
        raise ConfigError(
            f"model.attention={wanted.value} cannot run here: {problem}; set model.attention=auto"
        )
    return _NAMES[wanted]


def _best(device: torch.device, *, softcap: bool, half: bool) -> Attention:
    if half and not _flash_problem(device):
        return Attention.flash_attention_2
    if softcap:
        return Attention.flex if not _flex_problem(device) else Attention.eager
    if half and not _varlen_problem(device):
        return Attention.varlen
    return Attention.sdpa


def _wants_documents(kwargs: Mapping[str, Any]) -> bool:
    past = kwargs.get("past_key_values")
    no_cache = past is None or isinstance(past, SharedPrefix)
    given = kwargs.get("position_ids") is not None
    return no_cache and given and kwargs.get("use_cache") is False


def _pass_documents(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replace ``NUM_DOCUMENTS`` by what the model's attention reads; before its forward.

    transformers finds documents by itself for some implementations, at the price of the host
    waiting for the device.
    """
    count = kwargs.pop(NUM_DOCUMENTS, None)
    if not _wants_documents(kwargs):
        return args, kwargs
    own: Any = module
    return args, {**kwargs, **_told(own, own.config._attn_implementation, kwargs, count)}


def _told(
    model: PreTrainedModel, implementation: str, kwargs: Mapping[str, Any], count: int | None
) -> dict[str, Any]:
    """Arguments that tell an implementation where documents are; none where it finds out itself."""
    position_ids, mask = kwargs["position_ids"], kwargs.get("attention_mask")
    past = kwargs.get("past_key_values")
    if isinstance(past, SharedPrefix):
        return _told_with_prefix(model, implementation, kwargs, count, past.num_tokens)
    whole_rows = count == position_ids.shape[0] and position_ids.device.type == "cpu"
    if implementation == "sdpa" and whole_rows:
        # No mask: torch's own causal attention computes half of the scores. To find out, as
        # transformers does, costs nothing where there is no device to wait for.
        return {}
    if implementation in ("sdpa", "eager"):
        additive = _embedding_dtype(model) if implementation == "eager" else None
        masks = causal_masks(model.config, position_ids, mask, additive)
        return {} if masks is None else {"attention_mask": masks}
    if implementation == VARLEN:
        _find_capability(position_ids.device)
        if mask is None and count == position_ids.shape[0]:
            # Each row is one document: there is nothing to tell. Only for packed rows, whose
            # shape is constant: cuDNN plans for every new one.
            bounds = position_ids.new_empty(0, dtype=torch.int32)
        else:
            bounds = document_bounds(position_ids, mask, count)
        # Where the mask travels: transformers hands 4-D masks on untouched.
        return {"attention_mask": bounds[None, None, None]}
    if implementation == "flash_attention_2":
        bounds = document_bounds(position_ids, mask, count)
        longest = position_ids.shape[1]
        return {
            "attention_mask": None,
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    return {}


def _told_with_prefix(
    model: PreTrainedModel,
    implementation: str,
    kwargs: Mapping[str, Any],
    count: int | None,
    prefix: int,
) -> dict[str, Any]:
    """The same where every document sees a prefix: only masks of scores can say so."""
    position_ids, mask = kwargs["position_ids"], kwargs.get("attention_mask")
    if implementation not in ("sdpa", "eager", VARLEN) or count == position_ids.shape[0]:
        return {}
    additive = _embedding_dtype(model) if implementation == "eager" else None
    masks = causal_masks(model.config, position_ids, mask, additive, prefix=prefix)
    return {} if masks is None else {"attention_mask": masks}


def _embedding_dtype(model: PreTrainedModel) -> torch.dtype:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight.dtype


def install_documents(model: nn.Module) -> None:
    """Make a model tell its attention where documents are, where that is not left to it."""
    model.register_forward_pre_hook(_pass_documents, with_kwargs=True)


def varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within documents by torch's variable-length kernel; with a cache, as sdpa does.

    query [B, H, S, D], key and value [B, H_kv, S, D] in bf16 or fp16, ``attention_mask`` the bounds
    [1, 1, 1, documents + 1] that the model's hook made, or none of them, [1, 1, 1, 0], where each
    row is one document: then torch's causal attention is the faster. Returns [B, S, H, D].
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    assert dropout == 0.0, "variable-length attention has no dropout"
    # Norms and rotations of them may have left fp32, where autocast computes the products.
    query, key = query.to(value.dtype), key.to(value.dtype)
    batch, heads, length, dim = query.shape
    if not attention_mask.numel():
        if sliding_window is None or sliding_window >= length:
            with _fastest(query):
                return sdpa_attention_forward(
                    module, query, key, value, None, scaling=scaling, is_causal=True
                )
        attention_mask = torch.arange(
            0, (batch + 1) * length, length, dtype=torch.int32, device=query.device
        )
    window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
    q, k, v = (x.transpose(1, 2).reshape(batch * length, -1, dim) for x in (query, key, value))
    bounds = attention_mask.flatten()
    out = _varlen_kernel(q, k, v, bounds, longest=length, scale=scaling, window=window)
    return out.view(batch, length, heads, dim), None


_CAPABILITIES: dict[int | None, Capability] = {}
"""Of GPUs by their index; asked for outside of what is compiled."""


def _find_capability(device: torch.device) -> None:
    if device.type == "cuda" and device.index not in _CAPABILITIES:
        _CAPABILITIES[device.index] = torch.cuda.get_device_capability(device)


def _fastest(query: torch.Tensor) -> AbstractContextManager[Any]:
    """Around causal attention: torch tries its kernels in the order that suits the card."""
    capability = _CAPABILITIES.get(query.device.index)
    if capability is None:
        return nullcontext()
    chosen = backends(capability, query.shape[-1], query.dtype, MaskKind.causal)
    return sdpa_kernel(list(chosen), set_priority=True)


def attention_in_words(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> str:
    """What computes attention on a device; for the log."""
    name = str(model.config._attn_implementation)
    if name != VARLEN or device.type != "cuda":
        return name
    config = model.config.get_text_config().to_dict()
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    capability = torch.cuda.get_device_capability(device)
    kernels = in_words(backends(capability, dim, dtype, MaskKind.causal))
    return f"{name}; where each row is one document, the first that can of {kernels}"


def _varlen_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    *,
    longest: int,
    scale: float | None,
    window: tuple[int, int],
) -> torch.Tensor:
    """Causal attention over flattened documents: query [T, H, D], key and value [T, H_kv, D]."""
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        # Repeated, not enable_gqa: that option came with torch 2.12.
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    out = varlen_attn(
        query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=window
    )
    assert isinstance(out, torch.Tensor)
    return out


AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, sdpa_mask)
