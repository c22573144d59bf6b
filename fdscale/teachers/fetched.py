"""What `fdscale fetch` brought: one record a teacher, read by training, which never downloads. No torch in here."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fdscale.config.errors import UserError

WEIGHTS_FOLDER = "FDSCALE_WEIGHTS"
AGAIN = "bring it again with `fdscale fetch RECIPE` on a node with network"


@dataclass(frozen=True)
class Fetched:
    """A teacher's file on this machine: where it came from (`revision` is the commit) and what its bytes must be."""

    path: Path
    repository: str
    revision: str
    sha256: str
    size: int


def weights_folder() -> Path:
    """Where the records lie: `$FDSCALE_WEIGHTS`, else `~/.cache/fdscale/weights`; all nodes must see it."""
    return Path(os.environ.get(WEIGHTS_FOLDER) or "~/.cache/fdscale/weights").expanduser()


def fetched(teacher_name: str, revision: str | None = None) -> Fetched | None:
    """What was fetched for this teacher, at the `revision` its recipe pins, or None.

    Raises UserError for a record that cannot be read. The file itself is looked at by `verify` alone.
    """
    pinned = _read(record_path(teacher_name, revision))
    if pinned is not None or revision is None:
        return pinned
    unpinned = _read(record_path(teacher_name, None))  # what `main` was then may be the commit that is pinned now
    return unpinned if unpinned is not None and unpinned.revision == revision else None


def record(teacher_name: str, revision: str | None, found: Fetched) -> None:
    """Write down what was fetched when `revision` was asked for (None: the newest), whole or not at all."""
    path = record_path(teacher_name, revision)
    text = json.dumps({"teacher": teacher_name, **asdict(found), "path": str(found.path)}, indent=2) + "\n"
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text)
        os.replace(beside, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}): set ${WEIGHTS_FOLDER} to a folder of yours that all "
            "nodes see"
        ) from error


def record_path(teacher_name: str, revision: str | None) -> Path:
    """The record of a teacher, and of each revision that a recipe pins."""
    parts = [teacher_name] if revision is None else [teacher_name, revision]
    return weights_folder() / f"{'@'.join(quote(part, safe=':') for part in parts)}.json"


def _read(path: Path) -> Fetched | None:
    try:
        return _parse(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a record of `fdscale fetch` ({error!r}): remove it, then {AGAIN}") from error


def _parse(stored: Any) -> Fetched:
    found = Fetched(**{field.name: stored[field.name] for field in fields(Fetched)})
    if not isinstance(found.size, int) or not all(
        isinstance(text, str) for text in (found.path, found.repository, found.revision, found.sha256)
    ):
        raise TypeError("a value of the wrong kind")
    return replace(found, path=Path(found.path))


def verify(found: Fetched) -> None:
    """Raise UserError unless the file is there and its size, then its SHA-256, are the recorded ones."""
    size = _size(found.path)
    if size != found.size:
        raise UserError(
            f"teacher.weights: {found.path} has {size} bytes, fetched were {found.size}: it was cut off or replaced; "
            f"{AGAIN}"
        )
    digest = sha256_of(found.path)
    if digest != found.sha256:
        raise UserError(
            f"teacher.weights: {found.path} has SHA-256 {digest}, fetched was {found.sha256}: it was altered; {AGAIN}"
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(
            f"teacher.weights: {path} was fetched and cannot be found now ({error.strerror}): is it on a disk that "
            f"this node does not see? Else {AGAIN}"
        ) from error


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes; raises UserError when it cannot be read."""
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
