"""Evaluation: loss and exact match, the same on one rank and on two."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dtune.assets import ASSETS
from dtune.data.prompts import Prompt
from dtune.evaluate.exact_match import evaluate_exact_match, plan_shares
from dtune.evaluate.loss import evaluate_loss
from dtune.evaluate.schema import EvaluateConfig
from tests.distributed.pool import Pool
from tests.unit.evaluate_setting import (
    ALONE,
    GENERATE,
    LOSS_CASES,
    ROWS,
    Setting,
    config_of,
    train_by_heart,
    write_rows,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, and a model that knows their answers."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_rows(folder)
    setting = Setting(ASSETS / "tiny", config_of(folder), ALONE)
    train_by_heart(setting.model, setting.objective, setting.loader(packing=False, micro=len(ROWS)))
    setting.model.save_pretrained(folder)
    return folder


@pytest.fixture
def setting(folder: Path) -> Setting:
    return Setting(folder, config_of(folder), ALONE)


def test_every_answer_known_by_heart_is_an_exact_match(setting: Setting) -> None:
    found = evaluate_exact_match(setting.model, setting.tokenizer, setting.prompts, GENERATE, ALONE)
    assert [answer.answer for answer in found.answers] == [row[2] for row in ROWS]
    assert found.score == 1
    assert found.by_task == {"fact": 1, "number": 1, "word": 1}


def test_what_is_not_exactly_expected_does_not_count(setting: Setting) -> None:
    changed = {0: "c b A", 1: "In Dorn", 3: " 3\n"}
    prompts = [
        replace(prompt, expected=changed.get(prompt.number, prompt.expected))
        for prompt in setting.prompts
    ]
    found = evaluate_exact_match(setting.model, setting.tokenizer, prompts, GENERATE, ALONE)
    assert [a.prompt.number for a in found.answers if not a.ok] == [0, 1]
    assert found.score == 5 / 7
    assert found.by_task == {"fact": 2 / 3, "number": 1, "word": 2 / 3}


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_answers_do_not_depend_on_what_else_is_in_the_batch(
    setting: Setting, batch_size: int
) -> None:
    config = EvaluateConfig(max_new_tokens=16, batch_size=batch_size)
    assert setting.answers(config) == [row[2] for row in ROWS]


def test_answers_are_cut_at_max_new_tokens(setting: Setting) -> None:
    config = EvaluateConfig(max_new_tokens=3)
    ids = setting.tokenizer("A lamp made of glass and iron.", add_special_tokens=False)["input_ids"]
    assert setting.answers(config)[-1] == setting.tokenizer.decode(ids[:3]).strip()


def test_defaults_of_the_model_do_not_bend_greedy_decoding(setting: Setting) -> None:
    defaults = setting.model.generation_config
    assert defaults is not None
    defaults.update(do_sample=True, temperature=9.0, top_k=0, repetition_penalty=9.0, min_length=40)
    answer = setting.tokenizer(ROWS[-1][2], add_special_tokens=False)
    defaults.suppress_tokens = answer["input_ids"]
    defaults.eos_token_id = [1, 2]
    setting.tokenizer.pad_token = None
    assert setting.answers() == [row[2] for row in ROWS]
    assert setting.model.generation_config is defaults


def test_generation_uses_the_cache(setting: Setting) -> None:
    widths: list[int] = []

    def record(_: nn.Module, __: object, arguments: dict[str, torch.Tensor]) -> None:
        widths.append(arguments["input_ids"].shape[1])

    setting.model.register_forward_pre_hook(record, with_kwargs=True)
    setting.answers(EvaluateConfig(max_new_tokens=16, batch_size=32))
    assert widths[0] > 1
    assert len(widths) > 3
    assert set(widths[1:]) == {1}


def test_evaluation_puts_the_mode_of_every_module_back(setting: Setting) -> None:
    setting.model.train()
    frozen = setting.model.get_submodule("model.layers.1")
    frozen.eval()
    before = [module.training for module in setting.model.modules()]
    setting.answers()
    setting.loss(packing=True, micro=2)
    assert [module.training for module in setting.model.modules()] == before
    # Both modes were there: putting all of them into one would have shown.
    assert set(before) == {True, False}


class Interrupted(nn.Module):
    """Fails in its forward."""

    def forward(self, **_: object) -> None:
        assert not self.training
        assert not torch.is_grad_enabled()
        raise KeyError("forward")


def test_an_error_leaves_the_model_in_training_and_no_thread(setting: Setting) -> None:
    model = Interrupted()
    loader = setting.loader(packing=True, micro=1)
    with pytest.raises(KeyError, match="forward"):
        evaluate_loss(model, setting.objective, loader, ALONE)
    assert model.training
    assert torch.is_grad_enabled()


def test_loss_is_the_mean_over_all_targets_however_rows_are_batched(setting: Setting) -> None:
    dataset = setting.dataset()
    tokens, total = 0, 0.0
    for number in range(len(dataset)):
        example = dataset.example(number)
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            logits = setting.model(input_ids=ids).logits[0].double()
        labels = torch.tensor(example.labels)[1:]
        total += nn.functional.cross_entropy(logits[:-1], labels, reduction="sum").item()
        tokens += example.num_targets
    for packing, micro in LOSS_CASES:
        loss, counted = setting.loss(packing=packing, micro=micro)
        assert counted == tokens
        # fp32 logits of different batch shapes; a lost or doubled row moves it by percents.
        assert loss == pytest.approx(total / tokens, rel=1e-4)


@pytest.mark.parametrize("count", [1, 5, 8, 9, 16, 17])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shares_hold_every_prompt_once_in_as_many_batches(count: int, world_size: int) -> None:
    prompts = [Prompt(i, "", "", [0] * (i * 7 % 5 + 1), "", "") for i in range(count)]
    shares = [plan_shares(prompts, 4, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    everything = [prompt.number for share in shares for batch in share for prompt in batch]
    assert sorted(everything) == list(range(count))
    assert max(len(batch) for share in shares for batch in share) <= 4


@pytest.fixture(scope="module")
def ranks(folder: Path, two_ranks: Pool) -> list[dict[str, Any]]:
    """What two processes found."""
    return two_ranks.run("tests.unit.evaluate_setting:evaluate_on_rank", folder=str(folder))


def test_loss_on_two_ranks_is_that_on_one(ranks: list[dict[str, Any]], setting: Setting) -> None:
    assert ranks[0]["loss"] == ranks[1]["loss"]
    alone = [setting.loss(packing=packing, micro=micro) for packing, micro in LOSS_CASES]
    for (loss, tokens), (expected, count) in zip(ranks[0]["loss"], alone, strict=True):
        assert tokens == count
        assert loss == pytest.approx(expected, rel=1e-4)


def test_answers_on_two_ranks_are_those_on_one_also_where_one_has_no_prompt(
    ranks: list[dict[str, Any]],
) -> None:
    expected = [row[2] for row in ROWS]
    for rank in ranks:
        assert rank["answers"] == expected
        assert rank["single_answer"] == expected[:1]


def test_a_sharded_model_answers_as_a_whole_one(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["sharded_answers"] == rank["answers"]
        assert rank["sharded_loss"] == pytest.approx(rank["loss"][3], rel=1e-6)


def test_data_are_prepared_once_and_mistakes_reach_every_rank(
    ranks: list[dict[str, Any]],
) -> None:
    assert [rank["rendered"] for rank in ranks] == [len(ROWS), 0]
    assert ranks[0]["fingerprint"] == ranks[1]["fingerprint"]
    assert ranks[0]["mistake"] == ranks[1]["mistake"]
    assert "DataError" in str(ranks[1]["mistake"])
    assert "bad.jsonl:1: expected text in column 'output'" in str(ranks[1]["mistake"])


def test_a_failure_of_the_rank_that_works_does_not_leave_others_waiting(
    ranks: list[dict[str, Any]],
) -> None:
    assert "RuntimeError: of our own" in str(ranks[0]["failure"])
    assert "RuntimeError: another rank failed while preparing" in str(ranks[1]["failure"])
