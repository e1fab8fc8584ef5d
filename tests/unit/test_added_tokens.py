"""Tokens that are new to a model: one id each, rows of their own, trained alone."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dtune.build import build_trained_model
from dtune.cli import main
from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.config.run import RunConfig
from dtune.errors import ConfigError
from dtune.models.grow import GrownSource
from dtune.models.load import build_model, load_tokenizer, open_weights
from dtune.models.schema import ModelConfig
from dtune.models.sources import ChainedSource, RenamedSource
from dtune.objectives.schema import OBJECTIVES
from dtune.parallel.ranges import fill, fill_buffers
from dtune.parallel.replica import allocate
from dtune.peft.schema import PEFT
from dtune.peft.schema.lora import LoraInit
from dtune.resources import resolve_path
from dtune.types import FlatShard, Message, ModelSpec, PeftMethod, Row
from tests.contracts.small_models import trained_tensors
from tests.distributed.pool import Pool
from tests.distributed.test_engine_curves import Curve, equal, residuals
from tests.integration.train_runs import held_out, read_json, settings
from tests.unit.families import CPU, save_family
from tests.unit.test_models_bnb import KINDS, quantised

NEW = ["<call>", "Zeppelin!", "<end of call>"]
TEXT = "It flies.<call>Zeppelin!x<end of call> It flies."
TOKENS = 1536
"""Of the tokenizer, before any is added."""


@pytest.fixture(scope="module", params=["untied", "tied", "scaled"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with the embedded tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    family = "gemma3" if request.param == "scaled" else "llama"
    tied = request.param != "untied"
    save_family(family, folder, vocab_size=TOKENS, tie_word_embeddings=tied)
    AutoTokenizer.from_pretrained(resolve_path("dtune://tiny")).save_pretrained(folder)
    return folder


def config_of(base: Path, tokens: list[str] | None = None) -> ModelConfig:
    return ModelConfig(path=str(base), added_tokens=NEW if tokens is None else tokens)


def built(base: Path, name: str = "lora", **options: object) -> tuple[nn.Module, PeftMethod]:
    """A model with a method and its weights, on the CPU in fp32."""
    config = config_of(base)
    model, spec = build_model(config, dtype=torch.float32, device=CPU)
    weights = open_weights(config, model, spec, seed=0)
    method = PEFT.config(name)(**options).build()
    method.inject(model, spec)
    stored = RenamedSource(weights, method.stored_name)
    held = method.base(stored)
    source = ChainedSource([method.source(stored, held, 0), held])
    allocate(model, CPU)
    parameters = model.named_parameters()
    fill((FlatShard(n, tuple(p.shape), 0, p.detach().view(-1)) for n, p in parameters), source)
    fill_buffers(model, source)
    return model.eval(), method


def resized(base: Path) -> PreTrainedModel:
    """transformers' own model with rows for the tokens, which nothing here is to read."""
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa").float()
    model.resize_token_embeddings(TOKENS + len(NEW), mean_resizing=False)
    return model.eval()


def own_rows(base: Path) -> set[str]:
    """Names of the rows that are trained: a tied head has none of its own."""
    tied = read_json(base / "config.json")["tie_word_embeddings"]
    return {"model.embed_tokens.rows"} | (set() if tied else {"lm_head.rows"})


def ids_of(base: Path) -> torch.Tensor:
    return torch.tensor([load_tokenizer(config_of(base))(TEXT)["input_ids"]])


def test_each_text_is_one_token_that_decoding_shows(base: Path) -> None:
    tokenizer = load_tokenizer(config_of(base))
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert [i for i in ids if i >= TOKENS] == [TOKENS, TOKENS + 1, TOKENS + 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    turns = (Message("user", "Say it."), Message("assistant", TEXT))
    example = OBJECTIVES.config("sft")().build(tokenizer).render(Row(0, "row", turns))
    for token in range(TOKENS, TOKENS + 3):
        assert example.input_ids.count(token) == example.labels.count(token) == 1
    before = load_tokenizer(config_of(base, []))
    assert before("It flies.")["input_ids"] == tokenizer("It flies.")["input_ids"]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["<call>", "the"], r"has 'the' already"),
        (["<call>", "<call>"], r"names '<call>' twice"),
        (["<call>", " "], "a blank text"),
    ],
)
def test_lists_that_mean_nothing_are_refused(base: Path, tokens: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"model.added_tokens.*{message}"):
        load_tokenizer(config_of(base, tokens))


def grown(base: Path) -> tuple[GrownSource, ModelSpec]:
    config = config_of(base)
    model, spec = build_model(config, dtype=torch.float32, device=CPU)
    source = open_weights(config, model, spec, seed=0)
    assert isinstance(source, GrownSource)
    return source, spec


