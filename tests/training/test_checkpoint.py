"""A checkpoint is believed only when every byte of it is there, and a resumed run is the undisturbed one."""

from __future__ import annotations

import random
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fdscale.config.errors import UserError
from fdscale.training.attempts import Attempt
from fdscale.training.checkpoint import Checkpoints, random_state, restore_random_state
from fdscale.training.engine import Connection, start_engine
from fdscale.training.lineage import step_of
from fdscale.training.manifest import MANIFEST, damage, describe, files_of, read_manifest, write_manifest, writer_of
from fdscale.training.optim import adamw, parameter_groups
from tests.training.first_attempt import first_attempt


def small_engine(stage: int, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    optimizer = adamw(parameter_groups(module, 0.05, ()), 1e-2, (0.9, 0.999), 1e-8)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return start_engine(module, optimizer, {"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero}, 1, 1.0)


def steps(engine: Any, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        loss = engine(inputs).square().mean() * (1 + 0.1 * torch.rand(()))  # draws from this rank's generator
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses


def resumed_curve(connection: Connection, folder: str, stage: int) -> dict[str, list[float]]:
    """Six steps undisturbed; and three, a checkpoint, a new engine with other weights, three more."""
    checkpoints = Checkpoints(first_attempt(folder), connection, keep=2)
    torch.manual_seed(connection.rank.rank)
    engine = small_engine(stage)
    torch.manual_seed(connection.rank.rank)
    before = steps(engine, 0, 3)
    checkpoints.save(engine, 3, {"step": 3})
    undisturbed = before + steps(engine, 3, 6)
    engine.destroy()
    other = small_engine(stage, seed=99)
    state = checkpoints.load(other)
    assert state is not None
    resumed = before + steps(other, state["step"], 6)
    other.destroy()
    return {"undisturbed": undisturbed, "resumed": resumed}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resuming_continues_bit_for_bit_with_every_ranks_generator(stage: int, tmp_path: Path, two_ranks: Any) -> None:
    found = two_ranks(resumed_curve, str(tmp_path), stage)
    assert all(rank["resumed"] == rank["undisturbed"] for rank in found)
    assert found[0]["undisturbed"] != found[1]["undisturbed"]


def save_steps(connection: Connection, folder: str, saved: list[int]) -> None:
    checkpoints, engine = Checkpoints(first_attempt(folder), connection, keep=2), small_engine(3)
    for step in saved:
        checkpoints.save(engine, step, {"step": step})
    engine.destroy()


def loaded_step(connection: Connection, folder: str) -> Any:
    engine = small_engine(3)
    state = Checkpoints(first_attempt(folder), connection, keep=2).load(engine)
    engine.destroy()
    return state and state["step"]


def test_the_newest_complete_checkpoint_is_taken_and_older_ones_are_pruned(tmp_path: Path, two_ranks: Any) -> None:
    two_ranks(save_steps, str(tmp_path), [1, 2, 3])
    assert sorted(path.name for path in (tmp_path / "0001").glob("step_*")) == ["step_00000002", "step_00000003"]
    assert two_ranks(loaded_step, str(tmp_path)) == [3, 3]


@pytest.mark.parametrize("harm", ["no manifest", "flipped byte", "missing file", "short file"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(harm: str, tmp_path: Path, two_ranks: Any) -> None:
    two_ranks(save_steps, str(tmp_path), [1, 2])
    newest = tmp_path / "0001" / "step_00000002"
    victim = next(newest.glob("*rank_1*optim_states.pt"))
    if harm == "no manifest":
        (newest / MANIFEST).unlink()
    elif harm == "flipped byte":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif harm == "missing file":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-1])
    assert two_ranks(loaded_step, str(tmp_path)) == [1, 1]


def test_nothing_is_loaded_from_an_empty_folder(tmp_path: Path, two_ranks: Any) -> None:
    assert two_ranks(loaded_step, str(tmp_path)) == [None, None]


def keep_one_past_a_damaged_one(connection: Connection, folder: str) -> Any:
    """Steps 2 and 8 saved, 8 damaged; resumed from 2, step 4 is saved with room for one."""
    checkpoints, engine = Checkpoints(first_attempt(folder), connection, keep=2), small_engine(3)
    for step in (2, 8):
        checkpoints.save(engine, step, {"step": step})
    if connection.rank.is_main:
        next(Path(folder, "0001", "step_00000008").glob("*optim_states.pt")).unlink()
    torch.distributed.barrier()
    one = Checkpoints(first_attempt(folder), connection, keep=1)
    state = one.load(engine)
    one.save(engine, 4, {"step": 4})
    engine.destroy()
    return state and state["step"]


def test_a_damaged_newer_checkpoint_is_set_aside_and_never_outlives_a_good_one(tmp_path: Path, two_ranks: Any) -> None:
    assert two_ranks(keep_one_past_a_damaged_one, str(tmp_path)) == [2, 2]
    left = sorted(path.name for path in (tmp_path / "0001").glob("*step_*"))
    assert left == ["damaged_step_00000008", "step_00000004"]
    assert two_ranks(loaded_step, str(tmp_path)) == [4, 4]


def test_damaged_checkpoints_alone_are_no_fresh_start(tmp_path: Path, two_ranks: Any) -> None:
    two_ranks(save_steps, str(tmp_path), [1])
    next((tmp_path / "0001" / "step_00000001").glob("*optim_states.pt")).unlink()
    for message in two_ranks(refused, str(tmp_path)):
        assert "1 checkpoints were committed and none is whole" in message
    assert (tmp_path / "0001" / "step_00000001").exists()


def test_what_was_never_committed_is_removed_with_the_next_save(tmp_path: Path, two_ranks: Any) -> None:
    (tmp_path / "0001" / "step_00000001").mkdir(parents=True)
    two_ranks(save_steps, str(tmp_path), [2])
    assert [path.name for path in (tmp_path / "0001").glob("step_*")] == ["step_00000002"]


def save_with_no_room(connection: Connection, folder: str) -> str:
    """The second save meets a limit of 1,000 bytes a file, which the system enforces as it would a full disk."""
    engine, checkpoints = small_engine(3), Checkpoints(first_attempt(folder), connection, keep=2)
    checkpoints.save(engine, 1, {"step": 1})
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
    try:
        checkpoints.save(engine, 2, {"step": 2})
    except UserError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        engine.destroy()
    return "saved"


def test_a_failed_write_leaves_the_previous_checkpoint_and_says_so(tmp_path: Path, two_ranks: Any) -> None:
    for message in two_ranks(save_with_no_room, str(tmp_path)):
        assert message.startswith(f"rank 0 could not write {tmp_path / '0001' / 'step_00000002'}")
        assert message.endswith("(likewise 1 other ranks)")
        assert "step_00000001 is intact" in message
        assert "free" in message
    assert two_ranks(loaded_step, str(tmp_path)) == [1, 1]


def refused(connection: Connection, folder: str) -> str:
    try:
        loaded_step(connection, folder)
    except UserError as error:
        return str(error)
    return "loaded"


def test_the_manifest_lists_every_file_and_finds_each_harm(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"weights")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.pt").write_bytes(b"moments")
    files = files_of(tmp_path)
    write_manifest(tmp_path, {"files": describe(tmp_path, files)})
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert files == ["a.pt", "b/c.pt"] == sorted(manifest["files"])
    assert damage(tmp_path, manifest, files) == []
    (tmp_path / "a.pt").write_bytes(b"Weights")
    shutil.rmtree(tmp_path / "b")
    assert damage(tmp_path, manifest, files) == ["a.pt has another SHA-256 than recorded", "b/c.pt is missing"]


def test_a_torn_manifest_is_no_manifest(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"files": {')
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize(
    ("file", "rank"),
    [
        ("zero_pp_rank_1_mp_rank_00_optim_states.pt", 1),
        ("bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt", 3),
        ("mp_rank_00_model_states.pt", 0),
        ("rank_2.pt", 2),
        ("anything.json", 0),
    ],
)
def test_the_writer_of_a_file_is_told_by_its_name(file: str, rank: int) -> None:
    assert writer_of(file, world_size=4) == rank


def test_every_generator_of_a_rank_is_restored() -> None:
    state = random_state()
    first = (random.random(), np.random.rand(), float(torch.rand(())))
    restore_random_state(state)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == first


def two_attempts(connection: Connection, folder: str) -> dict[str, Any]:
    """The second attempt goes on from step 2 of the first, which, cut off, saves step 3 all the same, and then 4."""
    first, engine = first_attempt(folder), small_engine(3)
    old = Checkpoints(first, connection, keep=2)
    old.load(engine)
    for step in (1, 2):
        old.save(engine, step, {"step": step})
    put_aside = Path(folder, "late")
    old.save(engine, 3, {"step": 3})
    if connection.rank.is_main:
        first.step_folder(3).rename(put_aside)  # as if it were not there yet
        Path(folder, "0002").mkdir()
    connection.barrier()
    new = Checkpoints(Attempt(Path(folder, "0002")), connection, keep=2)
    resumed = new.load(engine)
    if connection.rank.is_main:
        put_aside.rename(first.step_folder(3))
    connection.barrier()
    told = refusal_of(lambda: old.save(engine, 4, {"step": 4}))
    engine.destroy()
    return {"resumed": resumed and resumed["step"], "told": told, "third": loaded_by_attempt(connection, folder, 3)}


def refusal_of(action: Any) -> str:
    try:
        action()
    except UserError as error:
        return str(error)
    return "done"


def loaded_by_attempt(connection: Connection, folder: str, number: int) -> Any:
    if connection.rank.is_main:
        Path(folder, f"{number:04d}").mkdir()
    connection.barrier()
    engine = small_engine(3)
    state = Checkpoints(Attempt(Path(folder, f"{number:04d}")), connection, keep=2).load(engine)
    engine.destroy()
    return state and state["step"]


def test_what_a_superseded_attempt_commits_is_never_read_and_it_ends_at_its_next_save(
    tmp_path: Path, two_ranks: Any
) -> None:
    for found in two_ranks(two_attempts, str(tmp_path)):
        assert found["resumed"] == 2
        assert "attempt 2 has begun meanwhile" in found["told"]
        assert found["third"] == 2
    assert (tmp_path / "0001" / "step_00000003" / MANIFEST).exists(), "evidence is not removed"
    assert not (tmp_path / "0001" / "step_00000004").exists()
    assert (tmp_path / "0003" / "step_00000002").is_dir(), "the commit it goes on from lies with the newest attempt"


def save_some_for_ever(connection: Connection, folder: str) -> None:
    checkpoints, engine = Checkpoints(first_attempt(folder), connection, keep=2, keep_every=3), small_engine(3)
    for step in range(1, 9):
        checkpoints.save(engine, step, {"step": step})
    engine.destroy()


def test_the_newest_and_every_so_many_steps_stay(tmp_path: Path, two_ranks: Any) -> None:
    two_ranks(save_some_for_ever, str(tmp_path))
    assert sorted(step_of(path) for path in (tmp_path / "0001").glob("step_*")) == [3, 6, 7, 8]


def read_back(connection: Connection, folder: str, harm: bool) -> str:
    """Rank 1's file differs on the disk from what was hashed when it was written, or not."""
    checkpoints = Checkpoints(first_attempt(folder), connection, keep=2, verify_every=1)
    target = first_attempt(folder).step_folder(1)
    target.mkdir(exist_ok=True)
    mine = target / f"rank_{connection.rank.rank}.pt"
    mine.write_bytes(bytes(5000))
    connection.barrier()
    manifest = {"files": describe(target, files_of(target))}
    if harm and connection.rank.rank == 1:
        mine.write_bytes(bytes(4999) + b"\1")
    connection.barrier()
    return refusal_of(lambda: checkpoints._verify(target, manifest))


def test_what_reads_back_as_something_else_is_not_committed(tmp_path: Path, two_ranks: Any) -> None:
    assert two_ranks(read_back, str(tmp_path), False) == ["done", "done"]
    for told in two_ranks(read_back, str(tmp_path), True):
        assert "reads back from the disk as something else than was written" in told
        assert "rank_1.pt has another SHA-256" in told


def save_into_what_cannot_be_made(connection: Connection, folder: str) -> str:
    """A file lies in the place of the attempt's folder."""
    attempt = first_attempt(folder)
    engine, checkpoints = small_engine(3), Checkpoints(attempt, connection, keep=2)
    if connection.rank.is_main:
        attempt.folder.rmdir()
        attempt.folder.touch()
    told = refusal_of(lambda: checkpoints.save(engine, 1, {"step": 1}))
    engine.destroy()
    return told


def test_a_folder_that_cannot_be_made_is_told_on_every_rank(tmp_path: Path, two_ranks: Any) -> None:
    for told in two_ranks(save_into_what_cannot_be_made, str(tmp_path)):
        assert told.startswith(f"rank 0 could not write {tmp_path}/0001/step_00000001: [Errno 20] Not a directory")


def save_where_one_rank_has_no_room(connection: Connection, folder: str) -> str:
    """As on two nodes, of which one's disk is full."""
    engine, checkpoints = small_engine(3), Checkpoints(first_attempt(folder), connection, keep=2)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if connection.rank.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
    told = refusal_of(lambda: checkpoints.save(engine, 1, {"step": 1}))
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    engine.destroy()
    return told


def test_where_one_rank_cannot_write_all_of_them_hear_it(tmp_path: Path, two_ranks: Any) -> None:
    told = two_ranks(save_where_one_rank_has_no_room, str(tmp_path))
    assert told[0] == told[1]
    assert told[0].startswith("rank 1 could not write ")
    assert not list(tmp_path.rglob(MANIFEST))
