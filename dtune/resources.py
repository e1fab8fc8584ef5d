"""Files that come with dtune: found beside the package (wheel) or above it (checkout)."""

from __future__ import annotations

import difflib
from pathlib import Path

from dtune.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent
SCHEME = "dtune://"


def find_data(name: str, probe: str) -> Path:
    """Folder of data called ``name`` (``conf``, ``slurm``) that holds the file ``probe``.

    A wheel carries it inside the package, a checkout and an editable install beside it.

    Raises:
        FileNotFoundError: Neither place has it: the installation is broken.
    """
    candidates = (PACKAGE / name, PACKAGE.parent / name)
    for folder in candidates:
        if (folder / probe).is_file():
            return folder
    looked = " nor ".join(str(folder / probe) for folder in candidates)
    raise FileNotFoundError(f"dtune's own file is missing, neither {looked}; install dtune again")


def resolve_path(path: str) -> str:
    """Turn ``dtune://tiny`` into the path of the embedded file or folder; others are unchanged.

    Raises:
        ConfigError: No embedded file or folder has this name.
    """
    if not path.startswith(SCHEME):
        return path
    name = path.removeprefix(SCHEME).strip("/")
    known = _embedded_names()
    if name in known:
        return str(PACKAGE / "assets" / name)
    folders = [choice for choice in known if "/" not in choice]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or folders
    choices = ", ".join(f"{SCHEME}{choice}" for choice in near)
    raise ConfigError(f"{path} is not embedded in dtune; did you mean {choices}?")


def find_folder(path: str, key: str) -> Path | None:
    """The folder that a path or ``dtune://NAME`` means; None where it can be a name on the Hub.

    Raises:
        ConfigError: It can be neither; ``key`` is the config key that it stands in.
    """
    resolved = resolve_path(path)
    folder = Path(resolved).expanduser()
    if folder.is_dir():
        return folder
    if resolved == path and path.count("/") == 1 and not path.startswith((".", "/", "~")):
        return None
    raise ConfigError(f"{key}={path}: there is no such folder")


def _embedded_names() -> list[str]:
    """Folders of dtune/assets, and the files in them, relative to it."""
    assets = PACKAGE / "assets"
    folders = [f for f in sorted(assets.iterdir()) if f.is_dir() and f.name != "__pycache__"]
    names = [folder.name for folder in folders]
    names += [f"{file.parent.name}/{file.name}" for d in folders for file in sorted(d.iterdir())]
    return names
