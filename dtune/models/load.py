"""From a path to a model on the meta device, its tokenizer, and where its weights come from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dtune.errors import ConfigError
from dtune.models.attention import install_documents, resolve_attention
from dtune.models.bnb import BnbSource, quantized_by_config
from dtune.models.grow import GrownSource, add_tokens, added_ids, grow
from dtune.models.random import RandomSource
from dtune.models.schema import Attention, Init, ModelConfig
from dtune.models.spec import describe
from dtune.models.weights import SafetensorsSource
from dtune.resources import find_folder, resolve_path
from dtune.types import ModelSpec, TensorSource

_SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
# Not every *.safetensors: some repositories hold the same weights once more as "consolidated".
_WEIGHTS = ("model*.safetensors",)
_HUB_ERRORS = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError)


def locate(
    path: str, *, key: str, revision: str = "main", weights: bool = False, code: bool = False
) -> Path:
    """Return the folder of a model or tokenizer, downloading it from the Hub if it is a Hub name.

    Args:
        path: A folder, ``dtune://NAME``, or a Hub name.
        key: Config key of ``path``, for the error.
        revision: Branch, tag or commit on the Hub.
        weights: Download the safetensors files of Hugging Face's layout as well.
        code: Download Python files as well.

    Raises:
        ConfigError: There is no such folder and no such name.
    """
    folder = find_folder(path, key)
    if folder is not None:
        return folder
    patterns = [*_SMALL_FILES, *(_WEIGHTS if weights else ()), *(["*.py"] if code else [])]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except _HUB_ERRORS as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{key}={path}: there is no such folder, and the Hub did not give it at revision "
            f"{revision}: {reason}"
        ) from error


def model_folder(config: ModelConfig, *, weights: bool) -> Path:
    """Return the folder of the configured model; ConfigError if there is none."""
    return locate(
        config.path,
        key="model.path",
        revision=config.revision,
        weights=weights,
        code=config.trust_remote_code,
    )


def _architecture(config: ModelConfig, folder: Path) -> PretrainedConfig:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.path={config.path}: {folder} has no config.json")
    try:
        architecture = AutoConfig.from_pretrained(
            folder, trust_remote_code=config.trust_remote_code
        )
    except (ValueError, OSError, KeyError) as error:
        raise ConfigError(f"model.path={config.path}: {error}") from error
    return cast(PretrainedConfig, architecture)


def _read_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """Give the model its own end tokens and sampling settings, where the folder states them."""
    file = folder / "generation_config.json"
    if not isinstance(model, GenerationMixin) or not file.is_file():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder)
    except (ValueError, OSError, TypeError) as error:
        raise ConfigError(f"model.path: {file} cannot be read: {error}") from error


def _has_softcap(architecture: PretrainedConfig) -> bool:
    text = architecture.get_text_config().to_dict()
    return text.get("attn_logit_softcapping") is not None


def _fill_buffers(model: PreTrainedModel) -> None:
    """Compute the initial values of buffers (rotary frequencies, scales), on the CPU.

    Those that a checkpoint holds are read with the weights, later. All were built on the meta
    device. transformers recomputes them in ``_init_weights`` of the nearest model around the
    module, which leaves parameters on meta as they are.
    """
    owner: dict[str, PreTrainedModel] = {}
    for path, module in model.named_modules():
        owner[path] = (
            module if isinstance(module, PreTrainedModel) else owner[path.rpartition(".")[0]]
        )
        names = [name for name, _ in module.named_buffers(recurse=False)]
        if not names:
            continue
        for name in names:
            buffer = module.get_buffer(name)
            empty = torch.empty_like(buffer, device="cpu")
            persistent = name not in module._non_persistent_buffers_set
            module.register_buffer(name, empty, persistent=persistent)
        owner[path]._init_weights(module)


def build_model(
    config: ModelConfig, *, dtype: torch.dtype, device: torch.device | None = None
) -> tuple[PreTrainedModel, ModelSpec]:
    """Build the model with parameters of ``dtype`` on meta, and say what it consists of.

    Buffers are real and on the CPU. No weight is read.

    Args:
        config: Which model.
        dtype: Storage dtype of the parameters; the engine makes trained ones fp32.
        device: Where it will compute, which decides the attention; None: a GPU where there is one.

    Raises:
        ConfigError: The path, the architecture or the attention cannot be used.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = model_folder(config, weights=False)
    architecture = _architecture(config, folder)
    # Building sets it to the dtype that is built with; an export is written in the stored one.
    stored_dtype = architecture.dtype
    assert not isinstance(stored_dtype, str), "transformers parses the name"
    attention = resolve_attention(
        config.attention,
        device,
        softcap=_has_softcap(architecture),
        half=dtype != torch.float32,
    )
    raw = _take_quantization(architecture)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                architecture,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=config.trust_remote_code,
            )
    except ValueError as error:
        key = "model.path" if config.attention is Attention.auto else "model.attention"
        raise ConfigError(f"{key}: {config.path} cannot be built: {error}") from error
    model.tie_weights()
    _read_generation_config(model, folder)
    _fill_buffers(model)
    install_documents(model)
    spec = dataclasses.replace(describe(model, config.path), stored_dtype=stored_dtype)
    if raw is not None and config.init is Init.pretrained:
        stored = quantized_by_config(raw, model, spec.linears, path=config.path)
        spec = dataclasses.replace(spec, quantized=stored)
    if config.added_tokens:
        spec = grow(model, spec, added_ids(load_tokenizer(config), config.added_tokens))
    return model, spec


