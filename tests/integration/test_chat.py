"""``dtune chat`` driven over a pipe: turns, commands, and what stops."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path

import peft
import pytest
from transformers import AutoTokenizer

from dtune.cli import main
from dtune.evaluate import chat
from tests.integration.test_generate import ADAPTERS, said_by
from tests.integration.trained_runs import BASE, base_model, save_adapter, train_run

HELLO = "Where does Mira live?"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_run(tmp_path_factory.mktemp("run"), "peft=lora")


class Pipe(io.StringIO):
    """What is written to the command, line by line."""


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def said(argv: list[str], *lines: str) -> list[str]:
        monkeypatch.setattr("sys.stdin", Pipe("".join(f"{line}\n" for line in lines)))
        assert main(["chat", "max_new_tokens=12", *argv]) == 0
        return capsys.readouterr().out.splitlines()

    return said


def test_says_which_weights_answer_and_ends_with_its_input(run: Path, talk) -> None:
    greeting, answer = talk([f"run_dir={run}"], HELLO)
    assert greeting.startswith(f"{run / 'adapter'} (lora) on dtune://tiny, fp32, quant=none")
    model = peft.PeftModel.from_pretrained(base_model(), run / "adapter").eval()
    assert answer.strip() == said_by(model, HELLO)
    assert talk(["model=tiny"], HELLO)[1] == said_by(base_model(), HELLO)


def test_what_was_said_is_in_the_next_prompt_until_it_is_reset(
    run: Path, talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    real = chat.ask_conversation

    def keep(*args, **kwargs):
        question = real(*args, **kwargs)
        asked.append(question.input_ids)
        return question

    monkeypatch.setattr(chat, "ask_conversation", keep)
    lines = talk([f"run_dir={run}"], HELLO, "And Hugo?", "/reset", HELLO, "/system Be kind.", HELLO)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    user, said = {"role": "user", "content": HELLO}, {"role": "assistant", "content": lines[1]}
    conversations = [
        [user],
        [user, said, {"role": "user", "content": "And Hugo?"}],
        [user],
        [{"role": "system", "content": "Be kind."}, user],
    ]
    assert asked == [
        tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        for turns in conversations
    ]
    # Greedy: what is forgotten has no influence.
    assert lines[1] == lines[4]


def test_adapters_are_switched_by_name(run: Path, talk, tmp_path: Path) -> None:
    other = save_adapter(tmp_path / "ia3", ADAPTERS["ia3"], seed=7, size=1.0)
    lines = talk(
        [f"run_dir={run}", f"adapters.other={tmp_path / 'ia3'}"],
        HELLO, "/reset", "/adapter other", HELLO, "/reset", "/adapter none", HELLO, "/adapter x",
    )  # fmt: skip
    trained = peft.PeftModel.from_pretrained(base_model(), run / "adapter").eval()
    expected = [said_by(model, HELLO) for model in (trained, other, base_model())]
    assert lines[0].startswith("run (of run, other) on dtune://tiny")
    assert [lines[n].strip() for n in (1, 4, 7)] == expected
    assert len(set(expected)) == 3
    assert lines[3] == "other answers"
    assert lines[8] == "there is no adapter x; none answers; there are: run, other, none"


def test_a_wrong_command_is_said_and_quit_ends(talk) -> None:
    lines = talk(["model=tiny"], "", "/rest", "/adapter", "/help", "/quit", HELLO)
    assert lines[1] == "there is no /rest; did you mean /reset?; /help says what there is"
    assert lines[2].startswith("there are no adapters")
    assert lines[-1].startswith("/quit")


def test_ctrl_c_ends_the_answer_and_not_the_conversation(
    talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = chat.Conversation._answer

    def interrupted(self: chat.Conversation, text: str) -> None:
        if text == "stop":
            write = self.speaker.stream

            def stream(question, sampling, *, write: chat.Write, stopped) -> str:
                def press(piece: str) -> None:
                    write(piece)
                    os.kill(os.getpid(), signal.SIGINT)

                return type(self.speaker).stream(
                    self.speaker, question, sampling, write=press, stopped=stopped
                )

            self.speaker.stream = stream  # type: ignore[method-assign]
            try:
                real(self, HELLO)
            finally:
                self.speaker.stream = write  # type: ignore[method-assign]
        else:
            real(self, text)

    monkeypatch.setattr(chat.Conversation, "_answer", interrupted)
    lines = talk(["model=tiny"], "stop", "/reset", HELLO)
    whole = said_by(base_model(), HELLO)
    assert lines[2] == "(stopped)"
    assert whole.startswith(lines[1].strip())
    assert len(lines[1].strip()) < len(whole)
    assert lines[-1] == whole


def test_a_conversation_that_is_too_long_is_said_and_goes_on(talk) -> None:
    lines = talk(["model=tiny"], "word " * 600, HELLO)
    assert "more than the 512 positions" in lines[1]
    assert lines[-1] == said_by(base_model(), HELLO)


def test_a_run_on_plain_text_has_no_turns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "x.txt"
    text.write_text("Once upon a time.")
    settings = ["model=tiny", "objective=pretrain", "data=text", f"data.path={text}"]
    assert main(["chat", *settings]) == 2
    assert "use dtune generate" in capsys.readouterr().err
