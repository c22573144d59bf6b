"""Checkpoints that are committed: written by every rank, hashed, and trusted only once the manifest is in place."""

from __future__ import annotations

import logging
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fdscale.config.errors import UserError
from fdscale.training.elastic import load_universal
from fdscale.training.engine import Connection, gather_lists
from fdscale.training.manifest import (
    damage,
    describe,
    files_of,
    is_write_failure,
    read_manifest,
    write_manifest,
    writer_of,
)
from fdscale.training.partitions import ORDER
from fdscale.training.universal import converted

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoint folder of a run, `step_00000200` and so on, used by every rank together."""

    def __init__(self, folder: Path, connection: Connection, keep: int) -> None:
        self.folder, self.connection, self.keep = folder, connection, keep
        self.rank, self.world_size = connection.rank.rank, connection.rank.world_size

    def save(self, engine: DeepSpeedEngine, step: int, state: dict[str, Any]) -> None:
        """Write and commit step `step`; `state` is what the loop needs to go on (equal on all ranks).

        Raises UserError when this rank cannot write; the previous checkpoint stays as it was.
        """
        target = self.folder / f"step_{step:08d}"
        self.connection.on_main(lambda: shutil.rmtree(target, ignore_errors=True))  # what an interrupted attempt left
        try:
            names = {ORDER: optimizer_names(engine)}
            engine.save_checkpoint(str(self.folder), tag=target.name, client_state=state | names, save_latest=False)
            torch.save(random_state(), target / f"rank_{self.rank}.pt")
            self.connection.barrier()  # every rank's files are there
            files = self._describe_all(target)
            manifest = {"step": step, "world_size": self.world_size, "files": files}
            self.connection.on_main(lambda: write_manifest(target, manifest))
        except (OSError, RuntimeError) as error:
            if not is_write_failure(error):
                raise
            raise UserError(self._write_failure(target, error)) from error
        self.connection.on_main(lambda: self._prune(step))

    def load(self, engine: DeepSpeedEngine) -> dict[str, Any] | None:
        """Resume from the newest complete checkpoint; returns the loop's state, or None when none was ever committed.

        Hashes are checked before anything is loaded; what is skipped is said, with the reason, and set aside. Raises
        UserError when checkpoints were committed but none is whole: starting anew would overwrite what they tell.
        """
        chosen, damaged = self._newest_complete()
        if chosen is None:
            if damaged:
                raise UserError(
                    f"{self.folder}: {len(damaged)} checkpoints were committed and none is whole (see above): is this "
                    "folder shared by all nodes? To start anew, move them away"
                )
            return None
        self.connection.on_main(lambda: [path.rename(path.with_name(f"damaged_{path.name}")) for path in damaged])
        saved_by = self.connection.broadcast(read_manifest(chosen) or {})["world_size"]
        if saved_by == self.world_size or not engine.zero_optimization():  # ZeRO-0 divides nothing
            _, state = engine.load_checkpoint(str(self.folder), tag=chosen.name, load_lr_scheduler_states=False)
        else:
            state = load_universal(engine, converted(chosen, self.connection))
        _divide_persistent(engine)
        _forget_second_copies(engine)
        self._restore_generators(chosen, saved_by, engine.global_steps)
        return state

    def _restore_generators(self, chosen: Path, saved_by: int, step: int) -> None:
        """This rank's generators as they were; among another number of ranks they begin anew, from seed and step."""
        if saved_by == self.world_size:
            restore_random_state(torch.load(chosen / f"rank_{self.rank}.pt", weights_only=True))
            self._tell(f"resumed from {chosen}")
            return
        torch.manual_seed(torch.initial_seed() + step)
        self._tell(
            f"resumed from {chosen}, saved by {saved_by} ranks, on {self.world_size}: samples, views, drop path and "
            "optimizer go on as they were; a network's own dropout, if it has any, draws other values"
        )

    def _newest_complete(self) -> tuple[Path | None, list[Path]]:
        """The newest whole checkpoint, and newer folders that were committed and are damaged."""
        damaged: list[Path] = []
        for folder in self.connection.broadcast(sorted(self.folder.glob("step_*"), reverse=True)):
            manifest = self.connection.broadcast(read_manifest(folder))
            problems = ["it was never committed (no manifest)"] if manifest is None else self._damage(folder, manifest)
            if not problems:
                return folder, damaged
            self._tell(f"skipped {folder}: {'; '.join(problems[:3])}")
            damaged += [folder] if manifest is not None else []
        return None, damaged

    def _damage(self, folder: Path, manifest: dict[str, Any]) -> list[str]:
        mine = sorted(manifest["files"])[self.rank :: self.world_size]
        return gather_lists(damage(folder, manifest, mine), self.connection)

    def _describe_all(self, folder: Path) -> dict[str, Any]:
        mine = [file for file in files_of(folder) if writer_of(file, self.world_size) == self.rank]
        return dict(gather_lists(list(describe(folder, mine).items()), self.connection))

    def _prune(self, saved: int) -> None:
        """Keep the newest `keep` committed ones up to the one just saved; what is no commit goes, and conversions."""
        folders = [path for path in sorted(self.folder.glob("step_*")) if int(path.name.removeprefix("step_")) <= saved]
        committed = [path for path in folders if read_manifest(path)]
        conversions = {*self.folder.glob("universal_*"), *self.folder.glob(".universal_*")}
        for path in sorted({*folders, *conversions} - set(committed[-self.keep :])):
            try:
                shutil.rmtree(path)
            except OSError as error:  # an old checkpoint that stays is no reason to stop
                logger.warning("could not remove %s: %s", path, error)

    def _write_failure(self, target: Path, error: Exception) -> str:
        kept = [path.name for path in sorted(self.folder.glob("step_*")) if read_manifest(path)]
        intact = f"{kept[-1]} is intact" if kept else "no earlier checkpoint exists"
        free = shutil.disk_usage(self.folder).free / 2**20 if self.folder.exists() else 0
        return (
            f"rank {self.rank} could not write {target}: {error} ({free:,.0f} MiB are free there); {intact}: "
            "make room or make the folder writable, then start the same command again"
        )

    def _tell(self, text: str) -> None:
        if self.rank == 0:
            logger.info(text)


