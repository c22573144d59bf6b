"""Where the shipped recipes, DeepSpeed JSONs and launchers lie: the repository, or the data of a wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fdscale.config.errors import UserError, nearest

PACKAGE = Path(__file__).resolve().parent.parent


def shipped(folder: Literal["recipes", "ds_configs", "launchers"]) -> Path:
    """The folder of that name: inside the installed package, else beside it in the repository."""
    inside, beside = PACKAGE / folder, PACKAGE.parent / folder
    found = inside if inside.is_dir() else beside
    assert found.is_dir(), f"neither {inside} nor {beside} exists: the installation is incomplete"
    return found


def shipped_names(folder: Literal["recipes", "ds_configs"], suffix: str) -> list[str]:
    """The names that stand for the files of a shipped folder."""
    return sorted(file.stem for file in shipped(folder).glob(f"*{suffix}"))


def find(what: str, name_or_path: str, folder: Literal["recipes", "ds_configs"], suffix: str) -> Path:
    """The file meant by a shipped name (`swinv2_g`) or by a path (`mine.toml`, `./mine.toml`).

    Raises UserError naming the nearest shipped name and all of them.
    """
    names = shipped_names(folder, suffix)
    if name_or_path in names:
        return shipped(folder) / f"{name_or_path}{suffix}"
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    if path.suffix == suffix or len(path.parts) > 1:
        raise UserError(f"{what} {name_or_path!r}: no such file; shipped names: {', '.join(names)}")
    suggestion = nearest(name_or_path, names)
    raise UserError(f"unknown {what} {name_or_path!r}{suggestion}; known: {', '.join(names)}, or a path")
