"""``dtune generate``: answers to a file of prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dtune.commands.own import Command, split_settings
from dtune.commands.schema import GenerateSettings
from dtune.commands.speak import Chosen, choose_speaker, first_adapter
from dtune.commands.trained import UNUSED, WHY_UNUSED, one_process
from dtune.config.suggest import did_you_mean, near_options
from dtune.errors import ConfigError, DataError
from dtune.resources import resolve_path
from dtune.runtime.files import publish_text

if TYPE_CHECKING:
    from dtune.evaluate.questions import AskedRow
    from dtune.evaluate.speaker import Said
    from dtune.runtime.world import World

COMMAND = Command(
    name="dtune generate",
    usage="dtune generate run_dir=RUN prompts=FILE [out=FILE] [settings]: answers to prompts.",
    own=GenerateSettings,
    unused=UNUSED,
    why_unused=WHY_UNUSED,
    examples="""Prompts are rendered as the run renders its rows. An answer that a row has is not
shown to the model, and is written beside the model's. Rows may name an adapter in a column
"adapter"; one of adapters.NAME, run (that of run_dir) or none (the base alone).""",
)


def run(argv: list[str]) -> int:
    """Answer every prompt, in order."""
    if COMMAND.asks_help(argv):
        sys.stdout.write(COMMAND.help())
        return 0
    own, settings = split_settings(argv, GenerateSettings, COMMAND)
    chosen = choose_speaker(own, settings)
    if chosen is None:
        return 0
    _check_files(own)
    with one_process(quiet=True) as world:
        said = _answer(own, chosen, world)
    text = "".join(json.dumps(_record(one), ensure_ascii=False) + "\n" for one in said)
    if not own.out:
        sys.stdout.write(text)
        return 0
    publish_text(Path(own.out).expanduser(), text)
    sys.stdout.write(f"{len(said)} answers of {chosen.trained.weights} in {own.out}\n")
    return 0


def _check_files(own: GenerateSettings) -> None:
    if not Path(resolve_path(own.prompts)).expanduser().is_file():
        raise ConfigError(f"prompts={own.prompts}: there is no such file")
    if own.out:
        out = Path(own.out).expanduser()
        if out.is_dir() or not out.absolute().parent.is_dir():
            raise ConfigError(f"out={own.out}: name a file in a folder that exists")
        if out.exists() and out.samefile(Path(resolve_path(own.prompts)).expanduser()):
            raise ConfigError(f"out={own.out} is the file of prompts; name another")


def _answer(own: GenerateSettings, chosen: Chosen, world: World) -> list[Said]:
    # Only now, because a wrong setting is answered before torch is imported.
    from dtune.evaluate.questions import check_lengths, read_questions
    from dtune.inference import assemble_inference, assemble_speaker, check_adapters

    run = chosen.trained.config
    if chosen.adapters:
        check_adapters(run, chosen.adapters, same_base=own.check_base)
    parts = assemble_inference(run, world)
    questions = read_questions(own.prompts, run.data, parts.objective)
    check_lengths(questions, max_new_tokens=own.max_new_tokens, max_positions=parts.max_positions)
    first = first_adapter(chosen)
    questions = _name_adapters(questions, chosen, first)
    speaker = assemble_speaker(parts, world, chosen.trained.exported, chosen.adapters, first=first)
    return speaker.answer(questions, own, batch_size=own.batch_size)


def _name_adapters(questions: Sequence[AskedRow], chosen: Chosen, first: str) -> list[AskedRow]:
    """Rows that name no adapter get the first; ConfigError for one that there is not."""
    named = []
    for question in questions:
        name = question.adapter or first
        if name and not chosen.adapters:
            raise DataError(
                f"{question.origin} names the adapter {name}, but none is given; "
                f"set adapters.{name}=FOLDER"
            )
        known = [*chosen.adapters, "none"]
        if name and name not in known:
            near = did_you_mean(near_options(name, known))
            raise DataError(
                f"{question.origin}: there is no adapter {name}{near}; one of {', '.join(known)}"
            )
        named.append(replace(question, adapter=name))
    return named


def _record(said: Said) -> dict[str, object]:
    question = said.question
    return {
        "number": question.number,
        "origin": question.origin,
        "prompt": question.text,
        "answer": said.answer,
        "tokens": said.tokens,
        "finished": said.finished,
        **({"expected": question.expected} if question.expected else {}),
        **({"adapter": said.adapter} if said.adapter else {}),
    }
