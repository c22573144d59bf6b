"""A run goes on where it was, on another number of ranks."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fdscale.config.errors import UserError
from fdscale.data.batches import Batch
from fdscale.distill.distiller import Distiller, Lesson
from fdscale.distill.layout import TokenLayout
from fdscale.distill.targets import TargetMaker
from fdscale.students.drop_path import drop_path_rows
from fdscale.students.geometry import SwinV2Geometry, ViTGeometry
from fdscale.students.student import build_student
from fdscale.training import universal
from fdscale.training.average import keep_average
from fdscale.training.checkpoint import Checkpoints
from fdscale.training.engine import Connection, full_state, set_learning_rate, start_engine
from fdscale.training.loop import train_step
from fdscale.training.optim import Schedule, adamw, layer_scales, parameter_groups
from tests.training.first_attempt import first_attempt

SWIN = SwinV2Geometry(16, (1, 1), (2, 4), window_size=4, image_size=32)
VIT = ViTGeometry(30, 2, 3, patch_size=8, image_size=32)
LEAN = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
    "sub_group_size": 5000,  # several flat tensors to a group
}
WIDTH, GLOBAL_BATCH, MICRO_BATCH, LAST = 7, 8, 4, 6


class Distillation:
    """A tiny distillation: drop path, layer decay (six groups), an average, a frozen weight and a moving buffer."""

    def __init__(self, connection: Connection, stage: int, seed: int, persistent: int = 0) -> None:
        self.student = build_student(SWIN if persistent else VIT, 0.3, seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.student.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        self.student.backbone.patch_embed.proj.bias.requires_grad_(False)
        self.connection, self.schedule = connection, Schedule(LAST, 2, peak=1e-3)
        self.student.register_buffer("seen", torch.tensor(float(seed)))
        layout = TokenLayout(self.student.grid, self.student.prefix_tokens)
        lesson = Lesson("teacher", WIDTH, TargetMaker(layout, layout))
        torch.manual_seed(seed)
        self.distiller = Distiller(self.student, self.student.width, [lesson], beta=2.0)
        self.accumulation = GLOBAL_BATCH // (connection.rank.world_size * MICRO_BATCH)
        zero = {"stage": stage, **(LEAN if stage == 3 else {})}
        zero |= {"stage3_param_persistence_threshold": persistent} if persistent else {}
        config = {"train_micro_batch_size_per_gpu": MICRO_BATCH, "zero_optimization": zero}
        self.engine = start_engine(self.distiller, self._optimizer(), config, self.accumulation, clip=0.1)

    def _optimizer(self) -> torch.optim.Optimizer:
        scales = layer_scales(self.student.layer_ids(), self.student.layers, 0.5)
        groups = parameter_groups(
            self.distiller,
            0.05,
            {f"student.backbone.{name}" for name in self.student.undecayed_parameters()},
            {f"student.backbone.{name}": scale for name, scale in scales.items()},
        )
        optimizer = adamw(groups, 1e-3, (0.9, 0.999), 1e-8)
        keep_average(optimizer, 0.9)
        return optimizer

    def steps(self, first: int, last: int) -> list[float]:
        """The mean loss over all ranks, for each step."""
        rows = self.accumulation * MICRO_BATCH
        starts = [self.connection.rank.rank * rows + i * MICRO_BATCH for i in range(self.accumulation)]
        unused = torch.zeros(MICRO_BATCH)
        batches = [Batch(unused, unused, unused, slice(start, start + MICRO_BATCH), []) for start in starts]
        losses = []
        for step in range(first, last):
            set_learning_rate(self.engine, self.schedule, step)
            loss = train_step(self.engine, self._terms, batches, step)["loss"].clone()
            torch.distributed.all_reduce(loss)
            losses.append(float(loss) / self.connection.rank.world_size)
            self.student.seen.add_(1)
        return losses

    def _terms(self, engine: Any, batch: Batch, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1000 + step)
        tokens = self.student.grid[0] * self.student.grid[1] + self.student.prefix_tokens
        pixels = torch.rand(GLOBAL_BATCH, 3, 32, 32, generator=generator)[batch.rows]
        target = torch.randn(GLOBAL_BATCH, tokens, WIDTH, generator=generator)[batch.rows]
        sites = self.student.drop_path_sites
        draws = drop_path_rows(0, step, sites, GLOBAL_BATCH, batch.rows)
        return engine(pixels, [target], draws)

    def states(self) -> dict[str, dict[str, Tensor]]:
        """Weights and averages of everything that is trained, frozen, or a buffer."""
        gathered = (full_state(self.engine, self.distiller, wanted=True, average=average) for average in (False, True))
        return dict(zip(("weights", "average"), gathered, strict=True))


def begun(connection: Connection, folder: str, stage: int, steps: int = 3) -> dict[str, Any]:
    """Some steps and a checkpoint, then on to the end, undisturbed."""
    run = Distillation(connection, stage, seed=1)
    run.steps(0, steps)
    Checkpoints(first_attempt(folder), connection, keep=2).save(run.engine, steps, {"step": steps})
    found = {"saved": run.states(), "losses": run.steps(steps, LAST), "end": run.states()}
    run.engine.destroy()
    return found


def continued(connection: Connection, folder: str, stage: int) -> dict[str, Any]:
    """From the checkpoint to the end, by an engine that began with other weights."""
    run = Distillation(connection, stage, seed=2)
    state = Checkpoints(first_attempt(folder), connection, keep=2).load(run.engine)
    assert state is not None
    found = {"step": state["step"], "loaded": run.states(), "generator": torch.initial_seed()}
    found |= {"losses": run.steps(state["step"], LAST), "end": run.states(), "counted": run.engine.global_steps}
    run.engine.destroy()
    return found


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("direction", ["2 to 1", "1 to 2"])
def test_another_number_of_ranks_goes_on(
    stage: int, direction: str, tmp_path: Path, one_rank: Any, two_ranks: Any
) -> None:
    before, after = (two_ranks, one_rank) if direction == "2 to 1" else (one_rank, two_ranks)
    undisturbed = before(begun, str(tmp_path), stage)[0]
    for resumed in after(continued, str(tmp_path), stage):
        assert resumed["step"] == 3
        assert resumed["counted"] == LAST
        for kind in ("weights", "average"):
            assert largest_difference(resumed["loaded"][kind], undisturbed["saved"][kind]) == 0.0
            assert largest_difference(resumed["end"][kind], undisturbed["end"][kind]) <= 1e-5
        differences = [abs(a - b) for a, b in zip(resumed["losses"], undisturbed["losses"], strict=True)]
        assert max(differences) <= 1e-5


def test_the_log_says_what_holds_and_generators_begin_anew(tmp_path: Path, one_rank: Any, two_ranks: Any) -> None:
    two_ranks(begun, str(tmp_path), 3)
    resumed = one_rank(continued_in_log, str(tmp_path))[0]
    assert "converted to DeepSpeed's universal format" in resumed["log"][0]
    assert resumed["log"][1].startswith("resumed from step 3 of attempt 1, saved by 2 ranks, on 1: samples, views")
    assert "a network's own dropout" in resumed["log"][1]
    assert resumed["generator"] == 2 + 3  # of the seed and the step


def continued_in_log(connection: Connection, folder: str) -> dict[str, Any]:
    records: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("fdscale")
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    former, logger.level = logger.level, logging.INFO
    try:
        return continued(connection, folder, 3) | {"log": records}
    finally:
        logger.removeHandler(handler)
        logger.setLevel(former)


def written(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*.pt")}


def test_a_conversion_is_used_again_redone_when_damaged_and_gone_with_the_next_save(
    tmp_path: Path, one_rank: Any, two_ranks: Any
) -> None:
    two_ranks(begun, str(tmp_path), 1)
    conversion, interrupted = (
        tmp_path / "0001" / "universal_step_00000003",
        tmp_path / "0001" / ".universal_step_00000003",
    )
    for leftover in (conversion, interrupted):  # without a manifest: what a killed start left
        (leftover / "zero").mkdir(parents=True)
        (leftover / "zero" / "half.pt").write_bytes(b"half")
    first = one_rank(continued, str(tmp_path), 1)[0]["losses"]
    made = written(conversion)
    assert not interrupted.exists()
    assert "zero/half.pt" not in made
    assert one_rank(continued, str(tmp_path), 1)[0]["losses"] == first
    assert written(conversion) == made
    victim = conversion / "zero" / "projectors.0.weight" / "exp_avg.pt"
    flip_a_byte(victim)
    assert one_rank(continued, str(tmp_path), 1)[0]["losses"] == first
    assert written(conversion)["zero/projectors.0.weight/exp_avg.pt"] != made["zero/projectors.0.weight/exp_avg.pt"]
    one_rank(begun, str(tmp_path), 1, 4)
    assert sorted(path.name for path in (tmp_path / "0001").glob("*step_*")) == ["step_00000003", "step_00000004"]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", ["flipped byte", "missing rank file"])
def test_a_damaged_checkpoint_is_not_converted_but_the_one_before(
    harm: str, tmp_path: Path, one_rank: Any, two_ranks: Any
) -> None:
    two_ranks(begun, str(tmp_path), 3, 2)
    two_ranks(begun, str(tmp_path), 3, 3)
    victim = next((tmp_path / "0001" / "step_00000003").glob("*rank_1*optim_states.pt"))
    flip_a_byte(victim) if harm == "flipped byte" else victim.unlink()
    assert one_rank(continued, str(tmp_path), 3)[0]["step"] == 2
    assert (tmp_path / "0001" / "damaged_step_00000003").exists()
    assert (tmp_path / "0001" / "universal_step_00000002").exists()


def refused(connection: Connection, folder: str, free: int | None, width: int) -> str:
    """The sentence that resuming ends with, on a disk with `free` bytes, or with a projector of another width."""
    usage, width_here = shutil.disk_usage, globals()["WIDTH"]
    if free is not None:
        universal.shutil.disk_usage = lambda path: usage(path)._replace(free=free)  # type: ignore[assignment]
    globals()["WIDTH"] = width
    try:
        continued(connection, folder, 3)
    except UserError as error:
        return str(error)
    finally:
        universal.shutil.disk_usage = usage
        globals()["WIDTH"] = width_here
    return "resumed"


def test_what_cannot_be_resumed_is_told_in_one_sentence_on_every_rank(
    tmp_path: Path, one_rank: Any, two_ranks: Any
) -> None:
    one_rank(begun, str(tmp_path), 3)
    for message in two_ranks(refused, str(tmp_path), 1000, WIDTH):
        assert "in DeepSpeed's universal format: 0.00 GiB, and 0.00 GiB are free there: make room, or" in message
        assert message.endswith("start it on 1 ranks")
    for message in two_ranks(refused, str(tmp_path), None, WIDTH + 1):
        assert "'projectors.0.weight' has 210 elements there and 240 here: it is of another network" in message


def by_deepspeed(connection: Connection, folder: str, stage: int) -> dict[str, float]:
    """Our conversion beside that of DeepSpeed's converter: the largest difference of any state; and loaded by it."""
    from argparse import Namespace

    from deepspeed.checkpoint import ds_to_universal

    source, theirs = Path(folder, "0001", "step_00000003"), Path(folder, "theirs")
    ours = universal.converted(source, connection)
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    ds_to_universal.main(
        Namespace(input_folder=str(source), output_folder=str(theirs), inject_missing_state=True, **options)
    )
    differences: dict[str, float] = {}
    for path in theirs.glob("zero/*/*.pt"):
        a, b = (torch.load(root / path.relative_to(theirs)) for root in (theirs, ours))
        a, b = (value["param"] if isinstance(value, dict) else value for value in (a, b))
        difference = (a.flatten().double() - b.flatten().double()).abs().max()
        differences[path.stem] = max(differences.get(path.stem, 0.0), float(difference))
    return differences


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_files_are_those_of_deepspeeds_own_converter(
    stage: int, tmp_path: Path, one_rank: Any, two_ranks: Any
) -> None:
    two_ranks(begun, str(tmp_path), stage)
    differences = one_rank(by_deepspeed, str(tmp_path), stage)[0]
    assert {"fp32", "exp_avg", "exp_avg_sq"} <= differences.keys()
    assert set(differences.values()) == {0.0}


