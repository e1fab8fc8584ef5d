"""Checkpoints that bitsandbytes has quantised are read as they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from dtune.build import BuiltModel, build_trained_model, prepare_engine, weights_of
from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.errors import ConfigError
from dtune.models.bnb import BnbSource
from dtune.models.load import build_model, open_weights, quantized_by_files
from dtune.models.schema import Init, ModelConfig
from dtune.quant.schema.none import NoneConfig
from dtune.quant.stored import check_stored_base, check_stored_linears, check_stored_settings
from dtune.runtime.world import World
from dtune.types import Engine, ModelSpec
from tests.unit.families import CPU, save_family

DOWN = "model.layers.1.mlp.down_proj"
UP = "model.layers.0.mlp.up_proj"
# Rows of whole blocks: bitsandbytes' CPU code reads others wrongly.
SIZES = {"hidden_size": 64, "intermediate_size": 128}
FOUR: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
KINDS: dict[str, tuple[dict[str, Any], dict[str, str | int | bool]]] = {
    "nf4": (
        {**FOUR, "bnb_4bit_quant_type": "nf4"},
        {"name": "nf4", "double": False, "block_size": 64},
    ),
    "nf4_double": (
        {**FOUR, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"name": "nf4", "double": True, "block_size": 64},
    ),
    "fp4": (
        {**FOUR, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16},
        {"name": "fp4", "double": False, "block_size": 64},
    ),
    "int8": ({"load_in_8bit": True}, {"name": "int8"}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_family("llama", folder, **SIZES)
    return folder


def quantised(base: Path, folder: Path, options: Mapping[str, Any], *, shard: str = "5GB") -> Path:
    """Write what transformers saves of a model that bitsandbytes has quantised."""
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32, device_map=CPU
    )
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def checkpoint(base: Path, kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantised(base, tmp_path_factory.mktemp(kind), KINDS[kind][0])


@pytest.fixture(scope="module")
def nf4(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {**KINDS["nf4_double"][0], "llm_int8_skip_modules": ["lm_head", DOWN]}
    return quantised(base, tmp_path_factory.mktemp("skipped"), options)


def theirs(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map=CPU, attn_implementation="eager"
    ).eval()


def opened(folder: Path) -> tuple[BnbSource, ModelSpec]:
    config = ModelConfig(path=str(folder))
    model, spec = build_model(config, dtype=torch.float32, device=CPU)
    source = open_weights(config, model, spec, seed=0)
    assert isinstance(source, BnbSource)
    return source, quantized_by_files(source, spec)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def their_weight(model: PreTrainedModel, path: str) -> torch.Tensor:
    """The weight of a quantised linear, as bitsandbytes dequantises it."""
    linear = model.get_submodule(path)
    if isinstance(linear, bnb.nn.Linear8bitLt):
        return bnb.functional.int8_vectorwise_dequant(linear.weight.data, linear.weight.SCB)
    assert isinstance(linear, bnb.nn.Linear4bit)
    return bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def whole(source: BnbSource, name: str) -> torch.Tensor:
    return source.read(name, 0, torch.Size(source.shape(name)).numel())


def test_weights_are_those_of_bitsandbytes_bit_for_bit(checkpoint: Path) -> None:
    source, spec = opened(checkpoint)
    model = theirs(checkpoint)
    assert spec.quantized is not None
    assert len(spec.quantized.linears) == 14
    for path in spec.quantized.linears:
        wanted = their_weight(model, path)
        assert source.shape(f"{path}.weight") == tuple(wanted.shape)
        flat = wanted.flatten()
        for start, stop in [(0, len(flat)), (1, 2), (63, 65), (777, len(flat) - 3), (5, 5)]:
            assert torch.equal(source.read(f"{path}.weight", start, stop), flat[start:stop])
    norm = "model.norm.weight"
    assert torch.equal(whole(source, norm), model.get_parameter(norm).detach())


def test_bytes_are_those_of_the_files(checkpoint: Path, kind: str) -> None:
    source, _ = opened(checkpoint)
    tensors = stored(checkpoint)
    scales = f"{UP}.SCB" if kind == "int8" else f"{UP}.weight.absmax"
    wanted = {"codes": tensors[f"{UP}.weight"], "absmax": tensors[scales]}
    if kind == "nf4_double":
        wanted["absmax2"] = tensors[f"{UP}.weight.nested_absmax"]
        state = tensors[f"{UP}.weight.quant_state.bitsandbytes__nf4"]
        offset = json.loads(bytes(state.tolist()))["nested_offset"]
        wanted["offset"] = torch.tensor([offset], dtype=torch.float32)
    for part in ("codes", "absmax", "absmax2", "offset"):
        assert (f"{UP}.{part}" in source) is (part in wanted), part
    for part, tensor in wanted.items():
        flat = as_bytes(tensor)
        assert source.shape(f"{UP}.{part}") == (len(flat),)
        for start, stop in [(0, len(flat)), (1, len(flat) - 1), (2, 3), (3, 3)]:
            assert torch.equal(source.read(f"{UP}.{part}", start, stop), flat[start:stop])


def test_facts_are_those_that_quantised_it(checkpoint: Path, kind: str) -> None:
    _, spec = opened(checkpoint)
    assert spec.quantized is not None
    assert spec.quantized.settings == KINDS[kind][1]
    config = ModelConfig(path=str(checkpoint))
    _, planned = build_model(config, dtype=torch.float32, device=CPU)
    assert planned.quantized == spec.quantized, "config.json says what the files say"
    assert "quantization_config" not in spec.config.to_dict()


def test_linears_that_are_stored_as_floats_stay_so(nf4: Path) -> None:
    source, spec = opened(nf4)
    assert spec.quantized is not None
    assert spec.linears.keys() - spec.quantized.linears == {DOWN, "lm_head"}
    weight = stored(nf4)[f"{DOWN}.weight"]
    assert torch.equal(whole(source, f"{DOWN}.weight"), weight.flatten())
    assert f"{DOWN}.codes" not in source


def test_files_decide_where_config_json_says_otherwise(nf4: Path, tmp_path: Path) -> None:
    shutil.copytree(nf4, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    raw["quantization_config"]["llm_int8_skip_modules"] = None
    file.write_text(json.dumps(raw))
    _, spec = opened(tmp_path)
    assert spec.quantized is not None
    assert DOWN not in spec.quantized.linears


def test_several_files(base: Path, nf4: Path, tmp_path: Path) -> None:
    options = {**KINDS["nf4_double"][0], "llm_int8_skip_modules": ["lm_head", DOWN]}
    quantised(base, tmp_path, options, shard="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    several, spec = opened(tmp_path)
    one, same = opened(nf4)
    assert spec.quantized == same.quantized
    for path in same.linears:
        assert torch.equal(whole(several, f"{path}.weight"), whole(one, f"{path}.weight"))


def test_rows_that_end_inside_of_a_block(tmp_path: Path) -> None:
    save_family("llama", tmp_path / "base", hidden_size=72, intermediate_size=100)
    source, _ = opened(quantised(tmp_path / "base", tmp_path / "nf4", KINDS["nf4_double"][0]))
    tensors = stored(tmp_path / "nf4")
    codes = tensors[f"{UP}.weight"].view(-1).long()
    table = tensors[f"{UP}.weight.quant_map"]
    values = table[torch.stack((codes >> 4, codes & 15), 1).view(-1)]
    state = json.loads(bytes(tensors[f"{UP}.weight.quant_state.bitsandbytes__nf4"].tolist()))
    scales = tensors[f"{UP}.weight.nested_quant_map"][tensors[f"{UP}.weight.absmax"].long()]
    scales = scales * tensors[f"{UP}.weight.nested_absmax"] + torch.tensor(state["nested_offset"])
    wanted = values * scales.repeat_interleave(64)[: len(values)]
    assert len(values) == 7200, "not whole blocks"
    assert torch.equal(whole(source, f"{UP}.weight"), wanted)
    assert torch.equal(source.read(f"{UP}.weight", 7000, 7199), wanted[7000:7199])


def edited(folder: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(folder, target, dirs_exist_ok=True)
    tensors = stored(target)
    edit(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, target / "model.safetensors")
    return target


def change(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = function(tensors[name].clone())

    return edit


def remove(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


DAMAGE = {
    "another table": (change(f"{UP}.weight.quant_map", lambda t: t * 0.99), "quant_map is not"),
    "another table of scales": (
        change(f"{UP}.weight.nested_quant_map", lambda t: t.flip(0)),
        "nested_quant_map is not",
    ),
    "fewer codes": (change(f"{UP}.weight", lambda t: t[:-1]), "4095 bytes.* wants 4096"),
    "fewer scales": (change(f"{UP}.weight.absmax", lambda t: t[:-1]), "127 bytes.* wants 128"),
    "no scales": (remove(f"{UP}.weight.absmax"), r"no tensor .*up_proj\.weight\.absmax"),
    "no state": (
        remove(f"{UP}.weight.quant_state.bitsandbytes__nf4"),
        r"up_proj\.weight in .* has shape \[4096, 1\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_codes_do_not_mean_is_refused(nf4: Path, tmp_path: Path, damage: str) -> None:
    edit, message = DAMAGE[damage]
    edited(nf4, tmp_path, edit)
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path)


def test_eight_bits_laid_out_for_a_gpu_or_without_scales_are_refused(
    base: Path, tmp_path: Path
) -> None:
    folder = quantised(base, tmp_path / "int8", KINDS["int8"][0])
    turing = change(f"{UP}.weight_format", lambda t: t + 2)
    with pytest.raises(ConfigError, match="laid out for one GPU"):
        opened(edited(folder, tmp_path / "turing", turing))
    with pytest.raises(ConfigError, match=r"up_proj\.weight in .* is I8, which is no float"):
        opened(edited(folder, tmp_path / "bare", remove(f"{UP}.SCB")))


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4"])
def test_other_quantisers_are_refused(base: Path, tmp_path: Path, method: str) -> None:
    raw = json.loads((base / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=f"quantised by {method}; .* Give the original model"):
        build_model(ModelConfig(path=str(tmp_path)), dtype=torch.float32, device=CPU)


def test_random_weights_have_no_stored_bytes(nf4: Path) -> None:
    config = ModelConfig(path=str(nf4), init=Init.random)
    _, spec = build_model(config, dtype=torch.float32, device=CPU)
    assert spec.quantized is None


def test_no_quantisation_is_told_which_settings_to_use(nf4: Path) -> None:
    _, spec = opened(nf4)
    wanted = "set quant=nf4 quant.double=true quant.block_size=64, or give the model as it was"
    with pytest.raises(ConfigError, match=wanted):
        check_stored_settings(NoneConfig(), spec)


def test_linears_that_differ_are_named(nf4: Path) -> None:
    config = ModelConfig(path=str(nf4))
    model, spec = build_model(config, dtype=torch.float32, device=CPU)
    with pytest.raises(ConfigError, match=r"holds .* quantised .*leave it out of quant\.skip"):
        check_stored_linears(model, spec, lambda name: name)
    assert spec.quantized is not None
    for path in {*spec.quantized.linears, DOWN}:
        model.get_submodule(path).register_parameter(
            "codes", torch.nn.Parameter(torch.empty(0, device="meta"))
        )
    with pytest.raises(ConfigError, match=rf"put {DOWN} into quant\.skip"):
        check_stored_linears(model, spec, lambda name: name)
    del model.get_submodule(DOWN)._parameters["codes"]
    check_stored_linears(model, spec, lambda name: name)


def test_a_method_that_changes_the_base_is_refused(nf4: Path) -> None:
    _, spec = opened(nf4)
    check_stored_base(spec, changed=False)
    with pytest.raises(ConfigError, match="quantised anew"):
        check_stored_base(spec, changed=True)


def test_linears_of_two_kinds_are_refused(base: Path, nf4: Path, tmp_path: Path) -> None:
    single = stored(quantised(base, tmp_path / "single", KINDS["nf4"][0]))

    def mix(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(UP)]:
            del tensors[name]
        tensors.update({name: t for name, t in single.items() if name.startswith(UP)})

    with pytest.raises(ConfigError, match="one kind for all linears"):
        opened(edited(nf4, tmp_path / "mixed", mix))


def built(folder: Path, world: World, *more: str) -> tuple[Engine, BuiltModel]:
    """A run over a checkpoint, in fp32 on one process, before its first step."""
    given = [f"run_dir={folder / 'run'}", f"model.path={folder}", "model.attention=eager"]
    given += ["precision=fp32", "kernels=torch", "peft=lora", *more]
    run = load_frozen(compose_overrides("train", given))
    parts = build_trained_model(run, load=True, device=CPU)
    engine = run.parallel.build(world, run.precision.name)
    prepare_engine(engine, parts, run, weights_of(parts, seed=1, start=None), 30)
    engine.model.eval()
    return engine, parts


def as_overrides(settings: Mapping[str, str | int | bool]) -> list[str]:
    return ["quant" + ("" if k == "name" else f".{k}") + f"={v}" for k, v in settings.items()]


def test_a_run_computes_with_the_stored_bytes(checkpoint: Path, kind: str, world: World) -> None:
    engine, parts = built(checkpoint, world, *as_overrides(KINDS[kind][1]))
    assert sum(parts.quantized.values()) == 14
    tensors = stored(checkpoint)
    codes = engine.module.get_parameter(f"{UP}.base.codes")
    assert torch.equal(codes, as_bytes(tensors[f"{UP}.weight"]))
    # Without dropout; in eval mode its code for CPUs with bf16 rounds the products to bf16.
    model = theirs(checkpoint).train()
    if kind == "int8":
        # LLM.int8 rounds activations to 8 bits too, dtune does not.
        model = model.dequantize()
    ids = torch.arange(24).reshape(2, 12) * 5 % 97
    with torch.no_grad():
        wanted = model(ids).logits
        # Both multiply by the same fp32 weights.
        assert torch.equal(engine.model(ids).logits, wanted)
        codes.add_(1)
        assert not torch.equal(engine.model(ids).logits, wanted)


def test_a_run_keeps_floats_as_floats(nf4: Path, world: World) -> None:
    engine, parts = built(nf4, world, "quant=nf4")
    assert sum(parts.quantized.values()) == 13
    weight = engine.module.get_parameter(f"{DOWN}.base.weight")
    assert torch.equal(weight, stored(nf4)[f"{DOWN}.weight"])


@pytest.mark.parametrize("more", [["quant=none"], ["quant=fp4"], ["quant=int8"]], ids=str)
def test_another_quantisation_than_the_stored_is_refused(
    nf4: Path, world: World, more: list[str]
) -> None:
    with pytest.raises(ConfigError, match=r"set quant=nf4 quant\.double=true"):
        built(nf4, world, *more)


def test_bytes_that_would_be_made_anew_are_refused(nf4: Path, world: World) -> None:
    with pytest.raises(ConfigError, match=r"set peft\.init=default, or give the model as it was"):
        built(nf4, world, "quant=nf4", "peft.init=pissa")
    with pytest.raises(ConfigError, match=r"leave it out of quant\.skip"):
        built(nf4, world, "quant=nf4", "quant.skip=[up_proj]")
