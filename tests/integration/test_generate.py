"""``dtune generate``: what is asked, what answers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoTokenizer

from dtune.cli import main
from tests.integration.trained_runs import (
    BASE,
    base_model,
    read_rows,
    save_adapter,
    train_run,
    write_rows,
)

QUESTIONS = ["Where does Mira live?", "Count the letters of forest.", "Add 1 and 2.", "Hello."]
ADAPTERS = {
    "lora": peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]),
    "wide": peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"),
    "ia3": peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_run(tmp_path_factory.mktemp("run"), "peft=lora")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    for number, (name, config) in enumerate(ADAPTERS.items()):
        save_adapter(folder / name, config, seed=number)
    return {name: folder / name for name in ADAPTERS}


def said_by(model: Any, question: str, *, tokens: int = 12) -> str:
    """The greedy answer by transformers alone, through the template by itself."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
        )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def generate(folder: Path, *argv: str) -> list[dict[str, Any]]:
    out = folder / "out.jsonl"
    assert main(["generate", f"out={out}", "max_new_tokens=12", *argv]) == 0
    return read_rows(out)


def test_answers_are_those_of_peft_and_transformers_in_order(run: Path, tmp_path: Path) -> None:
    rows = [{"prompt": question} for question in QUESTIONS]
    found = generate(
        tmp_path, f"run_dir={run}", f"prompts={write_rows(tmp_path / 'p.jsonl', rows)}"
    )
    model = peft.PeftModel.from_pretrained(base_model(), run / "adapter").eval()
    assert [row["answer"] for row in found] == [said_by(model, text) for text in QUESTIONS]
    assert [row["number"] for row in found] == [0, 1, 2, 3]
    # The base says something else, so that an adapter that was not loaded would be noticed.
    assert [row["answer"] for row in found] != [said_by(base_model(), text) for text in QUESTIONS]


def test_every_format_asks_the_same_and_an_answer_is_not_shown(run: Path, tmp_path: Path) -> None:
    text = QUESTIONS[0]
    turn = {"role": "user", "content": text}
    rows: list[dict[str, Any]] = [
        {"prompt": text},
        {"prompt": text, "completion": "In Dorn."},
        {"instruction": text},
        {"instruction": text, "input": "", "output": "In Dorn."},
        {"messages": [turn]},
        {"messages": [turn, {"role": "assistant", "content": "In Dorn."}]},
        {"conversations": [{"from": "human", "value": text}]},
        {"text": text},
    ]
    prompts = write_rows(tmp_path / "p.jsonl", rows)
    found = generate(tmp_path, f"run_dir={run}", f"prompts={prompts}")
    assert len({row["answer"] for row in found}) == 1
    assert [row.get("expected") for row in found] == [
        None, "In Dorn.", None, "In Dorn.", None, "In Dorn.", None, None
    ]  # fmt: skip
    (tmp_path / "p.txt").write_text(f"{text}\n\nAdd 1 and 2.\n")
    lines = generate(tmp_path, f"run_dir={run}", f"prompts={tmp_path / 'p.txt'}")
    assert [row["prompt"] for row in lines] == [text, "Add 1 and 2."]
    assert lines[0]["answer"] == found[0]["answer"]


def test_a_run_on_plain_text_goes_on_with_the_text(tmp_path: Path) -> None:
    run = train_run(
        tmp_path, "objective=pretrain", "data=text", "data.path=dtune://corpus",
        "data.eval_path=none", "data.on_long_row=truncate",
    )  # fmt: skip
    (tmp_path / "p.txt").write_text("Mira lives in\n")
    found = generate(tmp_path, f"run_dir={run}", f"prompts={tmp_path / 'p.txt'}")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ids = tokenizer("Mira lives in", return_tensors="pt")["input_ids"]
    model = peft.PeftModel.from_pretrained(base_model(), run / "adapter").eval()
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
        )
    said = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert found[0]["answer"] == said


