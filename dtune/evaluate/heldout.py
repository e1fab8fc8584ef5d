"""Everything that is measured on held-out rows, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from dtune.data.dataset import TokenDataset
from dtune.data.loader import Loader
from dtune.data.prompts import Prompt
from dtune.evaluate.exact_match import Answer, evaluate_exact_match
from dtune.evaluate.loss import evaluate_loss
from dtune.evaluate.mode import AsksToStop, never
from dtune.evaluate.schema import EvaluateConfig
from dtune.runtime.world import World
from dtune.types import Engine, Objective

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class HeldOut:
    """Loss per token, and exact match of greedy answers where rows have questions."""

    def __init__(
        self,
        objective: Objective,
        loader: Loader,
        prompts: Sequence[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        config: EvaluateConfig,
        world: World,
    ) -> None:
        self._objective = objective
        self._loader = loader
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._config = config
        self._world = world
        self.answers: tuple[Answer, ...] = ()
        """Of the last call, in the order of the rows."""
        self.by_task: dict[str, float] = {}
        """Exact match of the last call by task, where rows name tasks."""

    @property
    def dataset(self) -> TokenDataset:
        """The held-out rows."""
        return self._loader.dataset

    def __call__(self, engine: Engine, asks_to_stop: AsksToStop = never) -> dict[str, float]:
        """Measure; collective. Keys: ``loss``, and ``exact_match`` where there are questions.

        Raises EvaluationStopped where it is asked to stop between two batches.
        """
        with engine.compute():
            loss = evaluate_loss(
                engine.model,
                self._objective,
                self._loader,
                self._world,
                asks_to_stop=asks_to_stop,
            )
            metrics = {"loss": loss.loss}
            if self._prompts:
                metrics["exact_match"] = self._match(engine, asks_to_stop)
        return metrics

    def _match(self, engine: Engine, asks_to_stop: AsksToStop) -> float:
        module = engine.module
        assert isinstance(module, PreTrainedModel), type(module)
        match = evaluate_exact_match(
            module,
            self._tokenizer,
            self._prompts,
            self._config,
            self._world,
            asks_to_stop=asks_to_stop,
        )
        self.answers, self.by_task = match.answers, match.by_task
        return match.score
