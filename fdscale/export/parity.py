"""Whether an exported folder gives what fdscale gives: asked of a process that cannot import fdscale.

fdscale's own outputs come first and are put aside, then the reader runs: the network is in memory once at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import load_file, save_file

from fdscale.config.errors import UserError
from fdscale.export import reader
from fdscale.export.finished import Finished
from fdscale.export.own_outputs import own_outputs, sample_images, sizes_of
from fdscale.tokens import as_tokens

LIMIT = 1e-4  # of the largest value; fp32 in another order of operations stays below 1e-5
Size = tuple[int, int]


@dataclass(frozen=True)
class Row:
    """One size: the largest difference, absolute and as a share of the largest value; `exact`: it is guaranteed."""

    size: str
    exact: bool
    absolute: float
    relative: float


@dataclass(frozen=True)
class Report:
    """What the reader found: keys that were missing or left over, and a row for each size."""

    format: str
    images: str
    missing_keys: Sequence[str]
    unexpected_keys: Sequence[str]
    rows: Sequence[Row]
    versions: Mapping[str, str]

    def problems(self) -> list[str]:
        """Why the export must not be used, one sentence each."""
        found = [
            f"{len(names)} {what} keys ({', '.join(names[:3])})"
            for what, names in (("missing", self.missing_keys), ("unexpected", self.unexpected_keys))
            if names
        ]
        wrong = [row for row in self.rows if row.exact and not row.relative <= LIMIT]
        found += [f"outputs at {row.size} differ by {row.relative:.1e} of the largest value" for row in wrong]
        return found

    def as_json(self) -> str:
        return json.dumps({"limit": LIMIT, **asdict(self)}, indent=1) + "\n"


@dataclass(frozen=True)
class Prepared:
    """A folder with images and fdscale's own outputs for them, before there is an export."""

    work: Path
    student: Finished
    images: str
    width: int

    def compare(self, format: str, exact: Callable[[Size], bool]) -> Report:
        """The report, once `read_exports` has run; `exact` says at which sizes the format guarantees the outputs."""
        expected, found = (load_file(self.work / f"{name}.safetensors") for name in ("expected", "outputs"))
        keys = json.loads((self.work / "keys.json").read_text())
        rows = []
        for name, wanted in expected.items():
            given = found[name] if self.student.head else as_tokens(found[name], self.width)
            absolute = float((given - wanted).abs().max())
            largest = float(wanted.abs().max()) or 1.0
            rows.append(Row(name, exact(_size(name)), absolute, absolute / largest))
        rows.sort(key=lambda row: _size(row.size))
        missing, unexpected = (sorted(set(keys[kind])) for kind in ("missing", "unexpected"))
        return Report(format, self.images, missing, unexpected, rows, _versions(format))


def prepared(student: Finished, work: Path, sizes: Sequence[Size]) -> Prepared:
    """Take the images at these sizes and put fdscale's own outputs aside."""
    work.mkdir(parents=True, exist_ok=True)
    images, told = sample_images(sizes, student.shown)
    named = {f"{height}x{width}": batch for (height, width), batch in images.items()}
    save_file(named, work / "images.safetensors")
    outputs, width = own_outputs(student, named)
    save_file(outputs, work / "expected.safetensors")
    return Prepared(work, student, told, width)


@contextmanager
def checked(student: Finished) -> Iterator[Prepared]:
    """fdscale's own outputs in a folder that goes away afterwards."""
    with tempfile.TemporaryDirectory(prefix="fdscale-parity-") as folder:
        yield prepared(student, Path(folder), sizes_of(student.geometry))


def ask(check: Prepared, format: str, folder: Path, exact: Callable[[Size], bool]) -> Report:
    """Read the exported folder elsewhere; raises UserError when it does not load or does not give the same."""
    order(check.work, format, folder)
    read_exports([check.work])
    report = check.compare(format, exact)
    if found := report.problems():
        raise UserError(f"the export was taken back: read by {format} without fdscale, it has " + "; ".join(found))
    return report


def order(work: Path, format: str, folder: Path) -> None:
    """What the reader is to do in `work`."""
    path = [entry for entry in sys.path if entry]  # -I leaves PYTHONPATH and a user's own packages out
    (work / "job.json").write_text(json.dumps({"format": format, "folder": str(folder.resolve()), "path": path}))


def read_exports(works: Sequence[Path]) -> None:
    """Read the exports of these folders in one process without fdscale; raises UserError when it fails."""
    command = [sys.executable, "-I", "-B", reader.__file__, *map(str, works)]
    # what an exported model file needs is copied beside the images, not among what the user has downloaded
    offline = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(works[0] / "modules"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise UserError(f"the export was taken back: it does not load where fdscale is not installed: {last[0]}")


def _size(name: str) -> Size:
    height, _, width = name.partition("x")
    return int(height), int(width)


def _versions(format: str) -> dict[str, str]:
    return {name: version(name) for name in dict.fromkeys(("torch", "timm", format))}
