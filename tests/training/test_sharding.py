"""A teacher gives the same tokens wherever its weights lie, and takes a rank's share of the bytes there."""

from __future__ import annotations

import contextlib
import copy
import gc
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fdscale.build.networks import prepare_teacher
from fdscale.config.settings import TeacherSettings
from fdscale.teachers.teacher import Teacher
from fdscale.training.engine import Connection
from fdscale.training.sharding import place

VIT = {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 8}
SWIN = {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4}
TEACHERS: dict[str, tuple[int, dict[str, Any]]] = {
    "clip_vit_b16": (32, VIT),
    "clip_vit_b16_open_clip": (32, VIT),  # torch's attention, whose output projection is used from outside
    "dinov3_vit_s16": (32, {**VIT, "num_heads": 1}),  # rotary positions
    "esvit_swin_b": (64, SWIN),
    "swinv2_t": (64, {**SWIN, "extra_norm_period": 2}),
}
LEAN = {  # nothing stays resident: tiny networks would hide what sharding breaks
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}
JSON: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3, **LEAN}}


class _Stream:
    """A CUDA stream on a machine without one: everything has already happened."""

    def wait_stream(self, other: object) -> None: ...

    def synchronize(self) -> None: ...


def _proxy(real: Any, **overrides: Any) -> Any:
    class Proxy(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    proxy = Proxy(real.__name__)
    vars(proxy).update(overrides)
    return proxy


@contextlib.contextmanager
def fairscale_without_cuda() -> Iterator[None]:
    """fairscale's FSDP wants CUDA streams: here it is given streams that do nothing, and nothing else changes."""
    import fairscale.nn.data_parallel as package
    import fairscale.nn.data_parallel.fully_sharded_data_parallel as fsdp

    stream = _Stream()
    cuda = _proxy(
        torch.cuda,
        is_available=lambda: True,
        synchronize=lambda *_: None,
        Stream=lambda *_, **__: stream,
        current_stream=lambda *_, **__: stream,
        stream=lambda _: contextlib.nullcontext(),
    )
    original = fsdp.FullyShardedDataParallel

    class OnCpu(original):  # type: ignore[misc, valid-type]
        def _init_param_attributes(self, p: nn.Parameter) -> None:
            super()._init_param_attributes(p)
            for tensor in (getattr(p, "_full_param_padded", None), getattr(p, "_fp16_shard", None)):
                if tensor is not None:
                    tensor.record_stream = lambda _: None

    fsdp.torch, package.FullyShardedDataParallel = _proxy(torch, cuda=cuda), OnCpu
    try:
        yield
    finally:
        fsdp.torch, package.FullyShardedDataParallel = torch, original


def teacher_named(name: str, dtype: torch.dtype = torch.float32) -> Teacher:
    """A tiny random teacher, perturbed: a SwinV2 block starts as the identity."""
    size, geometry = TEACHERS[name]
    settings = TeacherSettings(name=name, weights="random", image_size=size, geometry=geometry)
    teacher = prepare_teacher(settings, "random", dtype)
    generator = torch.Generator().manual_seed(4)
    for parameter in teacher.parameters():
        parameter.data += (torch.randn(parameter.shape, generator=generator) * 0.05).to(parameter.dtype)
    return teacher


def pixels_of(connection: Connection, name: str) -> Tensor:
    generator = torch.Generator().manual_seed(connection.rank.rank)
    return torch.rand(2, 3, TEACHERS[name][0], TEACHERS[name][0], generator=generator)


def compared(connection: Connection, name: str, dtype: torch.dtype, stage: int) -> dict[str, bool]:
    """Whether each placement gives the replicated teacher's tokens, bit for bit, in each of three forwards."""
    config = {**JSON, "zero_optimization": {"stage": stage, **(LEAN if stage == 3 else {})}}
    original, pixels = teacher_named(name, dtype), pixels_of(connection, name)
    whole = place(copy.deepcopy(original), "replicated", config, connection)(pixels)
    assert whole.std() > 0.1, "tokens that say nothing"
    equal = {}
    with fairscale_without_cuda():
        for placement in ("zero3", "fairscale"):
            teacher = place(copy.deepcopy(original), placement, config, connection)  # type: ignore[arg-type]
            tokens = [teacher(pixels) for _ in range(3)]  # DeepSpeed records two, then fetches in their order
            equal[placement] = all(torch.equal(whole, found) for found in tokens)
    return equal


BOTH = {"zero3": True, "fairscale": True}


@pytest.mark.parametrize("name", TEACHERS)
def test_tokens_are_bit_equal_wherever_the_weights_lie(name: str, two_ranks: Any) -> None:
    assert two_ranks(compared, name, torch.float32, 3) == [BOTH, BOTH]


@pytest.mark.parametrize("name", ["swinv2_t", "dinov3_vit_s16"])  # with coordinates that stay in fp32
def test_in_bf16_beside_a_zero_1_student_too(name: str, two_ranks: Any) -> None:
    assert two_ranks(compared, name, torch.bfloat16, 1) == [BOTH, BOTH]


def live_tensors() -> list[Tensor]:
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]


def storages_of(tensors: list[Tensor]) -> dict[int, int]:
    """Addresses and bytes of distinct storages."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def bytes_taken(connection: Connection, dtype: torch.dtype, placement: str) -> int:
    """Bytes of all storages that a placed teacher adds to this process, between two forwards."""
    with fairscale_without_cuda():
        before = live_tensors()  # held, so that no address is used again
        teacher = place(teacher_named("clip_vit_b16", dtype), placement, JSON, connection)  # type: ignore[arg-type]
        for _ in range(3):
            teacher(pixels_of(connection, "clip_vit_b16"))
        old = storages_of(before)
        return sum(size for address, size in storages_of(live_tensors()).items() if address not in old)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_two_ranks_hold_half_of_a_divided_teacher_each(dtype: torch.dtype, size: int, two_ranks: Any) -> None:
    teacher = teacher_named("clip_vit_b16", dtype)
    whole = sum(tensor.nbytes for tensor in [*teacher.parameters(), *teacher.buffers()])
    small = 4 * 2 * 64 + 4 * 6  # the final norm and the input statistics, whole on every rank
    padding = size * len(list(teacher.backbone.parameters()))
    assert two_ranks(bytes_taken, dtype, "replicated") == [whole, whole]
    for placement in ("zero3", "fairscale"):
        for taken in two_ranks(bytes_taken, dtype, placement):
            assert 0 <= taken - (whole + small) / 2 <= padding, placement
