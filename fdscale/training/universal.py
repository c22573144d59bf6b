"""A checkpoint in DeepSpeed's universal format, one file for each weight and state: any number of ranks reads it."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdscale.config.errors import UserError
from fdscale.training.engine import Connection, gather_lists
from fdscale.training.manifest import damage, describe, files_of, is_write_failure, read_manifest, write_manifest
from fdscale.training.partitions import WEIGHT, Partitions, open_partitions

logger = logging.getLogger(__name__)

ROUND = 16  # weights that a rank writes before it waits for the others: no wait comes near a time limit
OPTIMIZER_STATE, MODEL_STATES = "optimizer_state.pt", "*_model_states.pt"


def converted(folder: Path, connection: Connection) -> Path:
    """The universal checkpoint of a verified folder, `universal_<its name>` beside it; made by all ranks together.

    It is written to a temporary folder, committed by a manifest of its own and renamed. An earlier one is used again
    when every byte of it is there. Raises UserError where there is no room for it.
    """
    target = folder.with_name(f"universal_{folder.name}")
    if _is_whole(target, connection):
        return target
    source, began = open_partitions(folder), time.perf_counter()
    scratch = target.with_name(f".{target.name}")
    connection.on_main(lambda: _make_room(source, scratch, target))
    files = _write_together(source, scratch, connection)
    contents = {"source": folder.name, "files": dict(gather_lists(list(files.items()), connection))}
    connection.on_main(lambda: _commit(scratch, target, contents))
    if connection.rank.is_main:
        logger.info("converted to DeepSpeed's universal format in %.0f s: %s", time.perf_counter() - began, target)
    return target


def _is_whole(target: Path, connection: Connection) -> bool:
    manifest = connection.broadcast(read_manifest(target))
    if manifest is None:
        return False
    mine = sorted(manifest["files"])[connection.rank.rank :: connection.rank.world_size]
    return not gather_lists(damage(target, manifest, mine), connection)


def _make_room(source: Partitions, scratch: Path, target: Path) -> None:
    """Remove what an interrupted conversion left, and see that the disk holds the new one."""
    for leftover in (scratch, target):
        shutil.rmtree(leftover, ignore_errors=True)
    needed, free = size_of(source), shutil.disk_usage(scratch.parent).free
    if needed > free:
        raise UserError(
            f"{source.folder}: another number of ranks needs it once more, in DeepSpeed's universal format: "
            f"{needed / 2**30:,.2f} GiB, and {free / 2**30:,.2f} GiB are free there: make room, or start it "
            f"on {len(source.shares)} ranks"
        )
    (scratch / "zero").mkdir(parents=True)


def size_of(source: Partitions) -> int:
    """Bytes of a universal checkpoint, but for its files' headers."""
    trained = sum(source.names[name].numel() for name in source.trained) * 4 * len(source.states)
    fixed = sum(part.nbytes for parts in source.fixed.values() for part in parts)
    return trained + fixed + model_states(source.folder).stat().st_size


def model_states(folder: Path) -> Path:
    """Rank 0's file of counters and of what the loop keeps, in a checkpoint or its universal form."""
    return min(folder.glob(MODEL_STATES), key=lambda path: (len(path.name), path.name))


def _write_together(source: Partitions, scratch: Path, connection: Connection) -> dict[str, dict[str, Any]]:
    """Every rank writes and hashes every so many weights; returns its own files with their sizes and hashes."""
    rank, ranks = connection.rank.rank, connection.rank.world_size
    names = sorted({source.shared.get(name, name) for name in source.names})
    written: list[str] = []
    try:
        if rank == 0:
            written += _write_counters(source, scratch)
        for first in range(0, len(names), ROUND * ranks):
            written += _write_weights(source, scratch, names[first + rank : first + ROUND * ranks : ranks])
            connection.barrier()
        return describe(scratch, written)
    except (OSError, RuntimeError) as error:
        if not is_write_failure(error):
            raise
        raise UserError(
            f"rank {rank} could not write {scratch}: {error}; make room, then start the same command again: what is "
            "there is removed and written anew"
        ) from error


def _write_weights(source: Partitions, scratch: Path, names: Sequence[str]) -> list[str]:
    written = []
    for name in names:
        trained = name in source.trained
        contents: dict[str, Any] = {
            state: {"param": source.read(name, state)} for state in (source.states if trained else (WEIGHT,))
        }
        for state, content in (contents | ({"step": source.updates(name)} if trained else {})).items():
            file = f"zero/{name}/{state}.pt"
            (scratch / file).parent.mkdir(exist_ok=True)
            torch.save(content, scratch / file)
            written.append(file)
    return written


def _write_counters(source: Partitions, scratch: Path) -> list[str]:
    """What is no weight: the loss scale and the optimizer's groups, the counters, what the loop keeps."""
    shutil.copyfile(model_states(source.folder), scratch / model_states(source.folder).name)
    first = next(source.folder.glob("*zero_pp_rank_0_mp_rank_00_optim_states.pt"))
    # DeepSpeed's own objects are in here, which DeepSpeed reads again: nothing inert may take their place
    saved = torch.load(first, map_location="cpu", mmap=True, weights_only=False)["optimizer_state_dict"]
    inner = saved.get("base_optimizer_state") or saved["optimizer_state_dict"]
    divided = ("base_optimizer_state", "optimizer_state_dict", "param_slice_mappings")
    contents = {
        name: value
        for name, value in saved.items()
        if name not in divided and not (isinstance(value, list) and any(isinstance(v, Tensor) for v in value))
    }
    contents["param_groups"] = inner["param_groups"]
    steps = {number: {"step": of_flat["step"]} for number, of_flat in inner["state"].items()}
    contents["optimizer_state_dict"] = {"state": steps, "param_groups": inner["param_groups"]}
    torch.save(contents, scratch / "zero" / OPTIMIZER_STATE)
    return [model_states(source.folder).name, f"zero/{OPTIMIZER_STATE}"]


def _commit(scratch: Path, target: Path, contents: dict[str, Any]) -> None:
    assert sorted(contents["files"]) == files_of(scratch)
    write_manifest(scratch, contents)
    os.replace(scratch, target)
