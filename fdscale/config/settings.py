"""Every setting of a run, typed, frozen and strict; its defaults are those of the official implementation.

The recipe says what is learned, the DeepSpeed JSON how it fits, the launcher where it runs: a number has one
home, so batch per rank, precision and ranks are absent here. Modules take plain numbers, never these objects.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from fdscale.config.data_settings import BatchSettings, DataSettings
from fdscale.config.keeping import CheckpointSettings, GuardSettings, LogSettings
from fdscale.config.kinds import (
    Betas,
    Count,
    Fraction,
    Geometry,
    Keywords,
    Label,
    Milestones,
    Name,
    NonNegative,
    Positive,
    Rate,
    Settings,
)

FIRST_TEACHER = "teacher"


def _without_first(further: dict[str, Any]) -> dict[str, Any]:
    if FIRST_TEACHER in further:
        raise ValueError(f"any name but {FIRST_TEACHER!r}, which is the first one's")
    return further


def _zero_is_none(value: object) -> object:
    return None if value == 0 and type(value) is int else value  # TOML cannot write None


class StudentSettings(Settings):
    """The network that learns; `geometry` overrides single numbers of the named one.

    `position_bias` None is the named network's; `per_block` gives every ViT block its own table, copied from a
    shared one where the weights have that (official fine-tuning). Activation checkpointing recomputes `blocks` in the
    backward pass; `offload` keeps their inputs in the host's memory meanwhile. `resize` takes `weights` of another
    image size or window: positions are resized, and a SwinV2 keeps its coordinates. `skip_dropped` leaves out the work
    of the samples that a block's branch drops (ViT and SwinV2 students; None: on GPUs alone); results are the same to
    rounding.
    """

    name: Name
    image_size: Positive | None = None
    position_bias: Literal["shared", "per_block"] | None = None
    drop_path: Rate = 0.0
    skip_dropped: bool | None = None
    activation_checkpointing: Literal["none", "blocks", "offload"] = "none"
    geometry: Keywords = {}
    weights: Name | None = None
    resize: bool = False


class TeacherSettings(Settings):
    """The frozen network; `weights` None is what `fdscale fetch` brought, `"random"`, or a local file.

    `revision` pins what is fetched. `layer` takes the tokens of an earlier stage (Swin) or block (ViT), from 0.
    `checkpoint_key` chooses in a file that holds a student and a teacher. `rounded_norm` rounds the final norm to
    the weights' half precision, as the official implementation does for CLIP. `placement` says where its frozen
    weights lie: whole on every rank, divided over the ranks by a ZeRO-3 engine or by fairscale's FSDP, or `auto`:
    whole where that fits. `weight` multiplies its loss term.
    """

    name: Name
    weights: Name | None = None
    revision: Name | None = None
    image_size: Positive | None = None
    geometry: Geometry = {}
    layer: Count | None = None
    after_norm: bool = True
    rounded_norm: bool = False
    checkpoint_key: Literal["student", "teacher"] | None = None
    placement: Literal["auto", "replicated", "zero3", "fairscale"] = "auto"
    weight: Annotated[float, Field(gt=0)] = 1.0


class TargetSettings(Settings):
    """How teacher tokens become the target: grids matched, prefix tokens kept, CLS alone, or dropped; whitened."""

    grid: Literal["exact", "pool", "interpolate"] = "exact"
    prefix_tokens: Literal["keep", "cls", "drop"] = "keep"
    whiten: bool = True


class FurtherTeacherSettings(TeacherSettings):
    """A teacher beside the first one, with a target of its own."""

    target: TargetSettings = TargetSettings()


class LossSettings(Settings):
    """Smooth-L1 with the paper's beta."""

    beta: Annotated[float, Field(gt=0)] = 2.0


class OptimSettings(Settings):
    """AdamW under a linear warm-up and a decay; the three rates are for `reference_batch` images.

    The warm-up is so many epochs or steps long. The rate then falls as a cosine, as a line, or in `milestones`: after
    each of these shares of the run it is a tenth (the last two counted from the first step, as in mmseg and
    detectron2). The rates scale linearly with the global batch (official implementation); `reference_batch = 0` or, in
    Python, None takes them as they stand. `clip = 0` switches clipping off. `ema_decay` keeps an exponential moving
    average of the trained weights (0: none). `layer_decay` multiplies the rate once for each layer below the head: its
    peak alone, officially, or `all` of the schedule. The official implementation decays the ViT's position bias tables,
    and counts a shared one to the head's layer, not the stem's.
    """

    lr: Annotated[float, Field(gt=0)]
    warmup_lr: NonNegative = 0.0
    min_lr: NonNegative = 0.0
    reference_batch: Annotated[Positive | None, BeforeValidator(_zero_is_none)] = 512
    warmup_epochs: NonNegative = 0.0
    warmup_steps: Count = 0
    decay: Literal["cosine", "linear", "milestones"] = "cosine"
    milestones: Annotated[Milestones, Field(validate_default=True)] = ()
    weight_decay: NonNegative = 0.05
    betas: Betas = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    clip: NonNegative = 3.0
    ema_decay: Rate = 0.0
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    layer_decay_scales: Literal["peak", "all"] = "peak"
    decay_position_bias: bool = True
    shared_position_bias_layer: Literal["head", "stem"] = "head"

    @field_validator("warmup_steps")
    @classmethod
    def _one_warmup(cls, steps: int, others: ValidationInfo) -> int:
        if steps and others.data.get("warmup_epochs"):
            raise ValueError("0 beside optim.warmup_epochs; leave one of them out")
        return steps

    @field_validator("milestones")
    @classmethod
    def _of_their_decay(cls, milestones: tuple[float, ...], others: ValidationInfo) -> tuple[float, ...]:
        if bool(milestones) != (others.data.get("decay", "milestones") == "milestones"):
            raise ValueError(
                'at least one share of the run, rising, with optim.decay="milestones", none with another decay'
            )
        return milestones

    def warmup(self, steps_per_epoch: int) -> int:
        """Steps of the warm-up."""
        return self.warmup_steps or round(self.warmup_epochs * steps_per_epoch)


