"""The weights of a run in the layouts that other tools read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dtune.errors import CheckpointError
from dtune.peft.export import save_tokenizer
from dtune.runtime.world import World
from dtune.types import Engine, PeftMethod


@dataclass(frozen=True)
class Exporter:
    """Writes what the engine has trained."""

    engine: Engine
    method: PeftMethod
    tokenizer: PreTrainedTokenizerBase
    world: World

    @property
    def name(self) -> str:
        """Folder of the export in a run: ``adapter`` or ``model``."""
        return self.method.export_name

    def export(self, folder: Path) -> None:
        """Write the weights, tokenizer and chat template; collective.

        Raises CheckpointError on every rank where the first could not write.
        """
        problem = ""
        try:
            self.method.save(self.engine.full_tensors(), str(folder))
            if self.world.is_first:
                save_tokenizer(self.tokenizer, folder)
        except (CheckpointError, OSError) as error:
            problem = str(error)
        problems = [found for found in self.world.gather(problem) if found]
        if problems:
            raise CheckpointError(f"the {self.name} could not be exported: {problems[0]}")
