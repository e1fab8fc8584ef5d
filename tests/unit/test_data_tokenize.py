"""Tokenising: what is cut or left out is counted, and the cache gives what a fresh run gives."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dtune.assets import ASSETS
from dtune.data.dataset import TokenDataset
from dtune.data.prompts import read_prompts
from dtune.data.schema import DataConfig, Format, OnBadRow, OnLongRow
from dtune.data.tokenize import prepare_dataset
from dtune.errors import ConfigError, DataError
from dtune.objectives.fingerprint import objective_fingerprint
from dtune.objectives.schema.pretrain import PretrainConfig
from dtune.objectives.schema.sft import SftConfig
from dtune.runtime.world import World
from dtune.types import IGNORE_INDEX
from tests.unit.chat_template import PLAIN_TEMPLATE

ALONE = World(0, 1, 0, 1, torch.device("cpu"), None)  # type: ignore[arg-type]
PREFIX = 4  # <|bos|><|user|>...<|end|><|assistant|>

Prepare = Callable[..., TokenDataset]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny")
    tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


@pytest.fixture
def prepare(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Prepare:
    """Write rows to a file and prepare it; each keyword is a field of the config."""

    def run(rows: list[dict[str, object]], **fields: object) -> TokenDataset:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        cache = str(tmp_path / "cache")
        config = DataConfig(path=str(path), cache_dir=cache, max_bad_share=1.0)
        config = replace(config, **fields)  # type: ignore[arg-type]
        objective = PretrainConfig() if config.format is Format.text else SftConfig()
        return prepare_dataset(
            config,
            objective.build(tokenizer),
            which="train",
            fingerprint=objective_fingerprint(objective, tokenizer),
            world=ALONE,
        )

    return run


def alpaca(question: str, answer: str) -> dict[str, object]:
    return {"instruction": question, "output": answer}


def digits(count: int) -> str:
    """Text of exactly so many tokens: each digit is one."""
    return "7" * count


def row_of(prompt: int, answer: int) -> dict[str, object]:
    """A row of 4 + prompt tokens before, and answer + 1 tokens inside the markers."""
    return alpaca(digits(prompt), digits(answer))


def test_rows_come_back_as_they_were_rendered(
    prepare: Prepare, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    dataset = prepare([alpaca("Q", "one two"), alpaca("Where?", "Zürich 你好")])
    assert len(dataset) == 2
    assert dataset.origin(1) == f"{tmp_path / 'rows.jsonl'}:2"
    assert dataset.example(1).row == 1
    example = dataset.example(1)
    trained = [label for label in example.labels if label != IGNORE_INDEX]
    assert tokenizer.decode(trained) == "Zürich 你好<|end|>"
    assert tokenizer.decode(example.input_ids).startswith("<|bos|><|user|>Where?<|end|>")


def test_nothing_predicts_the_first_token_of_a_document(prepare: Prepare) -> None:
    rows: list[dict[str, object]] = [{"text": digits(3)}, {"text": digits(5)}]
    dataset = prepare(rows, format=Format.text)
    assert dataset.lengths.tolist() == [5, 7]
    for number in range(2):
        example = dataset.example(number)
        assert example.labels == [IGNORE_INDEX, *example.input_ids[1:]]
    assert dataset.report.trained_tokens == 5 + 7 - 2


def test_the_report_counts_rows_and_tokens_exactly(
    prepare: Prepare, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="dtune"):
        report = prepare([row_of(3, 1), row_of(5, 2), row_of(9, 9)]).report
    lengths = [3 + PREFIX + 2, 5 + PREFIX + 3, 9 + PREFIX + 10]
    assert (report.rows_read, report.rows_kept) == (3, 3)
    assert (report.tokens, report.trained_tokens) == (sum(lengths), 2 + 3 + 10)
    assert report.length_percentiles == {"5": 9, "50": 12, "95": 23, "100": 23}
    assert "3 of 3 rows, 44 tokens, 15 trained (34.1%)" in caplog.text


def test_long_rows_are_an_error_that_counts_them(prepare: Prepare) -> None:
    with pytest.raises(DataError) as error:
        prepare([row_of(3, 1), row_of(20, 1), row_of(3, 30)], max_length=16)
    message = str(error.value)
    assert "2 of 3 rows are longer than data.max_length=16, the longest 38 tokens" in message
    assert "rows.jsonl:2 (26 tokens), " in message
    assert "set data.max_length=38, or data.on_long_row=truncate or skip" in message


def test_long_rows_left_out_are_counted_with_their_tokens(
    prepare: Prepare, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row_of(3, 1), row_of(20, 1), row_of(3, 30)]
    with caplog.at_level(logging.INFO, logger="dtune"):
        dataset = prepare(rows, max_length=16, on_long_row=OnLongRow.skip)
    assert len(dataset) == 1
    assert (dataset.report.long.rows, dataset.report.long.tokens) == (2, 26 + 38)
    assert "2 rows above data.max_length left out (64 tokens)" in caplog.text


def test_truncation_counts_every_token_it_cuts(prepare: Prepare) -> None:
    dataset = prepare([row_of(3, 30), row_of(3, 8)], max_length=16, on_long_row=OnLongRow.truncate)
    assert dataset.lengths.tolist() == [16, 16]
    assert (dataset.report.cut.rows, dataset.report.cut.tokens) == (1, 38 - 16)
    assert dataset.report.trained_tokens == (16 - 7) * 2
    assert dataset.report.tokens == 32


def test_a_row_whose_answer_is_cut_away_is_named(prepare: Prepare) -> None:
    rows = [row_of(3, 1), row_of(20, 1)]
    options = {"max_length": 16, "on_long_row": OnLongRow.truncate}
    with pytest.raises(
        DataError, match=r"rows\.jsonl:2: no token to train on is left in the first"
    ):
        prepare(rows, **options)
    report = prepare(rows, **options, on_bad_row=OnBadRow.skip).report
    assert (report.rows_kept, report.untrained.rows, report.cut.rows) == (1, 1, 0)


def test_a_malformed_row_stops_or_is_counted(
    prepare: Prepare, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row_of(3, 1), {"instruction": "Q", "output": 5}, {"instruction": "Q"}, row_of(3, 1)]
    with pytest.raises(
        DataError,
        match=r"(?s)rows\.jsonl:2: .*found a number \(5\)\n.*rows\.jsonl:3: .*mend them, or",
    ):
        prepare(rows)
    with caplog.at_level(logging.INFO, logger="dtune"):
        dataset = prepare(rows, on_bad_row=OnBadRow.skip)
    assert (dataset.report.rows_read, dataset.report.rows_kept, dataset.report.bad.rows) == (
        4,
        2,
        2,
    )
    assert [dataset.example(i).row for i in (0, 1)] == [0, 3]
    assert dataset.origin(1).endswith("rows.jsonl:4")
    assert "2 malformed rows left out, first: " in caplog.text


def test_a_row_that_the_template_refuses_is_a_malformed_row(prepare: Prepare) -> None:
    turns = [{"role": "wizard", "content": "Q"}, {"role": "assistant", "content": "A"}]
    good = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    rows: list[dict[str, object]] = [{"messages": good}, {"messages": turns}]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the chat template refuses.*wizard"):
        prepare(rows, format=Format.messages)
    report = prepare(rows, format=Format.messages, on_bad_row=OnBadRow.skip).report
    assert (report.rows_kept, report.bad.rows) == (1, 1)


def test_a_column_that_no_row_has_is_a_wrong_format(prepare: Prepare) -> None:
    rows: list[dict[str, object]] = [{"prompt": "Q", "completion": "A"}] * 3
    with pytest.raises(DataError) as error:
        prepare(rows)
    assert "data.path=" in str(error.value)
    assert "no row has the column 'instruction'" in str(error.value)
    assert "set data.format=prompt_completion or data.columns" in str(error.value)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: expected a column 'instruction'"):
        prepare([*rows, alpaca("Q", "A")])


def test_data_without_a_usable_row_are_an_error(prepare: Prepare) -> None:
    with pytest.raises(DataError, match=r"data\.path=.* has no rows"):
        prepare([])
    with pytest.raises(DataError, match=r"none of 1 rows can be used: 1 malformed rows left out"):
        prepare([{"instruction": 5}], on_bad_row=OnBadRow.skip)


def test_a_format_that_the_objective_cannot_use_is_no_bad_row(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "a.txt").write_text("Some text.")
    (tmp_path / "a.jsonl").write_text(json.dumps(alpaca("Q", "A")))
    cases = [
        ("a.txt", Format.text, SftConfig(), "objective=sft trains on conversations"),
        ("a.jsonl", Format.alpaca, PretrainConfig(), "objective=pretrain trains on plain text"),
    ]
    for name, form, objective, message in cases:
        config = DataConfig(
            path=str(tmp_path / name),
            format=form,
            on_bad_row=OnBadRow.skip,
            cache_dir=str(tmp_path / "cache"),
        )
        with pytest.raises(ConfigError, match=message):
            prepare_dataset(
                config, objective.build(tokenizer), which="train", fingerprint="", world=ALONE
            )


def test_max_rows_takes_the_first(prepare: Prepare) -> None:
    dataset = prepare([row_of(3, 1), row_of(4, 1), row_of(5, 1)], max_rows=2)
    assert dataset.lengths.tolist() == [9, 10]


def test_eval_reads_its_own_path(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, prepare: Prepare
) -> None:
    config = DataConfig(
        path="nothing.jsonl",
        eval_path=str(tmp_path / "held.jsonl"),
        cache_dir=str(tmp_path / "cache"),
        max_rows=1,
        on_bad_row=OnBadRow.skip,
        max_bad_share=0.5,
    )
    objective = SftConfig().build(tokenizer)
    with pytest.raises(DataError, match=r"data\.eval_path=.*there is no such file"):
        prepare_dataset(config, objective, which="eval", fingerprint="", world=ALONE)
    rows = [{**alpaca("Q", "A"), "task": "t"}, {"output": "A"}, alpaca("P", "B")]
    (tmp_path / "held.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    dataset = prepare_dataset(config, objective, which="eval", fingerprint="", world=ALONE)
    assert (len(dataset), dataset.report.bad.rows) == (2, 1)
    prompts = read_prompts(config, objective)
    assert [(p.number, p.text, p.expected, p.task) for p in prompts] == [
        (0, "Q", "A", "t"),
        (1, "P", "B", ""),
    ]
    assert prompts[1].origin.endswith("held.jsonl:3")
    assert len(read_prompts(config, objective, max_rows=1)) == 1


def test_plain_text_has_no_prompts(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "a.txt").write_text("Some text.")
    config = DataConfig(eval_path=str(tmp_path / "a.txt"), format=Format.text)
    assert read_prompts(config, PretrainConfig().build(tokenizer)) == ()


def test_the_cache_gives_what_a_fresh_run_gives(prepare: Prepare, tmp_path: Path) -> None:
    rows = [row_of(3, 1), row_of(5, 2), {"output": 1}]
    first = prepare(rows, on_bad_row=OnBadRow.skip)
    folders = list((tmp_path / "cache" / "tokens").iterdir())
    second = prepare(rows, on_bad_row=OnBadRow.skip)
    assert list((tmp_path / "cache" / "tokens").iterdir()) == folders
    assert (first.fingerprint, first.report) == (second.fingerprint, second.report)
    for name, array in first.arrays.items():
        np.testing.assert_array_equal(array, second.arrays[name])


def test_a_hit_does_not_tokenise_again(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row_of(3, 1)]
    prepare(rows)

    def fail(*_: object) -> None:
        raise AssertionError("rendered again")

    monkeypatch.setattr("dtune.objectives.sft.Sft.render", fail)
    assert len(prepare(rows)) == 1
    with pytest.raises(AssertionError, match="rendered again"):
        prepare([row_of(3, 2)])


@pytest.mark.parametrize(
    "fields",
    [
        {"max_length": 64},
        {"max_rows": 1},
        {"on_long_row": OnLongRow.skip},
        {"on_bad_row": OnBadRow.skip},
        {"columns": {"input": "output"}},
        {"format": Format.text, "columns": {"text": "output"}},
    ],
)
def test_another_config_misses_the_cache(
    prepare: Prepare, tmp_path: Path, fields: dict[str, object]
) -> None:
    rows = [row_of(3, 1), row_of(4, 1)]
    prepare(rows)
    prepare(rows, **fields)
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2


def test_equal_tokens_have_equal_fingerprints(prepare: Prepare) -> None:
    rows = [row_of(3, 1), row_of(4, 1)]
    first = prepare(rows).fingerprint
    assert prepare([*rows, row_of(9, 1)], max_rows=2, max_length=64).fingerprint == first
    assert prepare([row_of(3, 1), row_of(4, 2)]).fingerprint != first
    assert prepare([row_of(4, 1), row_of(3, 1)]).fingerprint != first


def test_another_content_of_the_same_size_and_time_misses_the_cache(
    prepare: Prepare, tmp_path: Path
) -> None:
    first = prepare([alpaca("Q", "1")])
    facts = (tmp_path / "rows.jsonl").stat()
    (tmp_path / "rows.jsonl").unlink()
    second = prepare([alpaca("Q", "2")])
    os.utime(tmp_path / "rows.jsonl", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert (tmp_path / "rows.jsonl").stat().st_size == facts.st_size
    assert first.example(0) != second.example(0)


def test_another_template_or_tokenizer_has_another_fingerprint() -> None:
    def load() -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(ASSETS / "tiny")

    base = objective_fingerprint(SftConfig(), load())
    used = load()
    used(["a", "b c"], padding=True, truncation=True, max_length=2)
    assert objective_fingerprint(SftConfig(), used) == base
    assert objective_fingerprint(PretrainConfig(), load()) != base
    template, words, end = load(), load(), load()
    template.chat_template = str(template.chat_template).replace("trim", "upper")
    words.add_tokens(["wordlike"])
    end.eos_token = "<|pad|>"
    for other in (template, words, end):
        assert objective_fingerprint(SftConfig(), other) != base


def test_a_damaged_cache_is_made_again(prepare: Prepare, tmp_path: Path) -> None:
    rows = [row_of(3, 1)]
    first = prepare(rows).example(0)
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    with (folder / "tokens.bin").open("r+b") as file:
        file.truncate(8)
    assert prepare(rows).example(0) == first
    (folder / "trained.bin").unlink()
    assert prepare(rows).example(0) == first


def test_a_failed_run_leaves_nothing_behind(prepare: Prepare, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        prepare([row_of(3, 1), {"output": 1}])
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_a_cache_that_cannot_be_written_names_its_key(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache_dir=.*file: tokenised data cannot be kept"):
        prepare([row_of(3, 1)], cache_dir=str(tmp_path / "file"))
