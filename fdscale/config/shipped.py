"""Where the shipped recipes, DeepSpeed JSONs and launchers lie: the repository, or the data of a wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fdscale.config.errors import UserError, nearest

PACKAGE = Path(__file__).resolve().parent.parent

Folder = Literal["recipes", "ds_configs", "launchers"]
SUFFIXES: dict[Folder, str] = {"recipes": ".toml", "ds_configs": ".json", "launchers": ".sh"}


def shipped(folder: Folder) -> Path:
    """The folder of that name: inside the installed package, else beside it in the repository."""
    inside, beside = PACKAGE / folder, PACKAGE.parent / folder
    found = inside if inside.is_dir() else beside
    assert found.is_dir(), f"neither {inside} nor {beside} exists: the installation is incomplete"
    return found


def shipped_names(folder: Literal["recipes", "ds_configs"], suffix: str) -> list[str]:
    """The names that stand for the files of a shipped folder."""
    return sorted(file.stem for file in shipped(folder).glob(f"*{suffix}"))


def shipped_files(name: str) -> list[Path]:
    """Every shipped file of that name: `swinv2_g` (a recipe and a JSON), `swinv2_g.toml`, `fd_swinv2g`.

    Raises UserError naming the nearest name and all of them.
    """
    files = [file for folder, suffix in SUFFIXES.items() for file in sorted(shipped(folder).glob(f"*{suffix}"))]
    found = [file for file in files if name in (file.name, file.stem)]
    if not found:
        close = nearest(name, [known for file in files for known in (file.stem, file.name)])
        raise UserError(f"nothing shipped is called {name!r}{close}; known: {', '.join(file.name for file in files)}")
    return found


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
