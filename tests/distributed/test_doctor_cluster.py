"""``dtune doctor --cluster``: what is well is said, and each illness is named with its node."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dtune.doctor.traffic import (
    MOST_NODES_IN_PAIRS,
    Speed,
    network_of_nccl,
    pairs,
    rdma_devices,
    slow_pairs,
    verdict,
)
from tests.distributed.pool import Pool

CASES = "tests.distributed.doctor_cases:"


def test_two_healthy_nodes_are_shown_rank_by_rank(two_ranks: Pool, tmp_path: Path) -> None:
    one, other = two_ranks.run(f"{CASES}healthy", folder=str(tmp_path))
    assert one.problems == other.problems == []
    text = " ".join(one.text.split())
    for said in ("0 n1 0 127.0.0.1 lo CPU", "1 n2 1", "between nodes open", "gloo over TCP"):
        assert said in text
    speed = re.search(r"n1 - n2 2 ([\d.]+) GB/s ([\d.]+) GB/s", text)
    assert speed
    assert all(float(number) > 0 for number in speed.groups())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seconds", [30.0, -30.0])
def test_a_clock_that_is_off_is_named(two_ranks: Pool, tmp_path: Path, seconds: float) -> None:
    found = two_ranks.run(f"{CASES}skewed", folder=str(tmp_path), seconds=seconds)[0]
    assert len(found.problems) == 1
    assert f"the clock of n2 is {seconds:+.1f} s from that of n1" in found.problems[0]


def test_a_folder_that_is_not_shared_is_told_on_both_nodes(two_ranks: Pool, tmp_path: Path) -> None:
    sights = two_ranks.run(f"{CASES}own_folders", folder=str(tmp_path))[0]
    assert "does not see what rank 1 wrote" in sights[0].problem
    assert "does not see what rank 0 wrote" in sights[1].problem
    assert [list(disk.iterdir()) for disk in tmp_path.iterdir()] == [[], []]


def test_a_closed_port_is_told_with_the_direction(two_ranks: Pool) -> None:
    lines = two_ranks.run(f"{CASES}walled")[0]
    assert len(lines) == 1
    assert lines[0].startswith("n1 cannot reach n2 at 127.0.0.1:")


def test_a_slow_pair_is_named_and_two_pairs_are_not_judged() -> None:
    speeds = [Speed(f"n{a} - n{b}", 2, 10.0, 10.0) for a, b in ((1, 2), (1, 3))]
    slow = Speed("n2 - n3", 2, 4.0, 10.0)
    assert slow_pairs([*speeds, Speed("in n1", 8, 1.0, 1.0)]) == []
    assert [line.split(":")[0] for line in slow_pairs([*speeds, slow])] == ["n2 - n3"]


def test_pairs_of_many_nodes_are_a_ring() -> None:
    assert pairs([0, 1, 2]) == [(0, 1), (0, 2), (1, 2)]
    many = list(range(MOST_NODES_IN_PAIRS + 1))
    ring = pairs(many)
    assert len(ring) == len(many)
    assert {node for pair in ring for node in pair} == set(many)


@pytest.mark.parametrize(
    ("log", "network"),
    [
        ("n1:7 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB\nn1 NCCL INFO Using network IB\n", "IB"),
        ("n1:7 [0] NCCL INFO Using network Socket\n", "Socket"),
        ("", ""),
    ],
)
def test_what_nccl_uses_is_read_from_what_it_says(log: str, network: str) -> None:
    assert network_of_nccl(log) == network


def test_sockets_beside_rdma_that_is_up_are_a_problem(tmp_path: Path) -> None:
    for port, state in (("1", "4: ACTIVE"), ("2", "1: DOWN")):
        folder = tmp_path / "mlx5_0" / "ports" / port
        folder.mkdir(parents=True)
        (folder / "state").write_text(f"{state}\n")
        (folder / "rate").write_text("400 Gb/sec (4X NDR)\n")
    devices = rdma_devices(tmp_path)
    assert devices == ["mlx5_0/1 400 Gb/sec (4X NDR)"]
    assert "NCCL_IB_HCA" in verdict("Socket", devices, ["eth0"])[1]
    assert verdict("Socket", [], ["eth0"]) == ("NCCL over TCP sockets of eth0", "")
    assert verdict("IB", devices, ["eth0"]) == ("NCCL over IB", "")


@pytest.mark.slow
def test_the_command_starts_its_ranks_and_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dtune", "doctor", "--cluster"]
    done = subprocess.run(
        [*command, f"folder={tmp_path}", "size_mib=1", "nproc=2"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("Problems\n  none")
    wrong = subprocess.run([*command, "foldr=x"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "did you mean folder" in wrong.stderr
