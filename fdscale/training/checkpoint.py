"""Checkpoints that are committed: written by every rank, hashed, and trusted only once the manifest is in place."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from fdscale.config.errors import UserError
from fdscale.training.engine import Connection
from fdscale.training.manifest import damage, describe, files_of, read_manifest, write_manifest, writer_of

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
        try:
            self._on_main(lambda: shutil.rmtree(target, ignore_errors=True))  # an uncommitted one of a former life
            engine.save_checkpoint(str(self.folder), tag=target.name, client_state=state, save_latest=False)
            torch.save(random_state(), target / f"rank_{self.rank}.pt")
            self._barrier()  # every rank's files are there
            files = self._describe_all(target)
            manifest = {"step": step, "world_size": self.world_size, "files": files}
            self._on_main(lambda: write_manifest(target, manifest))
        except (OSError, RuntimeError) as error:
            raise UserError(self._write_failure(target, error)) from error
        self._on_main(self._prune)

    def load(self, engine: DeepSpeedEngine) -> dict[str, Any] | None:
        """Resume from the newest complete checkpoint; returns the loop's state, or None when there is none.

        Hashes are checked before anything is loaded; what is skipped is said, with the reason.
        """
        chosen = self._newest_complete()
        if chosen is None:
            return None
        self._check_world_size(chosen)
        _, state = engine.load_checkpoint(str(self.folder), tag=chosen.name, load_lr_scheduler_states=False)
        restore_random_state(torch.load(chosen / f"rank_{self.rank}.pt", weights_only=False))
        self._tell(f"resumed from {chosen}")
        return state

    def _newest_complete(self) -> Path | None:
        for folder in self._broadcast(sorted(self.folder.glob("step_*"), reverse=True)):
            problems = self._problems(folder)
            if not problems:
                return folder
            self._tell(f"skipped {folder}: {'; '.join(problems[:3])}")
        return None

    def _problems(self, folder: Path) -> list[str]:
        manifest = self._broadcast(read_manifest(folder))
        if manifest is None:
            return ["it was never committed (no manifest)"]
        mine = sorted(manifest["files"])[self.rank :: self.world_size]
        return [problem for found in self._gather(damage(folder, manifest, mine)) for problem in found]

    def _check_world_size(self, folder: Path) -> None:
        saved = (read_manifest(folder) or {})["world_size"]
        if saved != self.world_size:
            raise UserError(
                f"{folder} was saved by {saved} ranks and this run has {self.world_size}: start it on {saved} ranks, "
                "or give another run_dir"
            )

    def _describe_all(self, folder: Path) -> dict[str, Any]:
        mine = [file for file in files_of(folder) if writer_of(file, self.world_size) == self.rank]
        described: dict[str, Any] = {}
        for part in self._gather(describe(folder, mine)):
            described.update(part)
        return described

    def _prune(self) -> None:
        committed = [path for path in sorted(self.folder.glob("step_*")) if read_manifest(path)]
        for path in committed[: -self.keep]:
            shutil.rmtree(path)

    def _write_failure(self, target: Path, error: Exception) -> str:
        kept = [path.name for path in sorted(self.folder.glob("step_*")) if read_manifest(path)]
        intact = f"{kept[-1]} is intact" if kept else "no earlier checkpoint exists"
        free = shutil.disk_usage(self.folder).free / 2**20
        return (
            f"rank {self.rank} could not write {target}: {error} ({free:,.0f} MiB are free there); {intact}: "
            "make room or make the folder writable, then start the same command again"
        )

    def _tell(self, text: str) -> None:
        if self.rank == 0:
            logger.info(text)

    def _on_main(self, action: Callable[[], object]) -> None:
        if self.rank == 0:
            action()
        self._barrier()

    def _barrier(self) -> None:
        dist.barrier(group=self.connection.control)

    def _broadcast(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.connection.control)
        return box[0]

    def _gather(self, value: Any) -> list[Any]:
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, value, group=self.connection.control)
        return parts


def random_state() -> dict[str, Any]:
    """This rank's generators: Python's, NumPy's, torch's on the CPU and on its GPU."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: dict[str, Any]) -> None:
    """Set this rank's generators as `random_state` found them."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
