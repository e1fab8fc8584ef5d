"""The wheel: what is in it, and that it works installed, from any folder, without the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a command of an environment that has the wheel and, of this one, the dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    home = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # As a .pth line it adds the packages there, but not what their own .pth files add: an editable
    # dtune stays out.
    (home / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install"]
    options = ["--no-deps", "--no-index", "--ignore-installed", "--quiet"]
    done = subprocess.run([*pip, *options, wheel], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run_command(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [folder / "bin" / program, *arguments],
            cwd=elsewhere,
            env=clean,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run_command


@pytest.mark.parametrize(
    "wanted",
    [
        "dtune/py.typed",
        "dtune/conf/train.yaml",
        "dtune/conf/peft/lora.yaml",
        "dtune/slurm/train.sbatch",
        "dtune/assets/tiny/model.safetensors",
        "dtune/assets/tiny/tokenizer.json",
        "dtune/assets/instructions/train.jsonl",
        "dtune/assets/instructions/heldout.jsonl",
        "dtune_kernels/__init__.py",
        "dtune_launch/torchrun.py",
        "hydra_plugins/dtune_launcher/local.py",
        "hydra_plugins/dtune_launcher/slurm.py",
        "hydra_plugins/dtune_launcher/search.py",
    ],
)
def test_wheel_holds(names: list[str], wanted: str) -> None:
    assert wanted in names


def test_wheel_holds_every_file_of_conf_and_slurm(names: list[str]) -> None:
    for folder in ("conf", "slurm"):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        assert files
        assert {f"dtune/{path.relative_to(ROOT)}" for path in files} <= set(names)


def test_wheel_holds_nothing_else(names: list[str]) -> None:
    """``kernels`` at the top would shadow the Hub's library, which transformers imports."""
    roots = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert roots == {"dtune", "dtune_kernels", "dtune_launch", "hydra_plugins"}
    assert not [name for name in names if "__pycache__" in name or "_cache/" in name]
    # A namespace that other distributions share.
    assert "hydra_plugins/__init__.py" not in names


def test_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 8 * 2**20


def test_installed_files_come_from_the_wheel_and_shadow_nothing(run: Run) -> None:
    code = """if True:
        import importlib.util, json
        import dtune, dtune_kernels, dtune_launch, hydra_plugins.dtune_launcher
        from dtune.resources import find_data, resolve_path

        modules = (dtune, dtune_kernels, dtune_launch, hydra_plugins.dtune_launcher)
        files = [module.__file__ for module in modules]
        files += [str(find_data("conf", "train.yaml")), str(find_data("slurm", "train.sbatch"))]
        files += [resolve_path("dtune://tiny")]
        found = {name: importlib.util.find_spec(name) for name in ("kernels", "launch", "conf")}
        # The Hub's library may be installed; what must not be found is a folder of ours.
        ours = [name for name, spec in found.items() if spec and "dtune" in str(spec.origin)]
        print(json.dumps({"files": files, "ours": ours}))
    """
    done = run("python", "-c", code)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert not [path for path in told["files"] if path.startswith(str(ROOT))]
    assert told["ours"] == []


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("dtune", "--help"), "dtune train"),
        (("python", "-m", "dtune", "--help"), "dtune train"),
        (("dtune", "train", "--help"), "peft"),
        (("dtune", "config", "peft=full"), "name: full"),
        (("dtune", "train", "--info", "plugins"), "DtuneLocalLauncher"),
        (("dtune", "train", "--info", "plugins"), "DtuneSlurmLauncher"),
        (("dtune", "train", "--info", "plugins"), "DtuneOptunaSweeper"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_installed_command_runs_from_any_folder(
    run: Run, command: tuple[str, ...], said: str
) -> None:
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
