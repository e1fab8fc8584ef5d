"""Every mistake of a user ends with exit code 2 and a message that says what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dtune.commands import COMMANDS
from dtune.resources import resolve_path
from dtune.runtime.status import State, read_status

TINY = Path(resolve_path("dtune://tiny"))
GOOD = {"instruction": "Say hi", "input": "", "output": "hi"}


@dataclass(frozen=True)
class Case:
    """Settings that are wrong, and words of the answer."""

    name: str
    settings: list[str]
    words: list[str]


def rows(path: Path, *lines: str) -> str:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return f"data.path={path}"


def model_without(folder: Path, what: str) -> str:
    """A copy of the tiny model that lacks something."""
    shutil.copytree(TINY, folder)
    if what == "markers":
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        for marker in (
            "{%- generation -%}",
            "{% generation %}",
            "{%- generation %}",
            "{% generation -%}",
            "{%- endgeneration -%}",
            "{% endgeneration %}",
            "{%- endgeneration %}",
            "{% endgeneration -%}",
        ):
            template = template.replace(marker, "")
        assert "generation %" not in template
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    elif what == "tensor":
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    elif what == "weights":
        (folder / "model.safetensors").unlink()
    return f"model.path={folder}"


def cases(tmp: Path) -> list[Case]:
    good, text = json.dumps(GOOD), tmp / "rows.jsonl"
    long = json.dumps({**GOOD, "output": "hi " * 900})
    no_column = json.dumps({"instruction": "Say hi", "answer": "hi"})
    no_answer = json.dumps({**GOOD, "output": ""})
    folder = tmp / "folder.jsonl"
    folder.mkdir()
    return [
        Case("missing file", [f"data.path={tmp}/none.jsonl"], ["data.path", "none.jsonl"]),
        Case("empty folder", [f"data.path={folder}"], ["data.path", "folder.jsonl"]),
        Case("cut row", [rows(text, good, '{"instruction": "a')], ["rows.jsonl:2", "on_bad_row"]),
        Case("wrong type", [rows(tmp / "t.jsonl", good, "[1]")], ["t.jsonl:2", "object"]),
        Case("no rows", [rows(tmp / "e.jsonl")], ["e.jsonl", "no rows"]),
        Case("column", [rows(tmp / "c.jsonl", no_column)], ["output", "data.columns"]),
        Case("no answer", [rows(tmp / "a.jsonl", good, no_answer)], ["a.jsonl:2"]),
        Case("too long", [rows(tmp / "l.jsonl", good, long)], ["l.jsonl:2", "data.max_length"]),
        Case(
            "markers", [model_without(tmp / "m", "markers")], ["generation", "model.chat_template"]
        ),
        Case("no tensor", [model_without(tmp / "n", "tensor")], ["model.norm.weight"]),
        Case("no weights", [model_without(tmp / "w", "weights")], ["model.path", "safetensors"]),
        Case("model", [f"model.path={tmp}/no-model"], ["model.path", "no such folder"]),
        Case("embedded", ["model.path=dtune://tini"], ["dtune://tiny"]),
        Case("target", ["peft.targets=[q_prog]"], ["q_prog", "q_proj"]),
        Case("batch", ["train.global_batch_size=9"], ["train.micro_batch_size=1"]),
        Case("attention", ["model.attention=flash_attention_2"], ["flash"]),
        Case("resume", [f"resume={tmp}"], ["resume", "no checkpoint"]),
        Case("key", ["peft.rnk=8"], ["unknown key peft.rnk", "peft.rank"]),
        Case("type", ["optim.lr=fast"], ["optim.lr"]),
        Case("combination", ["objective=pretrain"], ["data.format=text"]),
        Case("run folder", [f"run_dir={tmp}"], ["not empty", "no run of dtune"]),
        Case("no run", [f"run_dir={tmp}", "resume=auto"], ["not empty", "no run of dtune"]),
        Case("tracker", ["log=wandb", "log.wandb_mode=onlin"], ["log.wandb_mode=online"]),
    ]


def settings_of(case: Case, number: int, tmp: Path) -> list[str]:
    run_dir = (
        []
        if any(s.startswith("run_dir=") for s in case.settings)
        else [f"run_dir={tmp}/runs/{number}"]
    )
    return ["train", *run_dir, "data.eval_path=none", "train.max_steps=1", *case.settings]


def test_each_mistake_is_answered_with_exit_code_2(tmp_path: Path) -> None:
    wrong = cases(tmp_path)
    commands = [settings_of(case, number, tmp_path) for number, case in enumerate(wrong)]
    (tmp_path / "commands.json").write_text(json.dumps(commands), encoding="utf-8")
    script = Path(__file__).with_name("bad_inputs.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "commands.json")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "DTUNE_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    problems = []
    for number, (case, given) in enumerate(zip(wrong, answers, strict=True)):
        missing = [word for word in case.words if word not in given["said"]]
        if given["code"] != 2 or missing or "Traceback" in given["said"]:
            problems.append(f"{case.name}: exit {given['code']}, lacks {missing}: {given['said']}")
        run_dir = tmp_path / "runs" / str(number)
        if (run_dir / "status.json").is_file():
            assert read_status(run_dir).state is State.config_error
            assert not list(run_dir.glob("checkpoints/step-*"))
    assert not problems, "\n".join(problems)


def test_wrong_settings_are_answered_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from dtune.cli import main\n"
        "codes = [main(a) for a in (['--help'], ['train', '--help'], ['train', 'lora_r=8'],"
        " ['trian'], ['train', 'peft=lorra'], ['train', '--lr', '3'], ['train', '-m', 'pft=a,b'],"
        " ['train', 'parallel=single', 'launch.nproc=2'])]\n"
        "print(codes, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.stdout.splitlines()[-1] == "[0, 0, 2, 2, 2, 2, 2, 2] False", done.stderr


@pytest.mark.parametrize("wrong", ["trian", "evl", "--hlep"])
def test_wrong_command_names_the_right_ones(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    from dtune.cli import main

    assert main([wrong]) == 2
    assert f"one of {', '.join(COMMANDS)}" in capsys.readouterr().err