def _take_quantization(architecture: PretrainedConfig) -> dict[str, Any] | None:
    """Remove ``quantization_config``, which is not true of what is built and exported; return it.

    None where the checkpoint is not quantised.
    """
    raw: dict[str, Any] | None = architecture.to_dict().get("quantization_config")
    if raw is not None:
        del architecture.quantization_config
    return raw


def open_weights(
    config: ModelConfig, model: nn.Module, spec: ModelSpec, *, seed: int
) -> TensorSource:
    """Return where the weights of a model that ``build_model`` made come from.

    To be called before a method changes the model: every parameter is checked for its name and
    shape, and ConfigError names the file and tensor that is missing. Reads no values.
    """
    if config.init is Init.random:
        return RandomSource(spec.config, seed)
    folder = model_folder(config, weights=True)
    assert isinstance(model, PreTrainedModel)
    source: TensorSource
    if spec.quantized is None:
        source = SafetensorsSource(folder, model, spec)
    else:
        source = BnbSource(folder, model, spec)
    if not spec.grown:
        return source
    shapes = {name: tuple(model.get_parameter(name).shape) for name in spec.grown}
    return GrownSource(source, shapes)


def quantized_by_files(source: TensorSource, spec: ModelSpec) -> ModelSpec:
    """``spec`` with what the files themselves say of quantised linears, beyond config.json."""
    if isinstance(source, GrownSource):
        source = source.source
    if not isinstance(source, BnbSource):
        return spec
    return dataclasses.replace(spec, quantized=source.quantized)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with ``model.chat_template`` and ``model.added_tokens`` if given."""
    same = config.tokenizer == "same"
    path, key = (config.path, "model.path") if same else (config.tokenizer, "model.tokenizer")
    folder = locate(path, key=key, revision=config.revision if same else "main")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=config.trust_remote_code
        )
    except (ValueError, OSError, KeyError) as error:
        raise ConfigError(
            f"{key}={path}: no tokenizer can be loaded from {folder}: {error}; set model.tokenizer"
        ) from error
    if config.chat_template != "same":
        template = Path(resolve_path(config.chat_template)).expanduser()
        if not template.is_file():
            raise ConfigError(f"model.chat_template={config.chat_template}: no such file")
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    if config.added_tokens:
        add_tokens(tokenizer, config.added_tokens)
    return cast(PreTrainedTokenizerBase, tokenizer)
