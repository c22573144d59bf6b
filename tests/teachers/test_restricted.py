from __future__ import annotations

import builtins
import collections
import contextlib
import functools
import importlib.util
import io
import os
import pickle
import struct
import sys
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdscale.config.errors import UserError
from fdscale.teachers import restricted
from fdscale.teachers.restricted import ALLOWED, Placeholder, read_restricted
from fdscale.teachers.weights import read_checkpoint, read_state_dict

DTYPES = [
    getattr(torch, name) for name in ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8"]
]


def saved(value: object, path: Path, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def archive(pickled: bytes, path: Path, storages: dict[str, bytes] | None = None) -> Path:
    """A file as torch.save writes it, around a pickle of our choice."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        for key, data in (storages or {}).items():
            file.writestr(f"archive/data/{key}", data)
    return path


class Calls:
    """Pickles into a call of `function(*arguments)`."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __call__(self) -> None:
        raise AssertionError("only there to be taken for a callable by the pickler")

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.call


# --- what it keeps --------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_and_plain_containers_come_back(tmp_path: Path, zipped: bool) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tree = {
        "dtypes": [torch.arange(6).to(dtype) for dtype in DTYPES] + [torch.tensor([True, False])],
        "transposed": base.t(),
        "slice": base[1:, ::2],
        "whole": base,
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "state": torch.nn.Linear(2, 3).state_dict(),
        "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
        "plain": (1, 2.5, "text", None, True, {3}, b"bytes", [torch.Size([2, 3])]),
        "args": Namespace(lr=0.1),
    }
    back = read_restricted(saved(tree, tmp_path / "file.pth", zipped))
    assert isinstance(back, dict)
    for one, other in zip(back["dtypes"], tree["dtypes"], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    for key in ("transposed", "slice", "whole", "scalar", "empty", "parameter"):
        torch.testing.assert_close(back[key], tree[key].detach(), rtol=0, atol=0)
    assert back["whole"].untyped_storage().data_ptr() == back["transposed"].untyped_storage().data_ptr()
    assert {k: v.shape for k, v in back["state"].items()} == {"weight": (3, 2), "bias": (3,)}
    assert type(back["ordered"]) is dict
    assert list(back["ordered"]) == ["b", "a"]
    assert back["plain"][:6] == tree["plain"][:6]
    assert back["plain"][7] == [(2, 3)]
    assert back["args"].path == "argparse.Namespace"


def test_a_container_that_holds_itself(tmp_path: Path) -> None:
    loop: dict[str, object] = {"args": Namespace()}
    loop["list"] = [loop, (loop,)]
    back = read_restricted(saved(loop, tmp_path / "file.pth"))
    assert back["list"][0] is back
    assert back["list"][1][0]["list"] is back["list"]


def test_an_esvit_checkpoint_with_its_namespace(esvit, tmp_path: Path) -> None:
    state = {f"module.{k}": v for k, v in esvit.state.items()} | {"module.head.mlp.0.weight": torch.ones(3)}
    scalar = np.float64(0.5)
    path = saved(
        {
            "student": state,
            "teacher": {k: v + 1 for k, v in state.items()},
            "optimizer": {"state": {0: {"step": 1}}},
            "epoch": 3,
            "args": Namespace(arch="swin_base", out_dim=scalar),
        },
        tmp_path / "checkpoint_best.pth",
    )
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    read = read_state_dict(path, "student")
    assert torch.equal(read["norm.weight"], esvit.state["norm.weight"])
    assert torch.equal(read_state_dict(path, "teacher")["norm.weight"], esvit.state["norm.weight"] + 1)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_whose_config_class_is_gone(tmp_path: Path, zipped: bool) -> None:
    source = tmp_path / "yacs_like.py"
    source.write_text("class CfgNode(dict):\n    def __getattr__(self, key):\n        return self[key]\n")
    spec = importlib.util.spec_from_file_location("yacs_like", source)
    module = importlib.util.module_from_spec(spec)
    sys.modules["yacs_like"] = module
    spec.loader.exec_module(module)
    node = module.CfgNode(MODEL=module.CfgNode(TYPE="vit"))
    node.__dict__["__immutable__"] = True
    model = {"encoder.norm.weight": torch.ones(4), "feature_model.visual.proj": torch.ones(2)}
    path = saved({"model": model, "config": node, "epoch": 299}, tmp_path / "fd.pth", zipped)
    del sys.modules["yacs_like"]
    source.unlink()
    back = read_checkpoint(path)
    assert isinstance(back["config"], Placeholder)
    assert repr(back["config"]) == "<placeholder of yacs_like.CfgNode>"
    assert torch.equal(back["model"]["encoder.norm.weight"], torch.ones(4))
    assert back["epoch"] == 299
    assert "yacs_like" not in sys.modules


# --- what it refuses to run -----------------------------------------------------------------------


def write_to(path: Path) -> str:
    return f"open({str(path)!r}, 'w').close()"


HOSTILE: dict[str, Callable[[Path], object]] = {
    "os.system": lambda mark: Calls(os.system, f"touch {mark}"),
    "exec": lambda mark: Calls(exec, write_to(mark)),
    "eval": lambda mark: Calls(eval, write_to(mark)),
    "getattr": lambda mark: Calls(Calls(getattr, os, "system"), f"touch {mark}"),
    "open": lambda mark: Calls(open, str(mark), "w"),
    "import": lambda mark: Calls(builtins.__import__, "os"),
    "map over a list": lambda mark: Calls(list, Calls(map, os.system, [f"touch {mark}"])),
    "torch.hub": lambda mark: Calls(functools.partial(torch.hub.load, source="local"), str(mark.parent), "model"),
    "torch.load": lambda mark: Calls(torch.load, io.BytesIO(pickle.dumps(Calls(exec, write_to(mark))))),
    "storage from bytes": lambda mark: Calls(torch.storage._load_from_bytes, pickle.dumps(Calls(exec, write_to(mark)))),
    "rebuild from type": lambda mark: Calls(
        torch._tensor._rebuild_from_type_v2, exec, torch.Tensor, (write_to(mark),), {}
    ),
    "dotted import": lambda mark: Calls(torch._utils._import_dotted_name, "os.system"),
    "jit source": lambda mark: Calls(torch.jit.CompilationUnit, "def f(): pass"),
    "module state": lambda mark: torch.nn.Sequential(torch.nn.Linear(1, 1)),
    "a dict of calls": lambda mark: collections.OrderedDict(a=Calls(os.system, f"touch {mark}")),
    "a key": lambda mark: {Calls(os.system, f"touch {mark}"): 1},
    "a namespace of calls": lambda mark: SimpleNamespace(a=Calls(exec, write_to(mark))),
}


def pickled(value: object, protocol: int) -> bytes:
    """Bytes of `value`; what cannot be pickled here (a module, a file) is had by a call."""

    class Pickler(pickle.Pickler):
        def reducer_override(self, found: object) -> object:
            if found is os:
                return builtins.__import__, ("os",)
            if isinstance(found, io.BytesIO):
                return io.BytesIO, (found.getvalue(),)
            return NotImplemented

    buffer = io.BytesIO()
    Pickler(buffer, protocol).dump(value)
    return buffer.getvalue()


def legacy(payload: bytes, path: Path) -> Path:
    head = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}))
    path.write_bytes(head + payload + pickle.dumps([], 2))
    return path


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_pickles_do_not_run(attack: str, protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    hubconf = f"{write_to(mark)}\ndef model():\n    {write_to(mark)}\n"
    (tmp_path / "hubconf.py").write_text(hubconf)
    try:
        payload = pickled({"weights": 1, "evil": HOSTILE[attack](mark)}, protocol)
    except TypeError:
        pytest.skip("not picklable in this protocol")
    for path in (archive(payload, tmp_path / "zip.pth"), legacy(payload, tmp_path / "legacy.pth")):
        for read in (read_restricted, read_checkpoint):
            try:
                back = read(path)
            except UserError as error:
                assert str(path) in str(error)  # noqa: PT017
            else:
                assert back["weights"] == 1
                assert {type(leaf) for leaf in leaves(back["evil"])} <= {int, str} or inert(back["evil"])
    assert not mark.exists()


def inert(node: object) -> bool:
    return all(isinstance(leaf, Placeholder | str | int | float | bool | None) for leaf in leaves(node))


def leaves(node: object) -> list[object]:
    if isinstance(node, dict):
        return [leaf for pair in node.items() for part in pair for leaf in leaves(part)]
    if isinstance(node, list | tuple | set | frozenset):
        return [leaf for part in node for leaf in leaves(part)]
    return [node]


def test_the_attacks_of_this_file_are_real(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for attack in ("os.system", "exec", "eval", "getattr", "open", "storage from bytes", "rebuild from type"):
        with contextlib.suppress(TypeError, AttributeError, pickle.UnpicklingError, RuntimeError):
            pickle.loads(pickled(HOSTILE[attack](mark), 2))  # the call happens, then its result may not please
        if attack != "storage from bytes":  # newer torch reads those bytes without running them
            assert mark.exists(), attack
            mark.unlink()


@pytest.mark.parametrize("name", sorted({f"{module} {name}" for module, name in ALLOWED}))
@pytest.mark.parametrize("state", [{"__call__": 1}, (None, {"__init__": 1, "__setstate__": 1, "dtype": 1})])
def test_the_allowed_names_cannot_be_tampered_with(name: str, state: object, tmp_path: Path) -> None:
    before = {key: vars(value) if isinstance(value, type) else value for key, value in ALLOWED.items()}
    frozen = {key: dict(value) for key, value in before.items() if not isinstance(value, restricted._StorageType)}
    payload = f"c{name.replace(' ', chr(10))}\n".encode() + pickle.dumps(state, 0)[:-1] + b"b."
    with contextlib.suppress(UserError):
        read_restricted(archive(payload, tmp_path / "file.pth"))
    assert frozen == {key: dict(vars(ALLOWED[key])) for key in frozen}
    assert ALLOWED["torch", "FloatStorage"].dtype == torch.float32
    plain = saved({"a": torch.ones(2), "args": Namespace()}, tmp_path / "plain.pth")
    assert torch.equal(read_restricted(plain)["a"], torch.ones(2))


def test_the_names_that_are_allowed_reach_no_function() -> None:
    kinds = {value for value in ALLOWED.values() if isinstance(value, type)}
    assert kinds - {set, frozenset, tuple} == {restricted._Dict, restricted._Tensor, restricted._Parameter}
    others = [value for value in ALLOWED.values() if not isinstance(value, type)]
    assert all(isinstance(value, restricted._StorageType) and not callable(value) for value in others)


@pytest.mark.parametrize(
    "name", ["collections OrderedDict.fromkeys", "torch Size.__class__", "builtins set.__init_subclass__"]
)
def test_dotted_names_under_an_allowed_one_are_placeholders(name: str, tmp_path: Path) -> None:
    module, attribute = name.split()
    payload = (
        pickle.PROTO
        + b"\x04"
        + b"".join(pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode() for text in (module, attribute))
    )
    back = read_restricted(archive(payload + pickle.STACK_GLOBAL + b".", tmp_path / "file.pth"))
    assert issubclass(back, Placeholder)
    assert back.path == f"{module}.{attribute}"


# --- what it refuses to believe -------------------------------------------------------------------


def tensor_pickle(count: object, offset: object, size: object, stride: object, key: object = "0") -> bytes:
    """A pickle of one tensor of the storage '0' with such numbers."""

    class Storage:
        pass

    class Tensor:
        def __reduce__(self) -> tuple:
            arguments = (Storage(), offset, size, stride, False, collections.OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    class Pickler(pickle.Pickler):
        def persistent_id(self, found: object) -> object:
            return ("storage", torch.FloatStorage, key, "cpu", count) if isinstance(found, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(Tensor())
    return buffer.getvalue()


def test_a_tensor_within_its_storage(tmp_path: Path) -> None:
    data = struct.pack("<4f", 0, 1, 2, 3)
    path = archive(tensor_pickle(4, 1, (1, 3), (3, 1)), tmp_path / "file.pth", {"0": data})
    assert torch.equal(read_restricted(path), torch.tensor([[1.0, 2.0, 3.0]]))


@pytest.mark.parametrize(
    ("count", "offset", "size", "stride", "key"),
    [
        (4, 0, (5,), (1,), "0"),
        (4, 1, (4,), (1,), "0"),
        (4, 0, (2, 2), (3, 1), "0"),
        (4, -1, (2,), (1,), "0"),
        (4, 0, (-2,), (1,), "0"),
        (4, 3, (2,), (-1,), "0"),
        (4, 0, (2,), (1, 1), "0"),
        (4, 0, (2**62, 4), (4, 1), "0"),
        (4, 2**63, (1,), (1,), "0"),
        (4, 0, [4], (1,), "0"),
        (4, 0, (2.0,), (1,), "0"),
        (5, 0, (5,), (1,), "0"),
        (2**60, 0, (5,), (1,), "0"),
        (-1, 0, (5,), (1,), "0"),
        ("4", 0, (1,), (1,), "0"),
        (4, 0, (4,), (1,), "1"),
        (4, 0, (4,), (1,), "../data.pkl"),
        (4, 0, (4,), (1,), 0),
    ],
)
def test_a_tensor_that_lies_about_its_storage(
    count: object, offset: object, size: object, stride: object, key: object, tmp_path: Path
) -> None:
    payload = tensor_pickle(count, offset, size, stride, key)
    path = archive(payload, tmp_path / "file.pth", {"0": struct.pack("<4f", 0, 1, 2, 3)})
    with pytest.raises(UserError, match="cannot be read"):
        read_restricted(path)


def test_a_tensor_beyond_its_storage_is_told_before_torch_sees_it(tmp_path: Path) -> None:
    path = archive(tensor_pickle(4, 1, (2, 2), (2, 1)), tmp_path / "file.pth", {"0": bytes(16)})
    with pytest.raises(UserError, match="reaches element 4 of a storage of 4"):
        read_restricted(path)


def test_a_compressed_archive_and_a_foreign_byte_order_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\x00" * 10_000_000)
    with pytest.raises(UserError, match="compressed"):
        read_restricted(tmp_path / "bomb.pth")
    with zipfile.ZipFile(archive(pickle.dumps(1, 2), tmp_path / "big.pth"), "a") as file:
        file.writestr("archive/byteorder", "big" if sys.byteorder == "little" else "little")
    with pytest.raises(UserError, match="byte order"):
        read_restricted(tmp_path / "big.pth")


def test_deep_and_exponential_nesting_end(tmp_path: Path) -> None:
    deep = b"(" * 0 + b"]" * 200_000 + b"a" * 199_999 + b"."
    with pytest.raises(UserError, match="RecursionError"):
        read_restricted(archive(b"\x80\x02" + deep, tmp_path / "deep.pth"))
    wide: tuple = ()
    for _ in range(60):
        wide = (wide, wide)
    assert isinstance(read_restricted(archive(pickle.dumps(wide, 2), tmp_path / "wide.pth")), tuple)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.9, 0.999])
def test_truncated_files_are_told(zipped: bool, part: float, tmp_path: Path) -> None:
    path = saved({"w": torch.ones(500), "args": Namespace()}, tmp_path / "cut.pth", zipped)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    for read in (read_restricted, read_checkpoint):
        with pytest.raises(UserError, match=r"cut\.pth cannot be read"):
            read(path)


@settings(max_examples=150)
@given(data=st.data())
def test_broken_bytes_give_a_user_error_or_a_value(data: st.DataObject, tmp_path_factory) -> None:
    sound = pickle.dumps({"a": [1, (2, "x")], "b": collections.deque([1])}, 2)
    position = data.draw(st.integers(0, len(sound) - 1))
    # opcode r, a memo slot of 4 bytes, may ask for gigabytes: a nuisance, not a danger
    assert b"r" not in sound
    byte = data.draw(st.integers(0, 255).filter(lambda b: b != ord("r")))
    broken = sound[:position] + bytes([byte]) + sound[position + 1 :]
    path = archive(broken, tmp_path_factory.mktemp("broken") / "file.pth")
    try:
        inert(read_restricted(path))
    except UserError:
        return
