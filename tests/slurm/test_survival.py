"""Training in real SLURM jobs of two nodes: preempted, or robbed of a node, and gone on with."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from dtune.runtime.status import State, read_status
from tests.slurm.cluster import Cluster
from tests.slurm.faults import Ended, differences, finish, lose_node, preempt, start_whole
from tests.slurm.training import HOLD_AT, STEPS, steps_of, submit_dtune

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def preempted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """By ``dtune train launch=slurm``; the others are launched otherwise, which changes nothing."""
    run_dir = tmp_path_factory.mktemp("preempted") / "run"
    return preempt(cluster, run_dir, submit=submit_dtune)


@pytest.fixture(scope="module")
def whole_and_robbed(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Ended, Ended]:
    """One that nothing happens to, by ``slurm/train.sbatch``; beside it one that loses a node."""
    folder = tmp_path_factory.mktemp("others")
    whole = start_whole(cluster, folder / "whole")
    by_srun = partial(submit_dtune, launcher="slurm_srun")
    robbed = lose_node(cluster, folder / "robbed", submit=by_srun)
    return finish(cluster, whole, folder / "whole"), robbed


def test_a_preempted_job_requeues_itself_and_ends_as_if_nothing_had_been(
    preempted: Ended, whole_and_robbed: tuple[Ended, Ended]
) -> None:
    whole = whole_and_robbed[0]
    assert (preempted.restarts, whole.restarts) == (1, 0)
    assert differences(preempted, whole) == []
    assert steps_of(preempted.run_dir, "resume") == [HOLD_AT]
    assert read_status(preempted.run_dir).state is State.done
    # The comparison can fail.
    assert "is requeued" in differences(whole, whole)
    assert differences(replace(preempted, restarts=2), whole) == ["goes on each time"]


def test_a_job_that_lost_a_node_goes_on_from_its_last_checkpoint(
    whole_and_robbed: tuple[Ended, Ended],
) -> None:
    whole, robbed = whole_and_robbed
    assert differences(robbed, whole) == []


def test_the_output_of_a_preempted_job_is_appended_to(preempted: Ended) -> None:
    said = preempted.output
    parts = ["restart 0", "USR1, saving", f"preempted at step {HOLD_AT}", "restart 1", "done at"]
    assert [part for part in parts if said.count(part) != 1] == []
    assert sorted(parts, key=said.index) == parts
    logs = "".join(path.read_text() for path in preempted.run_dir.glob("logs/node-*.log"))
    assert f"step 1/{STEPS}" in logs
    assert f"step {STEPS}/{STEPS}" in logs
