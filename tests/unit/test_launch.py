"""From a job to processes: commands, environment, signals, exit codes."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from dtune_launch import gpus
from dtune_launch.local import (
    describe_job,
    exit_code,
    forwarding_signals,
    job_command,
    kill_tree,
    run_job,
    start_job,
)
from dtune_launch.spec import JobSpec, LaunchConfig
from dtune_launch.torchrun import job_environment, torchrun_command

from dtune.cli import main
from dtune.commands.train import check_agent
from dtune.runtime.watch.schema import WatchConfig

ROOT = Path(__file__).parents[2]

# A rank without torch: says that it runs, then does what its first argument says.
RANK = """
import os, signal, sys, time
from pathlib import Path
how, folder = sys.argv[1], Path(sys.argv[2])
rank, attempt = os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
stop = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: stop.append(number))
# Held back until there is somebody to hear them, as for the ranks of dtune.
signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGUSR1))
print("out of rank", rank, flush=True)
(folder / f"started-{rank}-{attempt}").touch()
if how == "fail" and rank == "1":
    sys.exit(7)
if how == "wrong" and rank == "1":
    # The agent ends the others at once, also those that have not got as far as to say so.
    while not (folder / f"started-0-{attempt}").exists():
        time.sleep(0.01)
    sys.exit(2)
if how == "die-once" and rank == "1" and attempt == "0":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "save":
    while not stop:
        time.sleep(0.01)
    (folder / f"saved-{rank}").touch()
if how == "stuck":
    time.sleep(60)
