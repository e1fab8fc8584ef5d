"""What the tests of evaluation need on each rank, and what two ranks do in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from dtune.assets import ASSETS
from dtune.data.dataset import TokenDataset
from dtune.data.loader import Loader
from dtune.data.prompts import read_prompts
from dtune.data.schema import DataConfig
from dtune.data.tokenize import prepare_dataset
from dtune.errors import ConfigError
from dtune.evaluate.exact_match import evaluate_exact_match
from dtune.evaluate.loss import evaluate_loss
from dtune.evaluate.schema import EvaluateConfig
from dtune.objectives.schema.sft import SftConfig
from dtune.runtime.world import World
from dtune.types import Example, Objective, Row

ALONE = World(0, 1, 0, 1, torch.device("cpu"), None)  # type: ignore[arg-type]
GENERATE = EvaluateConfig(max_new_tokens=16, batch_size=4)
ROWS = [
    ("Reverse.", "abc", "c b a", "word"),
    ("Where does Mira live?", "", "In Dorn.", "fact"),
    ("Count the letters of this rather long word.", "forest", "6", "word"),
    ("Add.", "1 2", "3", "number"),
    ("Who bakes the bread in the village of Wendle?", "", "Hugo does.", "fact"),
    ("Say nothing but this.", "yes", "yes", "word"),
    ("Name a thing.", "", "A lamp made of glass and iron.", "fact"),
]


def write_rows(folder: Path) -> None:
    """Rows that can be learned, and rows that are malformed."""
    names = ("instruction", "input", "output", "task")
    rows = [json.dumps(dict(zip(names, row, strict=True))) for row in ROWS]
    (folder / "held.jsonl").write_text("\n".join(rows))
    (folder / "bad.jsonl").write_text('{"instruction": "Q", "output": 5}')


def config_of(folder: Path) -> DataConfig:
    """Config of the rows that ``write_rows`` wrote."""
    return DataConfig(
        path=str(folder / "bad.jsonl"),
        eval_path=str(folder / "held.jsonl"),
        cache_dir=str(folder / "cache"),
        max_length=64,
    )


def train_by_heart(model: PreTrainedModel, objective: Objective, loader: Loader) -> None:
    """Until the model knows every answer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    (batch,) = loader.batches(0)
    for _ in range(200):
        mean = objective.loss(model, batch).total / batch.num_targets
        mean.backward()
        optimizer.step()
        optimizer.zero_grad()
        if mean.item() < 0.02:
            return
    raise AssertionError(f"not learned by heart: {mean.item()}")


class Setting:
    """Everything that an evaluation needs, for one rank."""

    def __init__(self, folder: Path, config: DataConfig, world: World) -> None:
        self.world = world
        self.config = config
        self.tokenizer: Tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny")
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        )
        self.objective = SftConfig().build(self.tokenizer)
        self.prompts = read_prompts(config, self.objective)

    def dataset(self, which: str = "eval") -> TokenDataset:
        return prepare_dataset(
            self.config, self.objective, which=which, fingerprint="f", world=self.world
        )

    def loader(self, *, packing: bool, micro: int) -> Loader:
        return Loader(
            self.dataset(),
            replace(self.config, packing=packing),
            micro_batch_size=micro,
            global_batch_size=micro * self.world.size,
            seed=0,
            rank=self.world.rank,
            world_size=self.world.size,
            pad_token_id=0,
            epochs=1.0,
            shuffle=False,
        )

    def loss(self, *, packing: bool, micro: int) -> list[float]:
        loader = self.loader(packing=packing, micro=micro)
        found = evaluate_loss(self.model, self.objective, loader, self.world)
        return [found.loss, found.tokens]

    def answers(self, config: EvaluateConfig = GENERATE) -> list[str]:
        found = evaluate_exact_match(self.model, self.tokenizer, self.prompts, config, self.world)
        assert [answer.prompt for answer in found.answers] == list(self.prompts)
        return [answer.answer for answer in found.answers]


LOSS_CASES = [(True, 1), (True, 2), (False, 1), (False, 3), (False, 8)]


class Watched:
    """An objective whose rendering is counted, and fails when told to."""

    def __init__(self, render: Callable[[Row], Example]) -> None:
        self._render = render
        self.rendered = 0
        self.fails = False

    def __call__(self, row: Row) -> Example:
        if self.fails:
            raise RuntimeError("of our own")
        self.rendered += 1
        return self._render(row)


def evaluate_on_rank(world: World, folder: str) -> dict[str, object]:
    """Evaluate whole and sharded, meet a mistake and a failure; return what was found."""
    home = Path(folder)
    config = replace(config_of(home), cache_dir=str(home / "cache-of-two"))
    setting = Setting(home, config, world)
    watched = Watched(setting.objective.render)
    setting.objective.render = watched  # type: ignore[method-assign]
    found: dict[str, object] = {}
    found["fingerprint"] = setting.dataset().fingerprint
    found["rendered"] = watched.rendered
    found["loss"] = [setting.loss(packing=packing, micro=micro) for packing, micro in LOSS_CASES]
    found["answers"] = setting.answers()
    for layer in setting.model.get_submodule("model.layers").children():
        fully_shard(layer)
    fully_shard(setting.model)
    found["sharded_answers"] = setting.answers()
    found["sharded_loss"] = setting.loss(packing=False, micro=3)
    setting.prompts = setting.prompts[:1]
    found["single_answer"] = setting.answers()
    found["mistake"] = error_of(setting, "train")
    watched.fails = True
    setting.config = replace(config, max_length=63)
    found["failure"] = error_of(setting, "eval")
    return found


def error_of(setting: Setting, which: str) -> str:
    """Error that preparing the data ends with."""
    try:
        setting.dataset(which)
    except (ConfigError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"
