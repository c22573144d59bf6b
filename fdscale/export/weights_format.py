"""A checkpoint's student as one student file, written as a stream by one process: no GPU, no other rank, no DeepSpeed.

The ranks' files are memory-mapped and copied part by part, so the memory needed does not grow with the weights.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from torch import Tensor

from fdscale.build.result import student_names
from fdscale.config.errors import UserError
from fdscale.students.files import new_folder, refuse_taken
from fdscale.training.average import AVERAGE
from fdscale.training.lineage import lineage_of
from fdscale.training.manifest import damage, read_manifest
from fdscale.training.partitions import WEIGHT, Partitions, open_partitions
from fdscale.training.run_directory import RunDirectory

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]
CHUNK = 1 << 22  # elements that are converted and written at a time
DTYPES = {  # safetensors' names, in the order in which it sorts tensors
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file to be: its name there, its shape and type, and what the checkpoint calls it."""

    name: str
    shape: Sequence[int]
    dtype: torch.dtype
    source: str
    state: str

    @property
    def size(self) -> int:
        return int(torch.Size(self.shape).numel() * self.dtype.itemsize)


def export_weights(
    run: Path, output: Path, step: int | None = None, precision: Precision = "fp32", average: bool = False
) -> Path:
    """Write `student.safetensors` and `student.json` of a run's checkpoint into the new folder `output`.

    The newest whole checkpoint is taken, or that of `step`; every byte of it is compared with its manifest first.
    Trained weights are the fp32 masters, or their moving `average`, rounded where `precision` is "bf16"; frozen ones
    and buffers stay fp32. Raises UserError for what is no run, a damaged checkpoint, and a run without an average.
    """
    refuse_taken(output)
    description = _description(run)
    partitions = open_partitions(_verified(run, step))
    if average and AVERAGE not in partitions.states:
        raise UserError(f"{partitions.folder}: this run keeps no moving average (optim.ema_decay = 0): leave --ema out")
    entries = planned(partitions, precision, AVERAGE if average else WEIGHT)
    _check_room(entries, output)
    with new_folder(output) as folder:
        try:
            with (folder / "student.safetensors").open("wb") as file:
                stream(partitions, entries, file)
        except OSError as error:
            raise UserError(f"{output} could not be written: {error}; make room, then export again") from error
        shutil.copyfile(description, folder / description.name)
    return output.resolve() / "student.safetensors"


def planned(partitions: Partitions, precision: Precision, state: str) -> list[Entry]:
    """What the file holds, in safetensors' own order: by type, then by name."""
    entries = []
    for name, source in student_names(partitions.names).items():
        trained = partitions.shared.get(source, source) in partitions.trained
        dtype = next(partitions.parts(source)).dtype
        if dtype.is_floating_point:
            dtype = torch.bfloat16 if trained and precision == "bf16" else torch.float32
        entries.append(Entry(name, partitions.names[source], dtype, source, state))
    order = list(DTYPES)
    return sorted(entries, key=lambda entry: (order.index(entry.dtype), entry.name))


def stream(partitions: Partitions, entries: Sequence[Entry], file: BinaryIO) -> None:
    """Write a safetensors file: the header, then every tensor's bytes, part by part."""
    header = json.dumps(_header(entries), separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)
    for entry in entries:
        for chunk in _chunks(partitions.parts(entry.source, entry.state)):
            values = chunk.to(entry.dtype).contiguous()
            file.write(values.view(torch.uint8).numpy().data)
    file.flush()
    os.fsync(file.fileno())


def _header(entries: Sequence[Entry]) -> dict[str, Mapping[str, object]]:
    header: dict[str, Mapping[str, object]] = {}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.size
        header[entry.name] = {
            "dtype": DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    return header


def _chunks(parts: Iterator[Tensor]) -> Iterator[Tensor]:
    for part in parts:
        yield from part.split(CHUNK) if part.numel() else ()


def _description(run: Path) -> Path:
    directory = RunDirectory(run)
    if not directory.recipe.is_file() or not directory.attempts.is_dir():
        raise UserError(f"{run}: not a run directory: --format weights takes the run whose checkpoints are to be read")
    description = directory.student.with_suffix(".json")
    if not description.is_file():
        raise UserError(
            f"{description}: is not there: a run writes it when it starts, unless its student is a network of your "
            "own, of which no student file can tell the geometry; start the run once more, then export again"
        )
    return description


def _verified(run: Path, step: int | None) -> Path:
    """The newest whole checkpoint, or that of one step, read in full."""
    commits = lineage_of(RunDirectory(run).attempts).believed
    tried = [commit.folder for commit in commits if step in (None, commit.step)]
    for folder in tried:
        manifest = read_manifest(folder)
        problems = ["it has gone meanwhile"]
        if manifest is not None:
            problems = damage(folder, manifest, sorted(manifest["files"]))
        if not problems:
            return folder
        logger.warning("%s is not whole: %s", folder, "; ".join(problems[:3]))
    if step is None:
        raise UserError(f"{run}: it has no whole checkpoint to export")
    others = [str(commit.step) for commit in reversed(commits) if commit.step != step]
    why = "is not whole (see above)" if tried else "does not exist"
    raise UserError(f"--step {step}: this checkpoint {why}; others are of the steps {', '.join(others) or '(none)'}")


def _check_room(entries: Sequence[Entry], output: Path) -> None:
    parent = next(folder for folder in output.resolve().parents if folder.exists())
    needed, free = sum(entry.size for entry in entries), shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(
            f"{output}: the weights need {needed / 2**30:,.2f} GiB and {free / 2**30:,.2f} GiB are free there: make "
            "room, or name another output; nothing was written"
        )