"""


@pytest.fixture
def rank_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "rank_of_test.py").write_text(RANK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "rank_of_test"


def job(module: str, how: str, folder: Path, **kwargs) -> JobSpec:
    return JobSpec(module, (how, str(folder)), folder / "run", **kwargs)


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 240
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"none of {paths} came"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"nproc": "0"}, "launch.nproc=0"),
        ({"nproc": "-3"}, "launch.nproc=-3"),
        ({"nproc": "many"}, "launch.nproc=many"),
        ({"max_restarts": -1}, "launch.max_restarts=-1"),
    ],
)
def test_wrong_launch_config_names_its_key(wrong: dict[str, object], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        LaunchConfig(**wrong)


@pytest.mark.parametrize(
    ("nproc", "engine", "devices", "expected"),
    [
        ("auto", "single", 8, 1),
        ("auto", "fsdp", 8, 8),
        ("auto", "ddp", 0, 2),
        ("3", "fsdp", 8, 3),
        ("2", "single", 0, 2),
    ],
)
def test_nproc_auto_is_one_a_gpu(nproc, engine, devices, expected) -> None:
    assert gpus.resolve_nproc(LaunchConfig(nproc=nproc), engine=engine, gpus=devices) == expected


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["0", "1", "2"]),
        ("1,2", ["1", "2"]),
        ("", []),
        ("-1", []),
        ("0,-1,2", ["0"]),
        ("GPU-8f2c", ["GPU-8f2c"]),
    ],
)
def test_gpus_are_those_of_the_driver_that_cuda_may_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: list[str]
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nfor i in 0 1 2; do echo GPU $i: H200; echo '  MIG 1g'; done\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    gpus.count_present.cache_clear()
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus.visible_gpus() == expected
    assert gpus.count_gpus() == len(expected)
    gpus.count_present.cache_clear()


def test_one_process_needs_no_agent_but_restarts_do(tmp_path: Path) -> None:
    alone = JobSpec("dtune.worker", ("RUN",), tmp_path)
    assert job_command(alone) == [sys.executable, "-m", "dtune.worker", "RUN"]
    restarted = dataclasses.replace(alone, max_restarts=2)
    assert "--max-restarts=2" in job_command(restarted)
    # torchrun refuses an empty one.
    assert not any(option.startswith("--redirects") for option in job_command(restarted))


def test_torchrun_takes_a_free_port_and_logs_into_the_run(tmp_path: Path) -> None:
    command = torchrun_command(JobSpec("dtune.worker", ("RUN",), tmp_path, nproc=3))
    assert "--nproc-per-node=3" in command
    assert "--rdzv-endpoint=127.0.0.1:0" in command
    assert f"--log-dir={tmp_path / 'logs'}" in command
    assert "--redirects=1:3,2:3" in command
    assert command[-3:] == ["--module", "dtune.worker", "RUN"]


def test_environment_disables_the_shared_store_and_keeps_what_the_user_set(tmp_path: Path) -> None:
    spec = JobSpec("m", (), tmp_path, nproc=4, env={"EXTRA": "1"})
    added = job_environment(spec, {}, cores=10)
    assert added["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert added["OMP_NUM_THREADS"] == "2"
    assert added["EXTRA"] == "1"
    assert "OMP_NUM_THREADS" not in job_environment(spec, {"OMP_NUM_THREADS": "5"}, cores=10)
    assert job_environment(spec, {}, cores=2)["OMP_NUM_THREADS"] == "1"


def shutdown_timeout(base: Mapping[str, str], **kwargs: float) -> int:
    spec = JobSpec("m", (), Path("run"), **kwargs)  # type: ignore[arg-type]
    return int({**base, **job_environment(spec, base, cores=2)}["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])


def test_a_stopped_job_has_longer_to_end_than_a_save_may_be_silent() -> None:
    assert JobSpec.save_seconds == WatchConfig().save
    assert shutdown_timeout({}) > WatchConfig().save
    assert shutdown_timeout({}, save_seconds=9000.0) > 9000
    # Without a limit, and with one that the user has set.
    assert shutdown_timeout({}, save_seconds=0.0) > 9000
    assert shutdown_timeout({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}) == 5


@pytest.mark.parametrize("sweep", [(), ("-m", "seed=1,2")])
def test_what_a_config_allows_a_save_reaches_its_job(
    sweep: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = f"{'hydra.sweep.dir' if sweep else 'run_dir'}={tmp_path / 'run'}"
    settings = ("parallel=ddp", "launch.nproc=2", "watch.save=9000", "launch.dry_run=true")
    assert main(["train", *sweep, *settings, place]) == 0
    given = re.findall(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", capsys.readouterr().out)
    assert given == ["9300"] * (2 if sweep else 1)


def test_an_own_torchrun_whose_restarts_would_hang_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rank = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    agent = {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in {**rank, **agent}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", f"run_dir={tmp_path / 'run'}", "parallel=ddp"]) == 2
    assert "needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    for name, value in (
        ("TORCHELASTIC_MAX_RESTARTS", "0"),
        ("TORCHELASTIC_USE_AGENT_STORE", "False"),
    ):
        check_agent({**agent, name: value})


def test_dry_run_says_a_command_that_a_shell_takes(tmp_path: Path) -> None:
    text = describe_job(JobSpec("m", ("a b",), tmp_path, nproc=2))
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in text
    assert text.endswith("m 'a b'")
    subprocess.run(["bash", "-n", "-c", text], check=True)


def test_launching_imports_no_torch() -> None:
    code = "import sys, dtune_launch.local; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_exit_code_of_one_process_is_passed_on(rank_module: str, tmp_path: Path) -> None:
    assert run_job(job(rank_module, "end", tmp_path)) == 0
    assert exit_code(-9) == 137


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_job_that_is_stopped_before_it_is_started_is_not_started(
    rank_module: str, tmp_path: Path, nproc: int
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    code = run_job(job(rank_module, "end", tmp_path, nproc=nproc), lambda: True)
    assert code == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("started-*"))
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_two_ranks_end_the_first_on_the_terminal_the_other_in_a_file(
    rank_module: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_job(job(rank_module, "end", tmp_path, nproc=2)) == 0
    assert capfd.readouterr().out == "out of rank 0\n"
    (log,) = (tmp_path / "run" / "logs").glob("*/attempt_0/1/stdout.log")
    assert log.read_text() == "out of rank 1\n"


def test_code_of_the_failed_rank_is_passed_on_without_a_traceback(
    rank_module: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_job(job(rank_module, "fail", tmp_path, nproc=2)) == 7
    said = capfd.readouterr().err
    assert "rank 1 exited with 7" in said
    assert "Traceback" not in said


def test_ranks_restart_after_one_was_killed(rank_module: str, tmp_path: Path) -> None:
    assert run_job(job(rank_module, "die-once", tmp_path, nproc=2, max_restarts=1)) == 0
    for rank in (0, 1):
        assert (tmp_path / f"started-{rank}-1").exists()


def test_ranks_with_a_wrong_config_are_not_started_again(
    rank_module: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_job(job(rank_module, "wrong", tmp_path, nproc=2, max_restarts=3)) == 2
    assert sorted(path.name for path in tmp_path.glob("started-*")) == [
        "started-0-0",
        "started-1-0",
    ]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("nproc", [1, 2])
def test_every_rank_saves_when_the_launcher_is_signalled(
    rank_module: str, tmp_path: Path, number: signal.Signals, nproc: int
) -> None:
    ranks = range(nproc)
    running: list[subprocess.Popen[bytes]] = []
    with forwarding_signals(running) as received:
        running.append(start_job(job(rank_module, "save", tmp_path, nproc=nproc)))
        wait_for(*(tmp_path / f"started-{rank}-0" for rank in ranks))
        os.kill(os.getpid(), number)
        running[0].wait(timeout=240)
    assert received == [number]
    assert all((tmp_path / f"saved-{rank}").exists() for rank in ranks)


def test_an_agent_that_alone_is_signalled_tells_its_ranks(rank_module: str, tmp_path: Path) -> None:
    """As Slurm does where it knows only the tasks that it has started."""
    agent = subprocess.Popen(
        job_command(job(rank_module, "save", tmp_path, nproc=2)),
        preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
        start_new_session=True,
    )
    try:
        wait_for(tmp_path / "started-0-0", tmp_path / "started-1-0")
        agent.send_signal(signal.SIGUSR1)
        assert agent.wait(timeout=240) == 0
    finally:
        kill_tree(agent.pid)
    assert all((tmp_path / f"saved-{rank}").exists() for rank in range(2))


def test_a_second_interrupt_kills_the_whole_tree(rank_module: str, tmp_path: Path) -> None:
    running: list[subprocess.Popen[bytes]] = []
    with forwarding_signals(running):
        running.append(start_job(job(rank_module, "stuck", tmp_path, nproc=2)))
        wait_for(tmp_path / "started-0-0", tmp_path / "started-1-0")
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert exit_code(running[0].wait(timeout=120)) == 128 + signal.SIGKILL
    assert not list(_processes_of(str(tmp_path)))


def _processes_of(text: str) -> Iterator[int]:
    """Living processes whose command line holds ``text``."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text.encode() in path.read_bytes():
                yield int(path.parent.name)
        except OSError:
            continue  # It has just ended.


@pytest.mark.parametrize("script", ["slurm/train.sbatch", ".ci/run"])
def test_shell_scripts_parse(script: str) -> None:
    done = subprocess.run(["bash", "-n", ROOT / script], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
