"""A conversation: its turns, its commands, and the answers as they come."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field

from dtune.errors import ConfigError
from dtune.evaluate.questions import ask_conversation, check_lengths
from dtune.evaluate.schema import SamplingConfig
from dtune.evaluate.speaker import Speaker, Write
from dtune.types import Message, Objective

HELP = """/reset         forget the conversation
/system TEXT   begin anew with this in the system's turn; without TEXT: with nothing
/adapter NAME  answer with another adapter from now on; without NAME: say which there are
/quit          end, as does the end of the input; Ctrl-C ends an answer
"""
COMMANDS = ("/reset", "/system", "/adapter", "/quit", "/help")


@dataclass
class Conversation:
    """Turns so far and what answers them."""

    speaker: Speaker
    objective: Objective
    sampling: SamplingConfig
    write: Write
    stopped: Callable[[], bool]
    """Whether the answer that is being written is to end."""
    max_positions: int = 0
    system: str = ""
    turns: list[Message] = field(default_factory=list)
    _asked: int = 0

    def hear(self, line: str) -> bool:
        """Answer a line of the user, or do what it commands; False where it ends all."""
        text = line.strip()
        if not text:
            return True
        if text.startswith("/"):
            return self._command(text)
        try:
            self._answer(text)
        except ConfigError as error:
            # Nothing is wrong but this turn: the conversation goes on without it.
            self.write(f"{error}\n(/reset forgets the conversation)\n")
        return True

    def _answer(self, text: str) -> None:
        head = [Message("system", self.system)] if self.system else []
        turns = [*self.turns, Message("user", text)]
        question = ask_conversation([*head, *turns], self.objective, number=self._asked)
        if question is None:
            raise ConfigError(
                "plain text was trained on, which has no turns; use dtune generate prompts=FILE.txt"
            )
        check_lengths(
            [question],
            max_new_tokens=self.sampling.max_new_tokens,
            max_positions=self.max_positions,
        )
        self._asked += 1
        answer = self.speaker.stream(
            question, self.sampling, write=self.write, stopped=self.stopped
        )
        self.write("\n")
        self.turns = turns
        if answer:
            self.turns.append(Message("assistant", answer))

    def _command(self, text: str) -> bool:
        name, _, rest = text.partition(" ")
        rest = rest.strip()
        if name == "/quit":
            return False
        if name == "/reset":
            self.turns.clear()
            self.write("the conversation is forgotten\n")
        elif name == "/system":
            self.system = rest
            self.turns.clear()
            self.write("a new conversation\n")
        elif name == "/adapter":
            self._choose_adapter(rest)
        elif name == "/help":
            self.write(HELP)
        else:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.write(f"there is no {name}{hint}; /help says what there is\n")
        return True

    def _choose_adapter(self, name: str) -> None:
        adapters = self.speaker.adapters
        if adapters is None:
            self.write("there are no adapters to choose from; start with adapters.NAME=FOLDER\n")
        elif name in adapters.names:
            try:
                self.speaker.use(name)
            except ConfigError as error:
                self.write(f"{error}\n")
            self.write(f"{self.speaker.adapter} answers\n")
        else:
            known = ", ".join(adapters.names)
            unknown = f"there is no adapter {name}; " if name else ""
            self.write(f"{unknown}{self.speaker.adapter} answers; there are: {known}\n")
