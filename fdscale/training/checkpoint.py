"""Checkpoints that are committed: written by every rank, hashed, and trusted only once the manifest is in place."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fdscale.config.errors import UserError
from fdscale.training.attempts import Attempt
from fdscale.training.elastic import load_universal
from fdscale.training.engine import Connection, files_written_by, gather_lists
from fdscale.training.hashed_file import save_hashed
from fdscale.training.lineage import Commit, Lineage, attempt_folders, lineage_of, step_folders, step_of
from fdscale.training.manifest import (
    damage,
    drop_from_memory,
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
    """The checkpoints of a run, written and read by every rank together: `attempts/0003/step_00000200` and so on.

    The newest `keep` stay, and those whose step `keep_every` divides; every `verify_every`-th is read back from the
    disk before it is committed (0: none, of both).
    """

    def __init__(
        self, attempt: Attempt, connection: Connection, keep: int, keep_every: int = 0, verify_every: int = 0
    ) -> None:
        self.attempt, self.connection = attempt, connection
        self.keep, self.keep_every, self.verify_every = keep, keep_every, verify_every
        self.rank, self.world_size = connection.rank.rank, connection.rank.world_size
        self._saved = 0

    def save(self, engine: DeepSpeedEngine, step: int, state: dict[str, Any]) -> None:
        """Write and commit step `step`; `state` is what the loop needs to go on (equal on all ranks).

        Raises UserError on all ranks when one cannot write, or a newer attempt has begun; earlier commits stay whole.
        """
        target = self.attempt.step_folder(step)
        self.connection.on_main(lambda: self._clear(target))
        try:
            files = self._write(engine, target, state | {ORDER: optimizer_names(engine)})
            manifest = {"step": step, "world_size": self.world_size, "attempt": self.attempt.number, "files": files}
            self._verify(target, manifest)
            self.connection.on_main(lambda: self._commit(target, manifest))
        except (OSError, RuntimeError) as error:
            if not is_write_failure(error):
                raise
            raise UserError(self._write_failure(target, error)) from error
        self._saved += 1
        self.connection.on_main(lambda: self._prune(step))  # and no rank goes on, or ends, before it is committed

    def _write(self, engine: DeepSpeedEngine, target: Path, state: dict[str, Any]) -> dict[str, Any]:
        """Write this rank's files; returns size and SHA-256 of every rank's, all of them on the disk.

        Where one rank cannot write, all raise its UserError together: none is left waiting in a collective.
        """
        written: dict[str, Any] = {}
        failed: list[str] = []

        def write(value: Any, path: str | Path) -> None:
            try:
                written[Path(path).name] = {} if failed else save_hashed(value, Path(path))
            except OSError as error:
                failed.append(self._write_failure(target, error))

        with files_written_by(engine, write):
            engine.save_checkpoint(str(target.parent), tag=target.name, client_state=state, save_latest=False)
        write(random_state(), target / f"rank_{self.rank}.pt")
        if told := gather_lists(failed, self.connection):
            raise UserError(told[0] + (f" (likewise {len(told) - 1} other ranks)" if len(told) > 1 else ""))
        files = dict(gather_lists(list(written.items()), self.connection))  # and every rank's files are there
        assert sorted(files) == files_of(target), "a file was written that nobody has hashed"
        return files

    def _clear(self, target: Path) -> None:
        """Make room for a checkpoint of this attempt: a save that was rolled back, or interrupted, may lie there."""
        self.attempt.refuse_if_superseded()
        shutil.rmtree(target, ignore_errors=True)
        try:
            target.mkdir()
        except OSError as error:
            raise UserError(self._write_failure(target, error)) from error

    def _commit(self, target: Path, manifest: dict[str, Any]) -> None:
        self.attempt.refuse_if_superseded()
        try:
            write_manifest(target, manifest)
        except OSError as error:  # the other ranks wait for this one's word
            raise UserError(self._write_failure(target, error)) from error

    def _verify(self, target: Path, manifest: dict[str, Any]) -> None:
        """Read back from the disk what was written, first and every so often; raises UserError on all ranks."""
        if not self.verify_every or self._saved % self.verify_every:
            return
        mine = self._written_by_me(manifest["files"])
        for file in mine:
            drop_from_memory(target / file)
        problems = gather_lists(damage(target, manifest, mine), self.connection)
        if problems:
            raise UserError(
                f"{target} reads back from the disk as something else than was written, and is not committed: "
                f"{'; '.join(problems[:3])}; this disk, or its node, is not to be trusted"
            )

    def load(self, engine: DeepSpeedEngine) -> dict[str, Any] | None:
        """Go on from the newest whole commit; returns the loop's state, or None when none was ever made.

        Hashes are checked before anything is loaded; what is skipped is said, with the reason. Raises UserError when
        checkpoints were committed but none is whole: starting anew would overwrite what they tell.
        """
        lineage = self.connection.broadcast(lineage_of(self.attempt.folder.parent))
        self._tell_disowned(lineage)
        chosen = self._newest_whole(lineage.believed)
        if chosen is None:
            if lineage.believed:
                raise UserError(
                    f"{self.attempt.folder.parent}: {len(lineage.believed)} checkpoints were committed and none is "
                    "whole (see above): is this folder shared by all nodes? To start anew, move them away"
                )
            self.connection.on_main(lambda: self.attempt.record_start(None))
            return None
        self.connection.on_main(lambda: self._begin_from(chosen))
        folder = self.attempt.step_folder(chosen.step)
        state, saved_by = self._load(engine, folder)
        self._restore_generators(chosen, folder, saved_by, engine.global_steps)
        return state

    def _begin_from(self, chosen: Commit) -> None:
        self.attempt.refuse_if_superseded()
        self.attempt.record_start(chosen)
        self.attempt.adopt(chosen)
        for folder in step_folders(self.attempt.folder):  # of this very attempt, when it goes back past a damaged one
            if step_of(folder) > chosen.step and read_manifest(folder) is not None:
                folder.rename(folder.with_name(f"damaged_{folder.name}"))

    def _load(self, engine: DeepSpeedEngine, folder: Path) -> tuple[dict[str, Any], int]:
        """Fill the engine from a whole checkpoint; returns the loop's state and how many ranks saved it."""
        saved_by = self.connection.broadcast(read_manifest(folder) or {})["world_size"]
        if saved_by == self.world_size or not engine.zero_optimization():  # ZeRO-0 divides nothing
            _, state = engine.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
        else:
            state = load_universal(engine, converted(folder, self.connection))
        _divide_persistent(engine)
        _forget_second_copies(engine)
        return state, saved_by

    def _restore_generators(self, chosen: Commit, folder: Path, saved_by: int, step: int) -> None:
        """This rank's generators as they were; among another number of ranks they begin anew, from seed and step."""
        if saved_by == self.world_size:
            restore_random_state(torch.load(folder / f"rank_{self.rank}.pt", weights_only=True))
            self._tell(f"resumed from {chosen}: {folder}")
            return
        torch.manual_seed(torch.initial_seed() + step)
        self._tell(
            f"resumed from {chosen}, saved by {saved_by} ranks, on {self.world_size}: samples, views, drop path "
            "and optimizer go on as they were; a network's own dropout, if it has any, draws other values"
        )

    def _newest_whole(self, commits: Sequence[Commit]) -> Commit | None:
        for commit in commits:
            manifest = self.connection.broadcast(read_manifest(commit.folder))
            gone = ["it has gone meanwhile"]
            problems = gone if manifest is None else self._damage(commit.folder, manifest)
            if not problems:
                return commit
            self._tell(f"skipped {commit.folder}: {'; '.join(problems[:3])}")
        return None

    def _tell_disowned(self, lineage: Lineage) -> None:
        """Say what will not be read: interrupted saves, and what a superseded attempt committed too late."""
        for commit in lineage.disowned:
            self._tell(f"not read, since a newer attempt had gone on from an earlier step by then: {commit.folder}")
        newest = lineage.believed[0].step if lineage.believed else -1
        for attempt in attempt_folders(self.attempt.folder.parent):
            for folder in step_folders(attempt):
                if step_of(folder) > newest and read_manifest(folder) is None:
                    self._tell(f"skipped {folder}: it was never committed (no manifest)")

    def _damage(self, folder: Path, manifest: dict[str, Any]) -> list[str]:
        mine = sorted(manifest["files"])[self.rank :: self.world_size]
        return gather_lists(damage(folder, manifest, mine), self.connection)

    def _written_by_me(self, files: Iterable[str]) -> list[str]:
        return [file for file in files if writer_of(file, self.world_size) == self.rank]

    def _prune(self, saved: int) -> None:
        """Remove commits that need not be kept, and saves up to this one that were never committed; conversions, too.

        Commits that no attempt goes on from stay: they are evidence, and `fdscale checkpoint prune` removes them.
        """
        self.attempt.refuse_if_superseded()
        lineage = lineage_of(self.attempt.folder.parent)
        kept = {commit.folder for commit in (*kept_of(lineage.believed, self.keep, self.keep_every), *lineage.disowned)}
        for attempt in attempt_folders(self.attempt.folder.parent):
            saves = {path for path in step_folders(attempt) if step_of(path) <= saved}
            conversions = {*attempt.glob("universal_*"), *attempt.glob(".universal_*")}
            for path in sorted((saves | conversions) - kept):
                try:
                    shutil.rmtree(path)
                except OSError as error:  # an old checkpoint that stays is no reason to stop
                    logger.warning("could not remove %s: %s", path, error)

    def _write_failure(self, target: Path, error: Exception) -> str:
        believed = lineage_of(self.attempt.folder.parent).believed
        intact = f"{believed[0].folder} is intact" if believed else "no earlier checkpoint exists"
        free = shutil.disk_usage(self.attempt.folder).free / 2**20 if self.attempt.folder.exists() else 0
        return (
            f"rank {self.rank} could not write {target}: {error} ({free:,.0f} MiB are free there); {intact}: "
            "make room or make the folder writable, then start the same command again"
        )

    def _tell(self, text: str) -> None:
        if self.rank == 0:
            logger.info(text)


def kept_of(commits: Sequence[Commit], keep: int, keep_every: int) -> list[Commit]:
    """Those of the commits (newest first) that stay: the newest `keep`, and each whose step `keep_every` divides."""
    return [commit for i, commit in enumerate(commits) if i < keep or (keep_every and commit.step % keep_every == 0)]


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
