"""The weights of a run in the layouts that other tools read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from dtune.errors import CheckpointError
from dtune.peft.export import save_tokenizer
from dtune.runtime.world import World
from dtune.types import Engine, PeftMethod, TensorSource


@dataclass(frozen=True)
class Exporter:
    """Writes what the engine has trained."""

    engine: Engine
    method: PeftMethod
    held: TensorSource
    frozen: Mapping[str, tuple[int, ...]]
    """Shapes of the parameters of the base that are not trained, by which ``held`` has them."""
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
            self.method.save(self._tensors(), str(folder))
            if self.world.is_first:
                save_tokenizer(self.tokenizer, folder)
        except (CheckpointError, OSError) as error:
            problem = str(error)
        problems = [found for found in self.world.gather(problem) if found]
        if problems:
            raise CheckpointError(f"the {self.name} could not be exported: {problems[0]}")

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """What was trained; for a whole model also what was not."""
        trained = self.engine.full_tensors()
        return chain(trained, self._base()) if self.name == "model" else trained

    def _base(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """What was not trained, as the model computed with it: a quantised weight in float."""
        for name, shape in self.frozen.items():
            if self.world.is_first:
                values = self.held.read(name, 0, torch.Size(shape).numel())
                yield name, values.cpu().view(shape)
            else:
                yield name, None
