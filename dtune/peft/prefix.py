"""Prefix tuning, Li and Liang 2021, arXiv:2101.00190: trained keys and values in every layer.

Shape legend: B rows, S tokens of a row, N virtual tokens, K heads of keys, D size of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from dtune.errors import ConfigError
from dtune.peft.schema.prefix import PrefixConfig
from dtune.peft.virtual import VirtualTokens, WithVirtualTokens, continues, extend_seen
from dtune.types import NUM_DOCUMENTS, InjectReport, ModelSpec, SharedPrefix

_PLAIN_LAYERS = {"full_attention", "sliding_attention"}


class _PrefixLayer(CacheLayerMixin):
    """Keys and values [B, K, N, D] of one layer, which stand before new ones and stay alone."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = keys, values
        self.is_initialized = True
        self.is_sliding = False
        self.was_read = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: it holds all that it ever will."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values with the prefix, [B, K, N + S, D]; nothing is stored.

        So a block that is computed again for its gradient gets the same.
        """
        self.was_read = True
        assert self.keys is not None
        assert self.values is not None
        keys, values = self.keys.to(key_states.dtype), self.values.to(value_states.dtype)
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that ``query_length`` new tokens see, and the place of the first."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """N."""
        assert self.keys is not None
        return self.keys.shape[2]

    def get_max_length(self) -> int:
        """-1: it has no bound."""
        return -1


class PrefixCache(Cache, SharedPrefix):
    """The prefix of every layer, for forwards that keep nothing."""

    def __init__(self, layers: list[_PrefixLayer], num_tokens: int) -> None:
        super().__init__(layers=[*layers])
        self.num_tokens = num_tokens
        self._prefix = layers

    def check_read(self) -> None:
        """Raise where a layer has passed over its prefix."""
        for index, layer in enumerate(self._prefix):
            assert layer.was_read, f"layer {index} has not read its prefix"


class PrefixTokens(WithVirtualTokens):
    """Forward with the encoder's results as keys and values that come before those of tokens."""

    def forward_with_tokens(self, given: dict[str, Any]) -> Any:
        """As the model's own."""
        num = self.num_virtual_tokens
        if continues(given):
            extend_seen(given, num)
            return self.call_own(given)
        own: Any = self
        past = given.get("past_key_values")
        use_cache = given.get("use_cache")
        if past is None and (own.config.use_cache if use_cache is None else use_cache):
            trains = own.training and torch.is_grad_enabled()
            past = None if trains else DynamicCache(config=own.config)
        if past is None:
            return self._keep_nothing(given)
        dtype = _compute_dtype(own)
        for index, (keys, values) in enumerate(self._prefix(given)):
            past.update(keys.to(dtype), values.to(dtype), index)
        extend_seen(given, num)
        return self.call_own({**given, "past_key_values": past})

    def _keep_nothing(self, given: dict[str, Any]) -> Any:
        """Without a cache for tokens: each document of a row sees the prefix and itself."""
        own: Any = self
        num = self.num_virtual_tokens
        layers = [_PrefixLayer(keys, values) for keys, values in self._prefix(given)]
        cache = PrefixCache(layers, num)
        given = {**given, "past_key_values": cache, "use_cache": False}
        packed = _is_packed(given)
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + num
        given = self.told(given)
        mask = given.get("attention_mask")
        if mask is None and packed:
            raise ConfigError(
                f"peft=prefix with packed rows cannot run with this attention of "
                f"{own.config.model_type}, which makes no masks of documents; set "
                "data.packing=false, or model.attention=sdpa"
            )
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            mask = torch.cat([mask.new_ones(mask.shape[0], num), mask], dim=1)
            given["attention_mask"] = mask
        output = own.own_forward(**given)
        cache.check_read()
        output.past_key_values = None
        return output

    def _prefix(self, given: dict[str, Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each layer: [B, K, N, D], the same for every row."""
        own: Any = self
        ids = given.get("input_ids")
        tokens = given["inputs_embeds"] if ids is None else ids
        rows = len(tokens)
        encoded = self.encoded(tokens.device)  # [N, layers * 2 * K * D]
        heads, head_dim = _kv_shape(own.config.get_text_config())
        parts = encoded.view(len(encoded), -1, heads, head_dim).permute(1, 2, 0, 3)
        for keys, values in parts.unflatten(0, (-1, 2)):
            yield keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)


def _is_packed(given: Mapping[str, Any]) -> bool:
    """Whether rows hold several documents; without their number, told from positions."""
    position_ids = given.get("position_ids")
    if position_ids is None or given.get("attention_mask") is not None:
        return False
    count = given.get(NUM_DOCUMENTS)
    if count is None:
        return bool((position_ids.diff(dim=1) != 1).any())
    return bool(count != len(position_ids))


def _compute_dtype(model: Any) -> torch.dtype:
    """Dtype of the keys that the model is about to make."""
    weight: torch.Tensor = model.get_input_embeddings().weight
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def _kv_shape(config: PretrainedConfig) -> tuple[int, int]:
    """K and D."""
    own = config.to_dict()
    heads = own["num_attention_heads"]
    head_dim = own.get("head_dim") or own["hidden_size"] // heads
    return own.get("num_key_value_heads") or heads, head_dim


class Prefix(VirtualTokens):
    """Keys and values of virtual tokens are the parameters, or are projected from them."""

    name = "prefix"
    peft_type = "PREFIX_TUNING"
    trait = PrefixTokens
    decisive: tuple[str, ...] = ("num_attention_heads", "prefix_projection")

    def __init__(self, config: PrefixConfig) -> None:
        self.config = config
        self.num_virtual_tokens = config.num_virtual_tokens
        if config.projection:
            self.decisive = (*self.decisive, "encoder_hidden_size")

    def make_encoder(self) -> nn.Module:
        """``peft``'s encoder."""
        from peft import PrefixEncoder

        encoder: nn.Module = PrefixEncoder(self.peft_config())
        return encoder

    def fields(self, config: PretrainedConfig) -> dict[str, object]:
        """Heads and width are those of keys."""
        heads, head_dim = _kv_shape(config)
        return {
            "num_attention_heads": heads,
            "token_dim": heads * head_dim,
            "prefix_projection": self.config.projection,
            "encoder_hidden_size": self.config.hidden or heads * head_dim,
        }

    def inject(self, model: nn.Module, spec: ModelSpec) -> InjectReport:
        """Add the encoder. ConfigError for a model whose layers do not all keep such keys."""
        report = super().inject(model, spec)
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                own: Any = module
                # Else transformers takes the cache away from a block that is computed again,
                # because others would store the same keys twice.
                own._can_checkpoint_with_cache = True
        return report

    def check_model(self, model: PreTrainedModel, spec: ModelSpec) -> None:
        """Every layer keeps keys and values of one shape, and sees the whole prefix."""
        config = spec.config.get_text_config()
        problem = _cache_problem(model, config) or _layer_problem(model, spec, config)
        window = config.to_dict().get("sliding_window")
        if not problem and window and self.num_virtual_tokens >= window:
            raise ConfigError(
                f"peft.num_virtual_tokens={self.num_virtual_tokens} does not fit into the window "
                f"of {window} tokens that layers of {spec.family} see; set fewer"
            )
        if problem:
            raise ConfigError(
                f"peft=prefix: {spec.family} ({spec.path}) {problem}; use peft=prompt, "
                "peft=p_tuning or peft=lora"
            )


def _cache_problem(model: PreTrainedModel, config: PretrainedConfig) -> str:
    """Why a model takes no keys and values from outside; empty where it does."""
    if config.is_encoder_decoder:
        return "has an encoder and a decoder"
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return "takes no cache of keys and values"
    if model._is_stateful:
        return "keeps a state instead of keys and values"
    return ""


def _layer_problem(model: nn.Module, spec: ModelSpec, config: PretrainedConfig) -> str:
    """Why layers do not all keep keys of one shape; empty where they do."""
    own = config.to_dict()
    others = sorted(set(own.get("layer_types") or ()) - _PLAIN_LAYERS)
    if others:
        return f"has layers of other kinds ({', '.join(others)})"
    if own.get("num_kv_shared_layers") or own.get("per_layer_config"):
        return "has layers whose keys and values differ, or are shared"
    heads, head_dim = _kv_shape(config)
    width = heads * head_dim
    both = {"k_proj": width, "v_proj": width}
    fused = {"qkv_proj": own["num_attention_heads"] * head_dim + 2 * width}
    for path, module in model.named_modules():
        if isinstance(module, spec.block_types):
            found = _out_features(path, model, spec)
            if not any(widths.items() <= found.items() for widths in (both, fused)):
                return f"has no keys and values of {heads} heads of size {head_dim} in {path}"
    return ""


def _out_features(block: str, model: nn.Module, spec: ModelSpec) -> dict[str, int]:
    """Output features of a block's linears, by the last part of their names."""
    linears = [path for path in spec.linears if path.startswith(f"{block}.")]
    modules = {path.rpartition(".")[2]: model.get_submodule(path) for path in linears}
    return {leaf: m.out_features for leaf, m in modules.items() if isinstance(m, nn.Linear)}