def _divide_persistent(engine: DeepSpeedEngine) -> None:
    """Divide ZeRO-3's persistent weights again, as they are before the first step.

    DeepSpeed gathers them after loading; the order of fetches that it then notes in the first micro batch is not that
    of the second, which ends in its "tracing error" (found by running).
    """
    persistent = getattr(engine.optimizer, "persistent_parameters", [])
    if persistent:
        persistent[0].partition(persistent)


def _forget_second_copies(engine: DeepSpeedEngine) -> None:
    """Let go of ZeRO++'s copies inside a node (hpZ), which are of the weights before loading.

    DeepSpeed does so itself for trained weights, not for frozen ones (found by running).
    """
    for parameter in engine.module.parameters():
        if getattr(parameter, "ds_secondary_tensor", None) is not None:
            parameter.ds_secondary_tensor = None


def optimizer_names(engine: DeepSpeedEngine) -> list[str]:
    """The trained weights in the optimizer's order, where it has the weights themselves (ZeRO-0), else none."""
    groups = engine.optimizer.param_groups
    return [engine.param_names[p] for group in groups for p in group["params"] if p in engine.param_names]


def random_state() -> dict[str, Any]:
    """This rank's generators: Python's, NumPy's, torch's on the CPU and on its GPU; tensors and plain types."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    legacy: Any = np.random.get_state()
    name, keys, *rest = legacy
    numpy_state = (name, torch.from_numpy(keys.copy()), *rest)
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: dict[str, Any]) -> None:
    """Set this rank's generators as `random_state` found them."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
