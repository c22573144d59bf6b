"""fdscale's own step for the benchmarks: its networks, engine and loop; and the same networks without the engine."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fdscale.bench.pairs import config_of
from fdscale.bench.planned import lesson_of
from fdscale.build.networks import prepare_student, prepare_teacher, seeded
from fdscale.build.training import optimizer_groups
from fdscale.config.settings import DistillSettings
from fdscale.distill.distiller import Distiller, Lesson
from fdscale.students.drop_path import drop_path_rows
from fdscale.students.student import Student
from fdscale.teachers.teacher import Teacher
from fdscale.training.engine import compute_dtype, start_engine
from fdscale.training.loop import train_step
from fdscale.training.optim import adamw

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass
class Built:
    """The networks of a recipe with random weights, in the precision of its DeepSpeed JSON."""

    settings: DistillSettings
    config: dict[str, Any]
    student: Student
    teacher: Teacher
    lesson: Lesson
    distiller: Distiller

    def terms(self, module: Any, pixels: Tensor, step: int) -> dict[str, Tensor]:
        """What one batch means, as in `fdscale.train`."""
        sites, batch = self.student.drop_path_sites, self.settings.data.global_batch
        draws = drop_path_rows(self.settings.seed, step, sites, batch, slice(0, len(pixels)))
        terms: dict[str, Tensor] = module(pixels, [self.lesson.targets(self.teacher(pixels))], draws)
        return terms


def built(settings: DistillSettings, micro_batch: int, bf16: bool, device: torch.device) -> Built:
    """Student, teacher and distiller of the settings, for so many images a rank."""
    config = config_of(settings, micro_batch, bf16)
    teacher = prepare_teacher(settings.teacher, "random", compute_dtype(config)).to(device)
    student = prepare_student(settings.student, settings.seed)
    lesson = lesson_of(settings, student, teacher)
    with seeded(settings.seed):
        distiller = Distiller(student, student.width, [lesson], settings.loss.beta).to(device)
    return Built(settings, config, student, teacher, lesson, distiller)


def product_step(settings: DistillSettings, pixels: Tensor, bf16: bool) -> Callable[[], Tensor]:
    """One optimizer step of fdscale on `pixels`, again and again; returns its loss."""
    return partial(started(settings, len(pixels), bf16, pixels.device)[1], pixels)


def started(
    settings: DistillSettings, micro_batch: int, bf16: bool, device: torch.device
) -> tuple[DeepSpeedEngine, Callable[[Tensor], Tensor]]:
    """The engine of the settings, and its step on a micro batch of pixels, which returns the loss."""
    networks, optim = built(settings, micro_batch, bf16, device), settings.optim
    groups = optimizer_groups(networks.distiller, networks.student, optim)
    optimizer = adamw(groups, optim.lr, optim.betas, optim.eps)
    engine = start_engine(networks.distiller, optimizer, networks.config, 1, optim.clip)
    steps = itertools.count()

    def step(pixels: Tensor) -> Tensor:
        return train_step(engine, networks.terms, [pixels], next(steps))["loss"]

    return engine, step


def without_engine(settings: DistillSettings, pixels: Tensor, bf16: bool) -> Callable[[], Tensor]:
    """The same networks in the same precision, fp32 masters kept by hand: what is left out is DeepSpeed."""
    networks, optim = built(settings, len(pixels), bf16, pixels.device), settings.optim
    masters = [nn.Parameter(weight.detach().clone()) for weight in networks.distiller.parameters()]
    groups = optimizer_groups(networks.distiller, networks.student, optim)
    of_weight = dict(zip(networks.distiller.parameters(), masters, strict=True))
    for group in groups:
        group["params"] = [of_weight[weight] for weight in group["params"]]
    networks.distiller.to(compute_dtype(networks.config))
    optimizer = adamw(groups, optim.lr, optim.betas, optim.eps)
    weights = list(networks.distiller.parameters())
    networks.distiller.train()
    steps = itertools.count()

    def step() -> Tensor:
        loss = networks.terms(networks.distiller, pixels, next(steps))["loss"]
        loss.backward()
        for master, weight in zip(masters, weights, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(masters, optim.clip)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_([*weights], [*masters])
        return loss.detach()

    return step
