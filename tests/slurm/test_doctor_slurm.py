"""``dtune doctor --cluster`` inside an allocation looks at its nodes."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

DOCTOR = shlex.join([sys.executable, "-m", "dtune", "doctor", "--cluster"])


@pytest.mark.slow
def test_a_batch_script_has_its_nodes_examined(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(
        *("--nodelist=n[1-2]", "--output=out", "--wrap"),
        f"{DOCTOR} nproc=1 size_mib=1 folder={tmp_path}",
        cwd=tmp_path,
    )
    cluster.wait_for(job, "COMPLETED")
    said = (tmp_path / "out").read_text()
    assert re.findall(r"^ +(\d) +(n\d) ", said, re.MULTILINE) == [("0", "n1"), ("1", "n2")]
    assert re.search(r"n1 - n2 +2 +[\d.]+ GB/s", said)
    assert re.search(r"n2 +[+-]0\.\d ms", said)
    assert said.rstrip().endswith("Problems\n  none")


@pytest.mark.slow
def test_every_node_has_its_ranks_where_the_allocation_is_for_fewer_tasks(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = cluster.submit(
        *("--nodelist=n[1-2]", "--ntasks-per-node=1", "--output=out", "--wrap"),
        f"{DOCTOR} nproc=2 size_mib=1 folder={tmp_path}",
        cwd=tmp_path,
    )
    cluster.wait_for(job, "COMPLETED")
    said = (tmp_path / "out").read_text()
    assert re.findall(r"^ +(\d) +(n\d) ", said, re.MULTILINE) == [
        *(("0", "n1"), ("1", "n1")),
        *(("2", "n2"), ("3", "n2")),
    ]
