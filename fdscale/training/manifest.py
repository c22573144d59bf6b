"""The manifest that makes a checkpoint folder trusted: every file's size and SHA-256, renamed into place last."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
BLOCK = 1 << 22


def files_of(folder: Path) -> list[str]:
    """The files under a checkpoint folder that a manifest lists, relative and sorted."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in found if not path.name.startswith(MANIFEST))


def writer_of(file: str, world_size: int) -> int:
    """The rank that wrote a file, told by its name: DeepSpeed's (`zero_pp_rank_1_…`) or ours (`rank_1.pt`)."""
    match = re.search(r"rank_(\d+)", Path(file).name)
    return int(match.group(1)) % world_size if match else 0


def describe(folder: Path, files: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file, and all of them forced to the disk: {file: {"size", "sha256"}}.

    Files are hashed while the disk is busy with them: neither waits for the other.
    """
    with ThreadPoolExecutor(max_workers=2) as pool:
        on_disk = [pool.submit(_force, folder / file) for file in files]
        described = {file: _describe(folder / file) for file in files}
        for forced in on_disk:
            forced.result()
    return described


def _force(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def _describe(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as handle:
        while block := handle.read(BLOCK):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def drop_from_memory(path: Path) -> None:
    """Let the system forget a file's contents, so that the next one who reads it asks the disk."""
    with path.open("rb") as handle:
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_manifest(folder: Path, contents: Mapping[str, Any]) -> None:
    """Commit: write beside, force to the disk, rename, force the folder."""
    beside = folder / (MANIFEST + ".new")
    with beside.open("w") as handle:
        json.dump(contents, handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(beside, folder / MANIFEST)
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, or None when it was never committed (or is not one)."""
    try:
        contents = json.loads((folder / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return contents if isinstance(contents, dict) and "files" in contents else None


def damage(folder: Path, manifest: Mapping[str, Any], files: Sequence[str], hashes: bool = True) -> list[str]:
    """What is wrong with those of the manifest's files, one sentence each: by sizes, then by hashes if wanted."""
    found = []
    for file in files:
        recorded, path = manifest["files"][file], folder / file
        if not path.is_file():
            found.append(f"{file} is missing")
        elif path.stat().st_size != recorded["size"]:
            found.append(f"{file} has {path.stat().st_size} bytes, recorded {recorded['size']}")
        elif hashes and _describe(path)["sha256"] != recorded["sha256"]:
            found.append(f"{file} has another SHA-256 than recorded")
    return found


def is_write_failure(error: Exception) -> bool:
    """Whether a file could not be written; torch's writer says so by a RuntimeError, as does a peer that died."""
    return isinstance(error, OSError) or "PytorchStreamWriter" in str(error) or "inline_container" in str(error)
