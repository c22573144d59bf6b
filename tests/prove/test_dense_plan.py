"""The plan of dense tasks beside the allocator's own events: real steps on two ranks, networks built among them.

Masks are planned for as many boxes as may be positive; how many are is the proposals' affair, so that a plan with
masks is an upper bound. `python -m pytest -m prove tests/prove/test_dense_plan.py -s` prints the table of
docs/dense.md.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import record_function

from fdscale.build.foreseen import forecast_of
from fdscale.build.networks import prepare_student
from fdscale.build.outline import draws_for, pixels_for, traces_of
from fdscale.build.training import optimizer_groups
from fdscale.config.programs import DenseSettings
from fdscale.config.recipe import load_recipe
from fdscale.data.dense.batches import Objects
from fdscale.downstream import detect, segment
from fdscale.downstream.detection.detector import Detector
from fdscale.downstream.segmentation.mask2former import SKETCHED_OBJECTS
from fdscale.training.allocator import memory_profile
from fdscale.training.engine import Connection, start_engine
from fdscale.training.optim import adamw
from tests.prove.test_plan import MIB, RANKS, SMALL, STEPS, highest_in_steps

pytestmark = pytest.mark.prove

AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
SWIN = (
    "student.geometry.embed_dim=48",
    "student.geometry.depths=[2,2,6,2]",
    "student.geometry.num_heads=[2,4,8,16]",
    "student.image_size=128",
    "student.geometry.window_size=8",
    "backbone.window_size=8",
)
VIT = ("student.name=vit_s16", "student.image_size=224", "student.geometry.depth=4", "backbone.indices=[0,1,2,3]")


@dataclasses.dataclass(frozen=True)
class Case:
    recipe: str
    overrides: tuple[str, ...]
    stage: int = 3
    micro_batch: int = 2
    more: tuple[tuple[str, Any], ...] = ()
    fewer_than_planned: float = 0.1

    @property
    def deepspeed_json(self) -> dict[str, Any]:
        keys = SMALL if self.stage == 3 else {key: SMALL[key] for key in list(SMALL)[:3]}
        zero = {"stage": self.stage, **keys}
        return {"train_micro_batch_size_per_gpu": self.micro_batch, "zero_optimization": zero, **dict(self.more)}


NARROW = ("head.channels=128", "data.crop=256")
CASES = {
    "UperNet, SwinV2, ZeRO-3, fp32": Case("ade20k_swinv2_g", (*SWIN, *NARROW)),
    "UperNet, SwinV2, ZeRO-3, autocast": Case("ade20k_swinv2_g", (*SWIN, *NARROW), more=tuple(AUTOCAST.items())),
    "UperNet, ViT-S of 4 blocks, ZeRO-1, autocast": Case(
        "ade20k_vit_b", (*VIT, *NARROW), stage=1, more=tuple(AUTOCAST.items())
    ),
    "Mask2Former, SwinV2, ZeRO-3, fp32": Case("ade20k_mask2former_swinv2_g", (*SWIN, *NARROW)),
    "Cascade Mask R-CNN, SwinV2, ZeRO-3, fp32": Case(
        "coco_swinv2_g", (*SWIN, *NARROW, "head.box_width=256", "data.crop=512"), micro_batch=1, fewer_than_planned=0.5
    ),
    "Cascade R-CNN, SwinV2, ZeRO-1, autocast": Case(
        "objects365_swinv2_g",
        (*SWIN, *NARROW, "head.box_width=256", "data.crop=512"),
        stage=1,
        micro_batch=1,
        more=tuple(AUTOCAST.items()),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.timeout(1200)
def test_the_plan_is_what_the_allocators_events_say(name: str, two_ranks: Any, tmp_path: Path) -> None:
    chosen = CASES[name]
    measured = max(two_ranks(steps_of, dataclasses.asdict(chosen), timeout=1000))
    planned = planned_peak(chosen)
    print(f"\n| {name} | {planned / MIB:,.0f} | {measured / MIB:,.0f} | {measured / planned - 1:+.1%} |")
    two_ranks.stop()  # nothing of this case may be freed within the next one
    assert (1 - chosen.fewer_than_planned) * planned < measured < 1.1 * planned


def settings_of(chosen: Case) -> DenseSettings:
    settings = load_recipe(chosen.recipe, [*chosen.overrides, f"data.global_batch={chosen.micro_batch * RANKS}"])
    assert isinstance(settings, DenseSettings)
    student = settings.student.model_copy(update={"weights": None, "resize": False})
    return settings.model_copy(update={"student": student})


def planned_peak(chosen: Case) -> int:
    settings, config = settings_of(chosen), chosen.deepspeed_json
    outline: Any = segment.outline if settings.program == "segment" else detect.outline
    traces = traces_of(outline(settings), settings, config, chosen.micro_batch, cuda=False)
    foreseen = forecast_of(traces, settings, config, {}, RANKS)
    return foreseen.peak - foreseen.images  # the loader's, which is not part of this


def steps_of(connection: Connection, plain: dict[str, Any]) -> int:
    """The most bytes live during real steps, the network built inside the profile."""
    torch.set_num_threads(1)
    chosen = Case(**plain)
    settings, config = settings_of(chosen), chosen.deepspeed_json
    with memory_profile() as profiler:
        student = prepare_student(settings.student, settings.seed)
        network: Any
        if settings.program == "segment":
            network = segment.segmenter_of(settings, student)
        else:
            network = Detector(student, detect.design_of(settings))
        optimizer = adamw(optimizer_groups(network, student, settings.optim), 1e-5, (0.9, 0.999), 1e-8)
        engine = start_engine(network, optimizer, config, 1, 3.0)
        del network, optimizer
        for _ in range(STEPS):
            with record_function("step"):
                engine.train()
                pixels = torch.rand_like(pixels_for(settings.data.crop, chosen.micro_batch))
                draws = draws_for(student, chosen.micro_batch)
                targets = targets_for(settings, chosen.micro_batch)
                loss = engine(pixels, targets, None if draws is None else torch.rand_like(draws))["loss"]
                del pixels, targets
                engine.backward(loss)
                engine.step()
    return highest_in_steps(profiler)


def targets_for(settings: Any, micro_batch: int) -> Any:
    """Labels of as many classes, or as many objects all over the image, as the plan counts."""
    crop = settings.data.crop
    if settings.program == "segment":
        columns = torch.arange(crop) * SKETCHED_OBJECTS // crop
        return columns.to(torch.uint8).expand(micro_batch, crop, crop).contiguous()
    count = detect.OBJECTS_OF_AN_IMAGE
    corners = torch.tensor([(x, y) for x in (0, crop // 2) for y in range(0, crop, 2 * crop // count)]).float()
    boxes = torch.cat((corners, corners + torch.tensor([crop / 2, 2 * crop / count])), dim=1)
    masks = torch.ones(count, crop, crop, dtype=torch.uint8) if settings.head.masks else None
    return tuple(Objects(boxes, torch.zeros(count, dtype=torch.int64), masks) for _ in range(micro_batch))