def loaded_by_deepspeed(connection: Connection, folder: str, stage: int) -> dict[str, dict[str, Tensor]]:
    universal.converted(Path(folder, "0001", "step_00000003"), connection)
    run = Distillation(connection, stage, seed=2)
    run.engine._config.load_universal_checkpoint = True
    run.engine.load_checkpoint(f"{folder}/0001", tag="universal_step_00000003", load_lr_scheduler_states=False)
    found = full_state(run.engine, run.distiller, wanted=True)
    run.engine.destroy()
    return {name: value for name, value in found.items() if "backbone" in name or "projectors" in name}


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_itself_loads_what_was_converted(stage: int, tmp_path: Path, one_rank: Any, two_ranks: Any) -> None:
    saved = two_ranks(begun, str(tmp_path), stage)[0]["saved"]["weights"]
    loaded = one_rank(loaded_by_deepspeed, str(tmp_path), stage)[0]
    frozen = {"student.backbone.patch_embed.proj.bias"}  # which DeepSpeed leaves as they were
    assert [name for name in loaded.keys() - frozen if not torch.equal(loaded[name], saved[name])] == []


def test_the_conversion_is_committed_by_a_manifest_of_its_own(tmp_path: Path, one_rank: Any, two_ranks: Any) -> None:
    two_ranks(begun, str(tmp_path), 3)
    one_rank(continued, str(tmp_path), 3)
    folder = tmp_path / "0001" / "universal_step_00000003"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["source"] == "step_00000003"
    assert "zero/projectors.0.weight/ema.pt" in manifest["files"]
    assert len(manifest["files"]) == len(written(folder))


def resumed_with_persistent_weights(connection: Connection, folder: str) -> list[list[float]]:
    run = Distillation(connection, 3, seed=1, persistent=1000)
    run.steps(0, 2)
    Checkpoints(first_attempt(folder), connection, keep=2).save(run.engine, 2, {"step": 2})
    undisturbed = run.steps(2, 4)
    run.engine.destroy()
    other = Distillation(connection, 3, seed=2, persistent=1000)
    Checkpoints(first_attempt(folder), connection, keep=2).load(other.engine)
    resumed = other.steps(2, 4)
    other.engine.destroy()
    return [undisturbed, resumed]


def test_weights_that_stay_resident_do_not_disturb_the_first_steps(tmp_path: Path, one_rank: Any) -> None:
    undisturbed, resumed = one_rank(resumed_with_persistent_weights, str(tmp_path))[0]
    assert resumed == undisturbed
