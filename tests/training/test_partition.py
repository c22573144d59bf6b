"""A network that rank 0 alone has in full is the plain one, bit for bit, once it is divided; training goes the same."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fdscale.students.geometry import Geometry, SwinV2Geometry, TimmGeometry, ViTGeometry
from fdscale.students.student import Student, build_student
from fdscale.training.engine import Connection, full_state, parameter_dtype, start_engine
from fdscale.training.optim import adamw, parameter_groups
from fdscale.training.partition import divide, is_divided, share

STUDENTS: dict[str, Geometry] = {
    "swin_v2": SwinV2Geometry(16, (1, 2), (2, 4), window_size=4, image_size=64, extra_norm_period=2),
    "vit": ViTGeometry(32, 2, 4, patch_size=8, image_size=32),
    "timm": TimmGeometry("vit_tiny_patch16_224", 32, {"depth": 2, "embed_dim": 32, "num_heads": 2}),
}
LEAN = {  # nothing stays resident: tiny networks would hide what sharding breaks
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}
JSON: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}


def plain(geometry: Geometry) -> Student:
    return build_student(geometry, drop_path=0.2, seed=3)


def built_by_rank_0(connection: Connection, geometry: Geometry) -> Student:
    return build_student(geometry, 0.2, 3, "cpu" if connection.rank.is_main else "meta")


def gathered(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer in full, those outside the state dict included."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(network.parameters())):
        return {name: t.detach().clone() for name, t in [*network.named_parameters(), *network.named_buffers()]}


def divided_against_plain(connection: Connection, geometry: Geometry, dtype: torch.dtype | None) -> list[str]:
    """What differs, by name; afterwards nothing may be whole or on meta."""
    student, wanted = built_by_rank_0(connection, geometry), plain(geometry)
    divide(student, JSON, connection, dtype)
    assert all(is_divided(parameter) and parameter.numel() == 0 for parameter in student.parameters())
    found = gathered(student)
    expected = {name: p.to(dtype or p.dtype) for name, p in wanted.named_parameters()}
    expected |= dict(wanted.named_buffers())
    assert found.keys() == expected.keys()
    rates = [[getattr(m, "drop_prob", None) for m in network.modules()] for network in (student, wanted)]
    assert rates[0] == rates[1]
    same = {name: found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in expected.items()}
    return [name for name, equal in same.items() if not equal]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("geometry", STUDENTS.values(), ids=STUDENTS)
def test_divided_parameters_and_buffers_are_the_plain_builds(
    geometry: Geometry, dtype: torch.dtype | None, two_ranks: Any
) -> None:
    assert two_ranks(divided_against_plain, geometry, dtype) == [[], []]


class Trained(nn.Module):
    """A student and the head that stands beside it, built as ever."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student, self.head = student, nn.Linear(student.width, 7)

    def forward(self, pixels: Tensor, draws: Tensor) -> Tensor:
        return self.head(self.student(pixels, draws))


