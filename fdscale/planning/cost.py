"""What a step computes, how long that takes at an assumed efficiency, and what lies on hosts and disks; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fdscale.planning.engine_rules import FP32, EngineRules
from fdscale.planning.gpus import Gpu
from fdscale.planning.memory import ADAM_MOMENTS, RankMemory
from fdscale.planning.trace import Trace

EFFICIENCY = 0.35  # of the dense peak, recomputation counted as work: an assumption, met by well-fed ViTs on H100
DAY, HOUR = 86_400, 3_600  # seconds
WORKER = 150 * 2**20  # bytes that a forked loader worker comes to own: Python objects, decoder, images in flight
BATCHES_A_WORKER = 2  # as the loader's AHEAD, which is not to be had without torch


@dataclass(frozen=True)
class Flops:
    """Floating point operations of one image, two for a multiply-accumulate of a matrix product.

    `backward` holds what activation checkpointing computes again, `recomputed` how much of it that is.
    """

    forward: int
    backward: int
    recomputed: int
    teachers: int

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.teachers

    @property
    def model(self) -> int:
        """What the networks need, whether or not a part of it is computed twice: the numerator of MFU."""
        return self.total - self.recomputed


def flops_per_image(student: Trace, teachers: Mapping[str, Trace], micro_batch: int) -> Flops:
    """From the traces of one micro batch; the backward pass proper costs twice the forward's."""
    forward, backward = student.forward_flops // micro_batch, student.backward_flops // micro_batch
    frozen = sum(trace.forward_flops for trace in teachers.values()) // micro_batch
    return Flops(forward, backward, max(backward - 2 * forward, 0), frozen)


@dataclass(frozen=True)
class Pace:
    """How fast a run goes at an assumed share of the GPUs' peak."""

    efficiency: float
    images_per_second: float
    days: float
    gpu_hours: float


@dataclass(frozen=True)
class Cost:
    """What a whole run takes: `samples` an epoch, `samples_are` where that number comes from; `pace` None: unknown."""

    parameters: int
    checkpoint_bytes: int
    flops: Flops
    pace: Pace | None
    epochs: float
    samples: int
    samples_are: str


def pace(flops: Flops, gpu: Gpu, gpus: int, rules: EngineRules, images: float, efficiency: float) -> Pace:
    """The pace of `images` images in all on `gpus` GPUs; 16-bit runs use the tensor cores, fp32 ones do not."""
    peak = gpu.bf16 if rules.frozen < FP32 else gpu.fp32
    rate = gpus * peak * efficiency / flops.total
    seconds = images / rate
    return Pace(efficiency, rate, seconds / DAY, seconds / HOUR * gpus)


def checkpoint_bytes(trained: int, rules: EngineRules, ema: bool) -> int:
    """Bytes of one checkpoint over all ranks: fp32 weights, moments, a moving average, and the weights as they run.

    ZeRO-3 keeps no running weights beside the partitions of the optimizer.
    """
    states = FP32 + ADAM_MOMENTS * rules.moment + (FP32 if ema else 0)
    return trained * (states + (0 if rules.keeper == "zero3" else rules.weight))


@dataclass(frozen=True)
class HostMemory:
    """Bytes of a node's host memory: while networks are built, and during training; loaders are a rough estimate."""

    building: int
    offloaded: int
    loaders: int

    @property
    def peak(self) -> int:
        return max(self.building, self.offloaded + self.loaders)


def host_memory(
    states: RankMemory,
    student: Trace,
    teachers: Mapping[str, Trace],
    divided: Mapping[str, bool],
    rules: EngineRules,
    local_ranks: int,
    workers: int,
    batch_bytes: int,
    whole_up_to: int,
) -> HostMemory:
    """Of the fullest node, the first: rank 0 holds a large network whole in fp32 while it is handed out.

    `divided`: teachers that are not replicated; `batch_bytes` of one micro batch as uint8; `whole_up_to` parameters
    every rank builds for itself.
    """
    building = _building(student, rules.stage >= 3, local_ranks, whole_up_to)
    for where, teacher in teachers.items():  # one network at a time
        building = max(building, _building(teacher, divided[where], local_ranks, whole_up_to))
    loaders = local_ranks * workers * (WORKER + BATCHES_A_WORKER * batch_bytes)
    offloaded = local_ranks * (states.offloaded + student.offloaded)
    return HostMemory(building, offloaded, loaders)


def _building(network: Trace, divided: bool, local_ranks: int, whole_up_to: int) -> int:
    whole = network.parameters * FP32
    if not divided or network.parameters <= whole_up_to:
        return whole * local_ranks
    largest = max(sum(network.weights[index] for index in module.own) for module in network.modules)
    return whole + (local_ranks - 1) * largest * FP32
