"""Settings of the comparison with other frameworks, and what follows from them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.peers.contestants import MODULES, find
from benchmarks.peers.contestants.torchtune_lora import adapter_state
from benchmarks.peers.inputs import END, SHAPES, draw_tokens, flops_per_token
from benchmarks.peers.options import SETTINGS, parse
from benchmarks.peers.work import Entry, missing, read_entry
from dtune.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("model=tinny", "did you mean tiny"),
        ("model=", "model is empty"),
        ("peers=dtune,hf", "peers=hf is not one of"),
        ("round=3", "did you mean rounds"),
        ("rounds=three", "'three' is no int"),
        ("rounds=0", "rounds=0 must be at least 1"),
        ("rounds", "written key=value"),
        ("out=table.md", "end it in .jsonl"),
        ("documents=3", "length=512 cannot be split into documents=3"),
    ],
)
def test_a_wrong_setting_is_named(argument: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(["length=512", argument])
    assert said in str(error.value)


def test_dtune_takes_part_always_and_comes_first() -> None:
    assert parse(["peers=trl,hf-peft"]).contestants == ["dtune", "hf-peft", "trl"]


def test_a_gpu_gets_bf16_and_long_rows_and_a_cpu_neither(tmp_path: Path) -> None:
    options = parse(["threads=1"])
    on_gpu = options.work("tiny", tmp_path, has_gpu=True)
    on_cpu = options.work("tiny", tmp_path, has_gpu=False)
    assert (on_gpu.device, on_gpu.precision, on_gpu.length) == ("cuda", "bf16", 4096)
    assert (on_cpu.device, on_cpu.precision, on_cpu.length) == ("cpu", "fp32", 512)


def test_an_entry_is_read_as_it_was_written(tmp_path: Path) -> None:
    work = parse([]).work("tiny", tmp_path, has_gpu=False)
    entry = Entry("trl", SETTINGS["recompute"], work)
    entry.write(tmp_path / "entry.json")
    assert read_entry(tmp_path / "entry.json") == entry


def test_the_settings_of_a_result_do_not_depend_on_the_folder(tmp_path: Path) -> None:
    entries = [
        Entry("trl", SETTINGS["plain"], parse([]).work("tiny", tmp_path / name, has_gpu=False))
        for name in "ab"
    ]
    assert entries[0].settings() == entries[1].settings()


def test_tokens_are_the_same_each_time_and_end_every_document(tmp_path: Path) -> None:
    work = parse(["length=64", "documents=4"]).work("tiny", tmp_path, has_gpu=False)
    tokens = draw_tokens(work, 1536)
    assert np.array_equal(tokens, draw_tokens(work, 1536))
    assert tokens.shape == (work.rows, 64)
    assert (tokens.reshape(work.rows, 4, 16)[:, :, -1] == END).all()
    assert len(np.unique(tokens)) > 20


@pytest.mark.parametrize("name", MODULES)
def test_a_contestant_says_whether_it_can_run_without_importing_anything_heavy(
    name: str, tmp_path: Path
) -> None:
    contestant = find(name)
    work = parse([]).work("tiny", tmp_path, has_gpu=False)
    assert contestant.TITLE
    assert contestant.PACKAGES
    assert isinstance(contestant.problem(work), str)
    assert SETTINGS["plain"] in contestant.settings(work)
    assert SETTINGS["recompute"] in contestant.settings(work)


@pytest.mark.parametrize("name", ["liger", "unsloth", "axolotl"])
def test_kernels_of_triton_are_refused_on_a_cpu_with_the_reason(name: str, tmp_path: Path) -> None:
    work = parse([]).work("tiny", tmp_path, has_gpu=False)
    assert "GPU" in find(name).problem(work) or "not installed" in find(name).problem(work)


def test_what_is_not_installed_is_named() -> None:
    assert missing("torch", "no_such_package") == "not installed: no_such_package"
    assert missing("torch") == ""


@pytest.mark.parametrize(
    ("model", "low", "high"),
    [
        ("random50m", 45e6, 60e6),
        ("llama1b", 4 * 1.2e9, 4 * 1.3e9),
        ("llama8b", 4 * 7.9e9, 4 * 8.2e9),
    ],
)
def test_a_shape_is_as_large_as_its_name(model: str, low: float, high: float) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[model]))
    assert low < 4 * sum(p.numel() for p in built.parameters()) < high


def test_flops_are_those_of_the_models_matrices(tmp_path: Path) -> None:
    """Counted once more from the model itself, with the adapter of peft in place."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    from benchmarks.peers.work import TARGETS

    work = parse([]).work("random50m", tmp_path, has_gpu=False)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES["random50m"]))
        lora = LoraConfig(r=work.rank, target_modules=list(TARGETS))
        model = get_peft_model(base, lora)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad and p.ndim == 2)
    attention = 6 * 6 * 384 * work.length
    # The first token of a row is predicted by none.
    head = 4 * base.get_output_embeddings().weight.numel() / work.length
    assert flops_per_token(work) == 4 * frozen + 6 * trained + attention - head


def test_transformers_waits_until_who_changes_it_has_been_imported() -> None:
    code = (
        "import sys\n"
        "from benchmarks.peers.contestants import MODULES, find\n"
        "from benchmarks.peers.worker import main\n"
        "assert [find(name).FIRST for name in MODULES].count(('unsloth',)) == 1\n"
        "sys.exit(str({'transformers', 'peft'} & set(sys.modules) or ''))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.strip() == ""


def test_an_adapter_is_turned_into_torchtunes_order_of_features() -> None:
    """A head of four features: the halves (0, 1) and (2, 3) become the pairs (0, 2) and (1, 3)."""
    shape = {"num_attention_heads": 2, "num_key_value_heads": 1}
    prefix = "base_model.model.model.layers.3"
    rows = torch.arange(8.0)[:, None]
    turned = adapter_state(
        {
            f"{prefix}.self_attn.q_proj.lora_B.weight": rows,
            f"{prefix}.self_attn.k_proj.lora_B.weight": rows[:4],
            f"{prefix}.self_attn.v_proj.lora_B.weight": rows[:4],
            f"{prefix}.self_attn.q_proj.lora_A.weight": rows,
        },
        shape,
    )
    name = "layers.3.attn"
    assert turned[f"{name}.q_proj.lora_b.weight"].flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert turned[f"{name}.k_proj.lora_b.weight"].flatten().tolist() == [0, 2, 1, 3]
    assert turned[f"{name}.v_proj.lora_b.weight"].flatten().tolist() == [0, 1, 2, 3]
    assert turned[f"{name}.q_proj.lora_a.weight"].flatten().tolist() == list(range(8))
