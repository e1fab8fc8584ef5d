"""Pieces of sweeps that need no trial: going on, arrays, the experiment of a winner, axes, docs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from dtune_launch.schema.slurm import SlurmConfig
from hydra_plugins.dtune_launcher.local import DtuneLocalConf
from hydra_plugins.dtune_launcher.search import DtuneOptunaConf
from hydra_plugins.dtune_launcher.slurm import DtuneSlurmConf

from dtune.commands.sweep_resume import merge_settings
from dtune.config.reference import describe_keys
from dtune.sweep.best import difference
from dtune.sweep.folder import (
    Attempt,
    Pruned,
    TrialRecord,
    add_attempt,
    label_of,
    mark_pruned,
    plain,
    read_trial,
    write_trial,
)
from dtune.sweep.plot import is_log_spaced, numbers_of
from dtune.sweep.slurm import Element, parse_queue, scripts_of

DOCS = Path(__file__).parents[2] / "docs" / "sweeps.md"


def test_a_trial_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = TrialRecord(3, ("seed=1", "+a=b"), {"peft": "lora"})
    write_trial(tmp_path, record)
    assert read_trial(tmp_path) == record
    add_attempt(tmp_path, Attempt("then", job="7_3"))
    mark_pruned(tmp_path, Pruned(4, 2.5, "behind"))
    marked = read_trial(tmp_path)
    assert marked.pruned == Pruned(4, 2.5, "behind")
    # Started once more, it is pruned no longer.
    add_attempt(tmp_path, Attempt("now"))
    assert [one.job for one in read_trial(tmp_path).attempts] == ["7_3", ""]
    assert read_trial(tmp_path).pruned is None


@pytest.mark.parametrize(
    ("given", "shown"),
    [("dtune\\://tiny", "dtune://tiny"), ("'a b'", "a b"), ("1e-4", "1e-4"), ("a\\,b", "a,b")],
)
def test_people_read_values_without_the_grammar(given: str, shown: str) -> None:
    assert plain(given) == shown


def test_a_label_names_what_differs_and_all_where_nothing_does() -> None:
    trial = TrialRecord(0, ("+seed=1", "peft=lora"), {})
    assert label_of(trial, {"seed": "1,2"}) == "seed=1"
    assert label_of(trial, {}) == "seed=1 peft=lora"


BEGUN = (
    *("-m", "seed=1,2", "launch=slurm", "launch.nodes=2", "hydra/launcher=dtune_slurm"),
    *("hydra.launcher.poll_seconds=1", "hydra.launcher.parallel=3", "hydra.sweep.dir=old"),
)


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ((), BEGUN[:-1]),
        (("hydra.launcher.parallel=1",), (*BEGUN[:-2], "hydra.launcher.parallel=1")),
        (
            ("hydra/launcher=dtune_local", "launch=local"),
            ("-m", "seed=1,2", "hydra/launcher=dtune_local", "launch=local"),
        ),
    ],
)
def test_a_sweep_goes_on_as_it_began_but_for_what_is_said(
    settings: tuple[str, ...], left: tuple[str, ...]
) -> None:
    assert merge_settings(BEGUN, settings) == list(left)


def element(number: int, **launch: Any) -> Element:
    config = SlurmConfig(**{"gpus_per_node": 2, **launch})
    return Element(number, Path(f"/shared/sweep/{number}"), config, 2)


def test_trials_on_the_same_nodes_are_one_array_and_others_another() -> None:
    elements = [element(0), element(2), element(3), element(5, nodes=2), element(6)]
    scripts = scripts_of(Path("/shared/sweep"), elements, 2)
    assert [[one.number for one in kind] for _, kind in scripts] == [[0, 2, 3, 6], [5]]
    first, second = (text for text, _ in scripts)
    assert "#SBATCH --array=0,2-3,6%2\n" in first
    assert "#SBATCH --array=5\n" in second
    assert "#SBATCH --nodes=2\n" in second
    assert re.search(r"^ *3\) run_dir=/shared/sweep/3 ;;$", first, re.MULTILINE)


def test_the_queue_says_which_elements_are_not_over() -> None:
    text = "7_0|RUNNING\n7_1|PENDING\n7_2|COMPLETED\n7_3|COMPLETING\n7_4|NODE_FAIL\n7_5|REQUEUED\n"
    assert parse_queue(text) == {
        "7_0": "running",
        "7_1": "queued",
        "7_3": "running",
        "7_5": "queued",
    }


def test_the_experiment_of_a_winner_holds_what_the_defaults_do_not() -> None:
    before = {"a": 1, "b": {"c": 2, "d": [1, 2]}, "e": {}}
    after = {"a": 1, "b": {"c": 3, "d": [1, 2]}, "e": {"f": 4}}
    assert difference(before, after) == {"b": {"c": 3}, "e": {"f": 4}}
    assert difference(after, after) == {}


@pytest.mark.parametrize(
    ("numbers", "values", "is_log"),
    [
        ([1e-5, 2e-3], "tag(log, interval(1e-5,1e-2))", True),
        ([1e-4, 3e-4, 1e-3], "1e-4,3e-4,1e-3", True),
        ([4, 8, 16, 32], "4,8,16,32", True),
        ([0.1, 0.2, 0.3], "0.1,0.2,0.3", False),
        ([0, 1, 10], "0,1,10", False),
        ([1, 100], "1,100", False),
    ],
)
def test_an_axis_is_logarithmic_where_its_points_are_spaced_so(
    numbers: list[float], values: str, is_log: bool
) -> None:
    assert is_log_spaced(numbers, values) is is_log


def test_words_have_no_axis_of_numbers() -> None:
    assert numbers_of(["1", "2e-3"]) == [1, 0.002]
    assert numbers_of(["1", "lora"]) is None
    assert numbers_of(["1", "nan"]) is None


@pytest.mark.parametrize(
    ("conf", "prefix"),
    [
        (DtuneLocalConf, "hydra.launcher"),
        (DtuneSlurmConf, "hydra.launcher"),
        (DtuneOptunaConf, "hydra.sweeper"),
    ],
)
def test_every_key_of_launchers_and_of_the_search_is_in_the_docs(conf: type, prefix: str) -> None:
    text = DOCS.read_text()
    # They belong to `dtune sweep resume`.
    keys = [key for key in describe_keys(conf) if key.name not in ("_target_", "resume", "pruned")]
    assert len(keys) > 2
    for key in keys:
        row = f"| `{prefix}.{key.name}` | {key.default} | {key.meaning} |"
        assert row in text, row