def test_what_is_drawn_depends_on_the_seed_and_not_on_the_batch(run: Path, tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": text} for text in QUESTIONS])
    drawn = ["temperature=1.5", "top_p=0.95", f"run_dir={run}", f"prompts={prompts}"]
    one = generate(tmp_path, *drawn, "batch_size=4")
    assert one == generate(tmp_path, *drawn, "batch_size=1")
    assert one != generate(tmp_path, *drawn, "seed=2")


def test_rows_are_answered_by_the_adapter_they_name(
    adapters: dict[str, Path], tmp_path: Path
) -> None:
    # Each twice and mixed, so that every one is put on and taken off again.
    names = [*adapters, "none", *reversed(adapters)]
    rows = [{"prompt": QUESTIONS[2], "adapter": name} for name in names]
    prompts = write_rows(tmp_path / "p.jsonl", [*rows, {"prompt": QUESTIONS[2]}])
    given = [f"adapters.{name}={folder}" for name, folder in adapters.items()]
    found = generate(tmp_path, "model=tiny", f"prompts={prompts}", *given)
    expected = {
        name: said_by(peft.PeftModel.from_pretrained(base_model(), folder).eval(), QUESTIONS[2])
        for name, folder in adapters.items()
    }
    expected["none"] = said_by(base_model(), QUESTIONS[2])
    # One that names none is answered by the first that is given.
    named = [*names, next(iter(adapters))]
    assert [row["adapter"] for row in found] == named
    assert [row["answer"] for row in found] == [expected[name] for name in named]
    assert len(set(expected.values())) > 2


def test_the_adapter_of_a_run_is_one_of_several(
    run: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    rows = [{"prompt": QUESTIONS[0], "adapter": name} for name in ("ia3", "run", "none")]
    prompts = f"prompts={write_rows(tmp_path / 'p.jsonl', rows)}"
    found = generate(tmp_path, f"run_dir={run}", f"adapters.ia3={adapters['ia3']}", prompts)
    unnamed = write_rows(tmp_path / "q.jsonl", [{"prompt": QUESTIONS[0]}])
    alone = generate(tmp_path, f"run_dir={run}", f"prompts={unnamed}")
    assert found[1]["answer"] == alone[0]["answer"]
    assert found[2]["answer"] == said_by(base_model(), QUESTIONS[0])


WRONG = [
    (["prompts=PROMPTS", "max_new_token=3"], "did you mean max_new_tokens?"),
    (["prompts=PROMPTS", "optim.lr=1"], "trains nothing and runs in one process: leave optim.lr=1"),
    (["prompts=PROMPTS", "parallel=ddp"], "leave parallel=ddp out"),
    (["prompts=PROMPTS", "temperature=-1"], "temperature=-1.0 must be 0"),
    (["prompts=PROMPTS", "top_p=0.5"], "set temperature=1"),
    (["prompts=PROMPTS", "top_p=half"], "top_p"),
    (["prompts=PROMPTS", "batch_size=0"], "batch_size=0 must be at least 1"),
    (["prompts=PROMPTS", "max_new_tokens=512"], "more than the 512 positions of the model"),
    (["prompts=nowhere.jsonl"], "prompts=nowhere.jsonl: there is no such file"),
    ([], "prompts names the file of prompts"),
    (["prompts=PROMPTS", "adapters.a=nowhere"], "adapters.a=nowhere: there is no such folder"),
    (["prompts=PROMPTS", "adapters.a=LORA", "adapters.a=IA3"], "adapters.a is given twice"),
    (["prompts=PROMPTS", "adapters.none=LORA"], "none means the base alone"),
    (["prompts=PROMPTS", "adapters=LORA"], "give each a name of its own"),
    (["prompts=PROMPTS", "adapters.a=CUT"], "it was cut short or damaged"),
    (["prompts=PROMPTS", "adapters.a=LORA", "model.path=WIDER"], "was trained on"),
    (["prompts=NAMES", "adapters.lora=LORA"], "there is no adapter loar; did you mean lora?"),
    (["prompts=NAMES"], "names the adapter loar, but none is given"),
    (["prompts=BAD"], "expected one of the columns messages, conversations"),
    (["prompts=PROMPTS", "export=best"], "set run_dir as well"),
]


@pytest.fixture(scope="module")
def places(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the words in capitals stand for."""
    folder = tmp_path_factory.mktemp("places")
    wider = base_model()
    wider.config.intermediate_size = 256
    wider.config.hidden_size = 64
    wider.config.head_dim = 16
    type(wider)(wider.config).save_pretrained(folder / "wider")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder / "wider")
    cut = folder / "cut"
    cut.mkdir()
    (cut / "adapter_config.json").write_bytes(
        (adapters["lora"] / "adapter_config.json").read_bytes()
    )
    whole = (adapters["lora"] / "adapter_model.safetensors").read_bytes()
    (cut / "adapter_model.safetensors").write_bytes(whole[:-10])
    return {
        "PROMPTS": write_rows(folder / "p.jsonl", [{"prompt": "Hello."}]),
        "NAMES": write_rows(folder / "names.jsonl", [{"prompt": "Hello.", "adapter": "loar"}]),
        "BAD": write_rows(folder / "bad.jsonl", [{"question": "Hello."}]),
        "LORA": adapters["lora"],
        "IA3": adapters["ia3"],
        "CUT": cut,
        "WIDER": folder / "wider",
    }


@pytest.mark.parametrize(("argv", "said"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_said_before_weights_are_read(
    argv: list[str],
    said: str,
    places: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("dtune.inference.assemble_speaker", read)
    for word, place in places.items():
        argv = [one.replace(f"={word}", f"={place}") for one in argv]
    assert main(["generate", "model=tiny", *argv]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("check", ["check_base=true", "check_base=false"])
def test_an_adapter_of_another_shape_is_refused_whatever_it_says_of_its_base(
    check: str, places: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [f"prompts={places['PROMPTS']}", f"adapters.a={places['LORA']}"]
    assert main(["generate", *argv, f"model.path={places['WIDER']}", check]) == 2
    assert "features there; it was trained on" in capsys.readouterr().err
