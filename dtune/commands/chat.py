"""``dtune chat``: a conversation with what was trained, in the terminal or over a pipe."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from dtune.commands.own import Command, split_settings
from dtune.commands.schema import ChatSettings
from dtune.commands.speak import Chosen, choose_speaker, first_adapter
from dtune.commands.trained import UNUSED, WHY_UNUSED, one_process
from dtune.data.schema import Format
from dtune.errors import ConfigError

if TYPE_CHECKING:
    from dtune.evaluate.chat import Conversation
    from dtune.runtime.world import World

COMMAND = Command(
    name="dtune chat",
    usage="""dtune chat run_dir=RUN [settings]: a conversation with what a run has trained.
dtune chat model.path=FOLDER: with any model, such as a merged one; model=tiny: the embedded.""",
    own=ChatSettings,
    unused=UNUSED,
    why_unused=WHY_UNUSED,
    examples="In the conversation: /reset, /system TEXT, /adapter NAME, /quit, /help.",
)


def run(argv: list[str]) -> int:
    """Talk until the input ends."""
    if COMMAND.asks_help(argv):
        sys.stdout.write(COMMAND.help())
        return 0
    own, settings = split_settings(argv, ChatSettings, COMMAND)
    chosen = choose_speaker(own, settings)
    if chosen is None:
        return 0
    if chosen.trained.config.data.format is Format.text:
        raise ConfigError(
            "what was trained on plain text has no turns: use dtune generate prompts=FILE.txt"
        )
    interrupt = Interrupt()
    with one_process(quiet=True) as world:
        conversation = _begin(own, chosen, world, interrupt)
        _greet(conversation, chosen)
        talk(conversation, interrupt)
    return 0


class Interrupt:
    """Ctrl-C while an answer is written: asks it to end, and does nothing else."""

    def __init__(self) -> None:
        self.came = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take Ctrl-C over for an answer."""
        self.came = False
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.came = True


def talk(conversation: Conversation, interrupt: Interrupt) -> None:
    """Answer line by line until the input ends or the user quits."""
    is_terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("> ") if is_terminal else sys.stdin.readline()
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            sys.stdout.write("\n(/quit or Ctrl-D ends)\n")
            continue
        if not line and not is_terminal:
            return
        with interrupt.listening():
            goes_on = conversation.hear(line)
        if interrupt.came:
            sys.stdout.write("(stopped)\n")
        sys.stdout.flush()
        if not goes_on:
            return


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _begin(own: ChatSettings, chosen: Chosen, world: World, interrupt: Interrupt) -> Conversation:
    from dtune.evaluate.chat import Conversation
    from dtune.inference import assemble_inference, assemble_speaker, check_adapters

    run = chosen.trained.config
    if chosen.adapters:
        check_adapters(run, chosen.adapters, same_base=own.check_base)
    parts = assemble_inference(run, world)
    speaker = assemble_speaker(
        parts, world, chosen.trained.exported, chosen.adapters, first=first_adapter(chosen)
    )
    return Conversation(
        speaker,
        parts.objective,
        own,
        _write,
        stopped=lambda: interrupt.came,
        max_positions=parts.max_positions,
        system=own.system,
    )


def _greet(conversation: Conversation, chosen: Chosen) -> None:
    """Say which weights answer."""
    config = chosen.trained.config
    what = chosen.trained.weights
    if chosen.adapters:
        names = ", ".join(chosen.adapters)
        first = conversation.speaker.adapter
        what = f"{first} (of {names}) on {config.model.path}"
    elif chosen.trained.exported is not None:
        what += f" ({config.peft.name}) on {config.model.path}"
    _write(f"{what}, {config.precision.name.value}, quant={config.quant.name}. /help says more.\n")
