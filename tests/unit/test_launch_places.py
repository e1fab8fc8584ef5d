"""What a launch refuses before anything is started: heads, ports, disks, secrets."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
from dtune_launch import disks, network
from dtune_launch.disks import check_shared, file_system
from dtune_launch.network import address_towards, check_port_free, resolve_host, split_head
from dtune_launch.spec import LaunchError

from dtune.cli import main
from dtune.config.compose import compose_overrides
from dtune.config.secret import check_arguments, check_settings
from dtune.errors import ConfigError

TOKEN = "hf_" + "aB3" * 11
WANDB = "0123456789abcdef" * 2 + "01234567"
RESOLVE_SECONDS = 0.8
"""For a name; a refusal takes two seconds with what dtune itself computes, 0.6 of them."""


@pytest.mark.parametrize("head", ["h:1", "10.0.0.1:29400", "[::1]:29400"])
def test_heads_have_host_and_port(head: str) -> None:
    host, port = split_head(head)
    assert (f"{host}:{port}" in head) or head.startswith("[")


@pytest.mark.parametrize("head", ["h", "h:", ":1", "h:x", "h:0", "h:65536"])
def test_other_heads_are_refused(head: str) -> None:
    with pytest.raises(LaunchError, match="must be HOST:PORT"):
        split_head(head)


def test_a_name_that_does_not_resolve_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LaunchError, match=r"head\.invalid does not resolve"):
        resolve_host("head.invalid")

    told = threading.Event()

    def late(*args: object, **kwargs: object) -> object:
        told.wait()
        return [(0, 0, 0, "", ("127.0.0.1", 0))]

    assert network._RESOLVE_SECONDS <= RESOLVE_SECONDS
    monkeypatch.setattr(network.socket, "getaddrinfo", late)
    monkeypatch.setattr(network, "_RESOLVE_SECONDS", 0.05)
    with pytest.raises(LaunchError, match="no answer within"):
        resolve_host("head.example")
    told.set()


def test_the_own_address_is_the_one_on_the_way_to_the_head() -> None:
    assert address_towards("127.0.0.1:29400") == "127.0.0.1"


def test_a_port_that_is_in_use_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"port {port} cannot be taken.*in use"):
            check_port_free(f"127.0.0.1:{port}")
    check_port_free(f"127.0.0.1:{port}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def refusal(run_dir: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """What ``dtune train`` says of a run on two machines, which it refuses without a trace."""
    common = ("parallel=ddp", "launch=torchrun", "launch.nnodes=2", "launch.nproc=1")
    assert main(["train", f"run_dir={run_dir}", *common, *more]) == 2
    assert not run_dir.exists()
    return capsys.readouterr().err


def test_a_run_on_several_machines_is_refused_where_its_head_has_no_address(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = ("launch.head=head.invalid:29400", "launch.shared_disk=true")
    for node_rank in (0, 1):
        said = refusal(tmp_path / "run", capsys, *head, f"launch.node_rank={node_rank}")
        assert "launch.head: the name head.invalid does not resolve" in said


def test_a_run_on_several_machines_is_refused_where_its_port_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        head = f"launch.head=127.0.0.1:{taken.getsockname()[1]}"
        said = refusal(tmp_path / "run", capsys, head, "launch.shared_disk=true")
    assert f"{head}: port" in said
    assert "in use" in said


def test_a_run_on_several_machines_is_refused_where_others_do_not_see_its_folder(
    tmp_path: Path, mounts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(tmp_path / "run", capsys, f"launch.head=127.0.0.1:{free_port()}")
    assert f"run_dir={tmp_path / 'run'}" in said
    assert "launch.shared_disk=true" in said


MOUNTS = """\
20 1 0:20 / / rw - {root} /dev/root rw
21 20 0:21 / /shared rw - nfs4 server:/shared rw
22 20 0:22 / /scratch\\040local rw - ext4 /dev/sdb rw
23 20 0:23 / /ram rw - tmpfs tmpfs rw
24 20 0:24 / /bucket rw - fuse.gcsfuse bucket rw
25 20 0:25 / /stick rw - vfat /dev/sdc1 rw
26 20 0:26 / /juice rw - fuse.juicefs JuiceFS rw
"""


@pytest.fixture(params=["ext4", "overlay"])
def mounts(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    text = MOUNTS.format(root=request.param)
    path = tmp_path / "mountinfo"
    path.write_text(text)
    monkeypatch.setattr(disks, "MOUNTS", path)
    return text


def test_the_file_system_of_a_path_is_that_of_its_nearest_mount(mounts: str) -> None:
    assert file_system(Path("/shared/runs/x"), mounts) == ("nfs4", "/shared")
    assert file_system(Path("/scratch local/x"), mounts) == ("ext4", "/scratch local")
    assert file_system(Path("/sharedx"), mounts)[1] == "/"


def test_disks_that_all_nodes_see_pass_and_own_ones_do_not(mounts: str) -> None:
    for shared in ("/shared/runs/x", "/juice/x"):
        assert check_shared(Path(shared), nodes=2) == []
    for own in ("/ram/x", "/tmp/x", "/dev/shm/x"):
        with pytest.raises(LaunchError, match=r"launch\.shared_disk=true"):
            check_shared(Path(own), nodes=2)
    for place, words in (
        ("/scratch local/x", "unless it is served"),
        ("/stick/x", "unless it is served"),
        ("/bucket/x", "lies on fuse.gcsfuse (/bucket), of which dtune does not know whether"),
    ):
        (warning,) = check_shared(Path(place), nodes=1)
        assert words in warning
        assert "set launch.shared_disk=true" in warning


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        ("log.wandb_token=x", "log.wandb_token"),
        ("+hub.api_key=abc", "hub.api_key"),
        ("++a.password=abc", "a.password"),
        (f"log.wandb_project={TOKEN}", "log.wandb_project"),
        (f"data.path={TOKEN},other", "data.path"),
        (f"log.wandb_project={WANDB}", "log.wandb_project"),
        ("data.path=https://me:pass@host/x.jsonl", "data.path"),
        (f"launch.setup=[export HF_TOKEN={TOKEN}]", "launch.setup"),
        ("launch.setup=[export MY_SECRET=hunter2hunter2]", "launch.setup"),
        ("data.path=/data/in-the-environment/x", "data.path"),
        (f"{TOKEN}", "argument 1"),
    ],
)
def test_a_setting_that_holds_a_secret_is_refused_by_its_name_alone(
    argument: str, name: str
) -> None:
    environ = {"WANDB_API_KEY": "in-the-environment", "HOME": "/data"}
    with pytest.raises(ConfigError, match="environment") as refused:
        check_arguments([argument], environ)
    said = str(refused.value)
    assert said.startswith(f"{name} ")
    value = argument.partition("=")[2] or argument
    for secret in (TOKEN, WANDB, "hunter2", "pass@", "in-the-env"):
        assert secret not in value or secret not in said


@pytest.mark.parametrize(
    "argument",
    [
        "max_new_token=3",
        f"model.revision={WANDB}",
        f"model.path=/hub/models--x/snapshots/{WANDB}",
        "data.path=https://host/x.jsonl",
        "model.path=hf_transformers_baseline",
        "model.added_tokens=[<a>,<b>]",
        "launch.setup=[export HF_TOKEN=$(cat ~/.hf)]",
        "launch.setup=['export WANDB_API_KEY=$KEY']",
        "run_dir=/data/runs/x",
        "--help",
    ],
)
def test_other_settings_are_no_secrets(argument: str) -> None:
    check_arguments([argument], {"HF_TOKEN": "another-value", "MY_TOKEN": "x", "HOME": "/data"})


def test_a_secret_in_a_file_of_settings_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^log\.keys looks like a token"):
        check_settings({"log": {"name": "x", "keys": ["a", TOKEN]}})
    monkeypatch.setenv("HF_TOKEN", "the-value-of-it")
    with pytest.raises(ConfigError, match=r"^data\.path holds the value of the variable HF_TOKEN"):
        compose_overrides("train", ["data.path=${oc.env:HF_TOKEN}"])