def trained(connection: Connection, geometry: Geometry, config: dict[str, Any], by_rank_0: bool) -> dict[str, Any]:
    """Three steps towards noise: losses and norms of this rank, parameter groups, and the weights in the end."""
    dtype = parameter_dtype(config)
    student = built_by_rank_0(connection, geometry) if by_rank_0 else plain(geometry)
    if by_rank_0:
        divide(student, config, connection, dtype)
    torch.manual_seed(5)
    module = Trained(student)
    if by_rank_0:
        divide(module, config, connection, dtype)  # what is beside the student
    groups = parameter_groups(module, 0.05, ())
    engine = start_engine(module, adamw(groups, 1e-2, (0.9, 0.999), 1e-8), config, 1, clip=0.5)
    losses, norms = [], []
    for step in range(3):
        torch.manual_seed(10 * step + connection.rank.rank)
        pixels = torch.rand(2, 3, student.image_size, student.image_size)
        draws = torch.rand(student.drop_path_sites, 2)
        tokens = engine(pixels, draws).float()
        loss = (tokens - torch.randn(tokens.shape)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        norms.append(float(engine.get_global_grad_norm()))
    decays = [(len(group["params"]), group["weight_decay"]) for group in groups]
    return {"losses": losses, "norms": norms, "decays": decays, "weights": full_state(engine, module, wanted=True)}


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("geometry", [STUDENTS["swin_v2"], STUDENTS["vit"]], ids=["swin_v2", "vit"])
def test_a_divided_build_trains_as_the_plain_one(geometry: Geometry, bf16: bool, two_ranks: Any) -> None:
    config = {**JSON, "zero_optimization": {"stage": 3, **LEAN}, **({"bf16": {"enabled": True}} if bf16 else {})}
    whole, divided = (two_ranks(trained, geometry, config, by_rank_0) for by_rank_0 in (False, True))
    for rank in (0, 1):
        for measured in ("losses", "norms", "decays"):
            assert whole[rank][measured] == divided[rank][measured]
        ends = [outcome[rank]["weights"] for outcome in (whole, divided)]
        assert ends[0].keys() == ends[1].keys()
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert whole[0]["losses"][2] != whole[0]["losses"][0]


class Held(TorchDispatchMode):
    """Bytes of the storages that were made under it and still live, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        self.storages = {key: held for key, held in self.storages.items() if not held[0].expired()}
        return sum(size for _, size in self.storages.values())


def held_bytes(connection: Connection, geometry: Geometry) -> tuple[int, int]:
    """Bytes held while a student was built and divided, at most, and those that stayed."""
    with Held() as held:
        student = built_by_rank_0(connection, geometry)
        divide(student, JSON, connection)
    gc.collect()
    assert all(is_divided(parameter) for parameter in student.parameters())
    return held.peak, held.now()


def test_the_second_rank_never_holds_more_than_its_share_and_a_module(two_ranks: Any) -> None:
    geometry = ViTGeometry(128, 4, 4, patch_size=8, image_size=32)
    student = plain(geometry)
    whole = sum(tensor.nbytes for tensor in [*student.parameters(), *student.buffers()])
    largest = max(parameter.nbytes for parameter in student.parameters())
    (first, kept), (second, also_kept) = two_ranks(held_bytes, geometry)
    assert first >= whole
    assert second <= whole / 2 + 2 * largest < 0.75 * whole
    assert kept == pytest.approx(whole / 2, rel=0.01)
    assert also_kept == pytest.approx(whole / 2, rel=0.01)


class Tied(nn.Module):
    """Two layers with one weight, and a buffer outside the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight
        self.register_buffer("flags", torch.tensor([True, False]), persistent=False)


def tied(connection: Connection) -> list[bool]:
    torch.manual_seed(connection.rank.rank)
    with torch.device("cpu" if connection.rank.is_main else "meta"):
        network, untied = Tied(), Tied()
    divide(network, JSON, connection)
    share([untied.one], connection)
    values = gathered(network)
    sums = torch.stack([values["one.weight"].sum(), values["other.bias"].sum(), untied.one.weight.detach().sum()])
    others = [torch.empty(3), torch.empty(3)]
    torch.distributed.all_gather(others, sums)
    return [network.one.weight is network.other.weight, network.flags.tolist() == [True, False], torch.equal(*others)]


def test_one_weight_of_two_modules_stays_one_and_rank_0_decides(two_ranks: Any) -> None:
    assert two_ranks(tied) == [[True, True, True]] * 2


def uneven(connection: Connection, loose: bool) -> str:
    with torch.device("cpu" if connection.rank.is_main else "meta"):
        network = nn.Linear(4, 4 if loose else 4 + connection.rank.rank)
        if loose:
            network.table = torch.zeros(3)
    try:
        divide(network, JSON, connection)
    except AssertionError as error:
        return str(error)
    return "divided"


def test_what_rank_0_cannot_hand_over_is_found(two_ranks: Any) -> None:
    assert all("has other tensors on the meta device" in told for told in two_ranks(uneven, False))
    assert all("holds tensors that are no buffers: .table" in told for told in two_ranks(uneven, True))