class CadenceSettings(Settings):
    """Steps between evaluations (0: only at the end)."""

    every: Count = 0


class EvalSettings(CadenceSettings):
    """Held-out shards, neighbours of the k-NN (0: off).

    `normalisation = "clip"` evaluates every fine-tuned network with CLIP's mean and std, as the official numbers were.
    """

    shards: Name | None = None
    knn: Count = 20
    normalisation: Literal["training", "clip"] = "training"


class RunSettings(Settings):
    """What every program needs; a run is so many `epochs` or `steps` long.

    `max_steps` stops earlier and leaves the schedule as it is. `recipe` is the name of the recipe they come from, for
    whoever looks at many runs.
    """

    program: str
    recipe: Name | None = None
    run_dir: Name | None = None
    deepspeed: Name
    epochs: Annotated[float, Field(gt=0)] | None = None
    steps: Annotated[Positive | None, Field(validate_default=True)] = None
    max_steps: Positive | None = None
    seed: Count = 0
    student: StudentSettings
    data: BatchSettings
    optim: OptimSettings
    eval: CadenceSettings = CadenceSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    guards: GuardSettings = GuardSettings()
    log: LogSettings = LogSettings()

    @field_validator("steps")
    @classmethod
    def _one_length(cls, steps: int | None, others: ValidationInfo) -> int | None:
        if "epochs" in others.data and (steps is None) == (others.data["epochs"] is None):
            raise ValueError("the length of the run, either epochs or steps")
        return steps

    def total_steps(self, steps_per_epoch: int) -> int:
        """Steps of the schedule."""
        return self.steps or math.ceil((self.epochs or 0) * steps_per_epoch)


class ShardRunSettings(RunSettings):
    """What the programs need that read shards."""

    data: DataSettings
    eval: EvalSettings = EvalSettings()


class DistillSettings(ShardRunSettings):
    """Feature distillation: a teacher, how its tokens become the target, and the loss.

    Any number of `further_teachers`, named by the user, teach at the same time.
    """

    program: Literal["distill"]
    teacher: TeacherSettings
    target: TargetSettings = TargetSettings()
    further_teachers: Annotated[dict[Label, FurtherTeacherSettings], AfterValidator(_without_first)] = {}
    loss: LossSettings = LossSettings()

    @property
    def teachers(self) -> dict[str, tuple[TeacherSettings, TargetSettings]]:
        """Every teacher and its target by the setting that names it: `teacher`, `further_teachers.NAME`; sorted."""
        further = {f"further_teachers.{name}": (one, one.target) for name, one in sorted(self.further_teachers.items())}
        return {FIRST_TEACHER: (self.teacher, self.target), **further}


class AugmentSettings(Settings):
    """What fine-tuning adds to crop and flip, in timm's words; everything is off by default.

    `mixup` and `cutmix` are the alphas of their Beta distributions. One draw of the two serves `images_per_draw`
    images: the official implementation draws once for the batch of a GPU.
    """

    randaugment: Name | None = None
    erasing: Fraction = 0.0
    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0
    mix_probability: Fraction = 1.0
    switch_probability: Fraction = 0.5
    images_per_draw: Positive = 128


class HeadSettings(Settings):
    """The classifier: the mean of the patch tokens, a norm, a linear layer that starts at `init_scale` of its draw.

    `norm` is the `student`'s own, before the mean, or a new one `after_pooling` that takes its place (official ViT).
    `weights` is the `classifier.safetensors` of an earlier fine-tuning: `all` of it is kept, or, where the classes are
    others, its `norm` alone.
    """

    norm: Literal["student", "after_pooling"] = "student"
    init_scale: Annotated[float, Field(gt=0)] = 0.001
    weights: Name | None = None
    keep: Literal["all", "norm"] = "all"


class FinetuneSettings(ShardRunSettings):
    """Supervised fine-tuning; `labelled` trains on so many samples only, drawn by the seed."""

    program: Literal["finetune"]
    classes: Annotated[int, Field(ge=2)]
    label_smoothing: Rate = 0.0
    labelled: Positive | None = None
    head: HeadSettings = HeadSettings()
    augment: AugmentSettings = AugmentSettings()
