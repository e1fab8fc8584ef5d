"""The tests' own cluster: what the other tests of this folder build on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, ClusterError, one_host_cluster


def test_a_job_sees_two_nodes_and_their_gpus(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(
        *("--nodelist=n[2-3]", "--gpus-per-node=2", "--output=out", "--wrap"),
        'srun sh -c "echo \\$SLURMD_NODENAME \\$CUDA_VISIBLE_DEVICES"',
        cwd=tmp_path,
    )
    cluster.wait_for(job, "COMPLETED")
    assert sorted((tmp_path / "out").read_text().splitlines()) == ["n2 0,1", "n3 0,1"]
    failing = cluster.submit("--wrap", "exit 3", cwd=tmp_path)
    with pytest.raises(ClusterError, match=f"job {failing} is FAILED"):
        cluster.wait_for(failing, "COMPLETED")


def test_a_lost_node_and_an_ended_cluster_leave_no_process(
    cluster: Cluster, tmp_path: Path
) -> None:
    with one_host_cluster() as mine:
        for node in ("n1", "n2"):
            command = f"echo $$ > new-{node}; mv new-{node} {node}; exec sleep 600"
            mine.submit(f"--nodelist={node}", "--wrap", command, cwd=tmp_path)
        pids = {node: tmp_path / node for node in ("n1", "n2")}
        mine.wait_until(lambda: all(path.is_file() for path in pids.values()), "both run")
        assert mine.folder != cluster.folder
        mine.kill_node("n1")
        assert not is_running(pids["n1"])
        assert is_running(pids["n2"])
    assert not is_running(pids["n2"])
    assert not mine.folder.exists()
    assert cluster.client("sinfo", "-h", "-o", "%D %T", "-t", "down") == ""


def is_running(pid: Path) -> bool:
    """Whether the process lives that wrote its number there."""
    stat = Path("/proc", pid.read_text().strip(), "stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_its_environment_is_that_of_the_submitter(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit("--output=out", "--wrap", "env", cwd=tmp_path, env={"OF_THE_TEST": "yes"})
    cluster.wait_for(job, "COMPLETED")
    words = (tmp_path / "out").read_text().splitlines()
    assert "OF_THE_TEST=yes" in words
    assert f"HOME={os.environ['HOME']}" in words