def test_new_rows_are_the_mean_of_the_stored_rows_however_they_are_read(base: Path) -> None:
    source, spec = grown(base)
    assert spec.added_tokens == range(TOKENS, TOKENS + 3)
    tensors = load_file(base / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        stored = tensors[name] if name in tensors else tensors["model.embed_tokens.weight"]
        wanted = torch.cat((stored, stored.double().mean(0).float().expand(3, -1)))
        assert source.shape(name) == tuple(wanted.shape)
        flat, size = wanted.flatten(), wanted.numel()
        for start, stop in [(0, size), (size - 50, size - 3), (size - 100, size), (5, 9), (7, 7)]:
            assert torch.equal(source.read(name, start, stop), flat[start:stop])


def test_spare_rows_are_used_before_the_model_grows(tmp_path: Path) -> None:
    save_family("llama", tmp_path, vocab_size=TOKENS + 2)
    AutoTokenizer.from_pretrained(resolve_path("dtune://tiny")).save_pretrained(tmp_path)
    model, spec = build_model(config_of(tmp_path), dtype=torch.float32, device=CPU)
    assert spec.added_tokens == range(TOKENS, TOKENS + 3)
    assert spec.grown == {"model.embed_tokens.weight": TOKENS + 2, "lm_head.weight": TOKENS + 2}
    assert model.config.vocab_size == TOKENS + 3
    _, spec = build_model(config_of(tmp_path, NEW[:2]), dtype=torch.float32, device=CPU)
    assert (spec.added_tokens, spec.grown) == (range(TOKENS, TOKENS + 2), {})


METHODS = {"lora": {}, "dora": {}, "pissa": {"init": LoraInit.pissa}}


def trained(base: Path, name: str) -> tuple[nn.Module, PeftMethod]:
    """A model after two large steps."""
    model, method = built(base, "dora" if name == "dora" else "lora", rank=4, **METHODS[name])
    ids = ids_of(base)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, method


def loaded_by_peft(base: Path, folder: Path) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(resized(base), folder, is_trainable=True).eval()


@pytest.mark.parametrize("name", METHODS)
def test_only_rows_of_new_tokens_are_trained(base: Path, tmp_path: Path, name: str) -> None:
    model, method = trained(base, name)
    found = {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
    assert found == own_rows(base)
    ids = ids_of(base)
    model(ids, labels=ids).loss.backward()
    assert all(model.get_parameter(row).grad.abs().sum() > 0 for row in found)
    method.save(trained_tensors(model), str(tmp_path))
    keys = [key for key in load_file(tmp_path / "adapter_model.safetensors") if "lora" not in key]
    assert len(keys) == len(found)
    assert all(key.endswith(".token_adapter.trainable_tokens_delta") for key in keys)


@pytest.mark.parametrize("name", METHODS)
def test_peft_computes_the_same(base: Path, tmp_path: Path, name: str) -> None:
    model, method = trained(base, name)
    method.save(trained_tensors(model), str(tmp_path))
    theirs, ids = loaded_by_peft(base, tmp_path), ids_of(base)
    with torch.no_grad():
        ours, wanted = model(ids).logits, theirs(ids).logits
        hidden = model.model(ids).last_hidden_state
    if name == "pissa":
        # Saved as an update of the whole base: base and update are added in another order.
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
        return
    assert torch.equal(ours[..., :TOKENS], wanted[..., :TOKENS])
    # A sum of 32 products, here in a product of 3 columns and there in one of all columns.
    rows = model.get_output_embeddings().rows.detach()
    limit = 2 * 32 * 2**-24 * (hidden.abs() @ rows.abs().T)
    assert ((ours - wanted)[..., TOKENS:].abs() <= limit).all()
    assert not torch.allclose(ours[..., TOKENS:], built(base)[0](ids).logits[..., TOKENS:], 0.05)


def test_gradients_are_those_of_peft(base: Path, tmp_path: Path) -> None:
    model, method = trained(base, "lora")
    method.save(trained_tensors(model), str(tmp_path))
    theirs, ids = loaded_by_peft(base, tmp_path), ids_of(base)
    for each in (model, theirs):
        each(ids, labels=ids).loss.backward()
    deltas = {n: p.grad for n, p in theirs.named_parameters() if "tokens_delta" in n}
    for row in own_rows(base):
        (wanted,) = [g for n, g in deltas.items() if row.removesuffix(".rows") in n]
        ours = model.get_parameter(row).grad
        # Sums over 20 tokens and the whole vocabulary: 1e-6 of the largest is some ten ulps.
        assert (ours - wanted).abs().max() < 1e-6 * wanted.abs().max()
        assert (1.01 * ours - wanted).abs().max() > 1e-3 * wanted.abs().max()


def test_saved_rows_come_back(base: Path, tmp_path: Path) -> None:
    model, method = built(base)
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.rows").add_(1.0)
    method.save(trained_tensors(model), str(tmp_path))
    source = method.saved(str(tmp_path))
    rows = model.get_parameter("model.embed_tokens.rows").detach()
    assert torch.equal(source.read("model.embed_tokens.rows", 0, rows.numel()), rows.flatten())
    without = config_of(base, [])
    other, spec = build_model(without, dtype=torch.float32, device=CPU)
    method = PEFT.config("lora")().build()
    method.inject(other, spec)
    with pytest.raises(ConfigError, match=r"trainable_token_indices is .*turn model\.added_tokens"):
        method.saved(str(tmp_path))


def run_of(base: Path, *more: str) -> RunConfig:
    given = settings(base / "run", f"model.path={base}", "model.chat_template=same", *more)
    tokens = json.dumps(NEW).replace('"', "'")
    return load_frozen(compose_overrides("train", [*given, f"model.added_tokens={tokens}"]))


def test_what_cannot_train_them_names_what_can(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"peft=ia3 does not train .* peft=lora .* peft=full"):
        build_trained_model(run_of(base, "peft=ia3"), load=False)
    with pytest.raises(ConfigError, match=r"leave the head out of peft\.targets"):
        build_trained_model(run_of(base, "peft=lora", "peft.targets=[head]"), load=False)
    build_trained_model(run_of(base, "peft=full"), load=False)


def test_it_is_said_that_servers_do_not_take_them(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        build_trained_model(run_of(base, "peft=lora"), load=False)
    assert "leave model.added_tokens empty" in caplog.text


def curves(
    pool: Pool, base: Path, *more: str
) -> tuple[Curve, dict[str, torch.Tensor], dict[str, tuple[Curve, dict[str, torch.Tensor]]]]:
    """Curve and rows of one process, and those of engines that cut parameters."""
    tokens = json.dumps(NEW).replace('"', "'")
    given = settings(base / "run", f"model.path={base}", f"model.added_tokens={tokens}")
    given += ["precision=fp32", "peft=lora", "kernels=torch", "schedule.warmup_steps=2", *more]

    def curve(engine: str) -> tuple[Curve, dict[str, torch.Tensor]]:
        case = {"overrides": [*given, f"parallel={engine}"], "first_id": TOKENS, "steps": 6}
        return pool.run("tests.unit.added_token_ranks:curve", **case)[0]

    return *curve("single"), {engine: curve(engine) for engine in ("fsdp", "zero3")}


def test_engines_that_cut_parameters_train_them_as_one_process_does(
    two_ranks: Pool, base: Path
) -> None:
    alone, rows, others = curves(two_ranks, base)
    assert rows.keys() == own_rows(base)
    for points, spread in others.values():
        assert equal(points, alone), residuals(points, alone)
        assert rows.keys() == spread.keys()
        for name, wanted in rows.items():
            # A step moves a number by no more than about the rate, 3e-3.
            assert (spread[name] - wanted).abs().max() < 6 * 3e-3 / 100, name


def test_over_a_checkpoint_of_bitsandbytes(two_ranks: Pool, tmp_path: Path) -> None:
    save_family(
        "llama", tmp_path / "base", vocab_size=TOKENS, hidden_size=64, intermediate_size=128
    )
    folder = quantised(tmp_path / "base", tmp_path / "nf4", KINDS["nf4_double"][0])
    AutoTokenizer.from_pretrained(resolve_path("dtune://tiny")).save_pretrained(folder)
    alone, _, others = curves(two_ranks, folder, "quant=nf4")
    for points, _ in others.values():
        assert equal(points, alone), residuals(points, alone)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_trains_exports_and_evaluates_them(tmp_path: Path, method: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(resolve_path("dtune://tiny"), base)
    rows = tmp_path / "rows.jsonl"
    texts = ({"instruction": "Say it.", "input": "", "output": TEXT} for _ in range(16))
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
    tokens = json.dumps(NEW).replace('"', "'")
    argv = settings(
        tmp_path / "run",
        held_out(tmp_path),
        f"model.path={base}",
        f"model.added_tokens={tokens}",
        f"peft={method}",
        f"data.path={rows}",
        "train.max_steps=6",
        "evaluate.before=true",
    )
    assert main(["train", *argv]) == 0
    exported = tmp_path / "run" / ("adapter" if method == "lora" else "model")
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.convert_tokens_to_ids(NEW) == [1536, 1537, 1538]
    result = read_json(tmp_path / "run" / "result.json")
    assert result["after"]["loss"] != result["before"]["loss"]
    if method == "full":
        assert AutoModelForCausalLM.from_pretrained(exported).vocab_size == TOKENS + 3
        shutil.rmtree(base)
    assert main(["eval", f"run_dir={tmp_path / 'run'}"]) == 0
    scores = read_json(tmp_path / "run" / "eval.json")
    # The whole model is exported in the dtype of its base, fp16: half an ulp of each weight.
    assert scores["loss"] == pytest.approx(result["after"]["loss"], rel=2**-11)
    if method == "lora":
        assert scores["loss"] == result["after"]["loss"]
