"""The one restricted reader of pickled weights: tensors and plain containers, calling nothing of the file's.

Two passes. The pickle machine first builds records only: every name in the file maps either to one of a few
inert types below or to a `Placeholder`, so no function is reachable, whatever the file asks for. Then the
records become tensors, by bounds-checked views of the storages' bytes.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import BinaryIO, ClassVar

import torch
from torch import Tensor

from fdscale.config.errors import UserError

LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001  # torch.save before 1.6 wrote no zip


class Placeholder:
    """What stands for an object of any other class: it knows the class's name, and holds and does nothing."""

    __slots__ = ()
    path: ClassVar[str] = ""

    def __new__(cls, *args: object, **kwargs: object) -> Placeholder:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __call__(self, *args: object) -> Placeholder:
        return self

    def __repr__(self) -> str:
        return f"<placeholder of {self.path}>"

    def _ignore(self, *args: object) -> None:
        pass

    # what the pickle machine does to an object: set its state, its items, its elements
    __setstate__ = __setitem__ = append = extend = add = _ignore


class _Dict(dict[Hashable, object]):
    """A dict or an OrderedDict, without attributes of its own."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


class _StorageType:
    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __setstate__(self, state: object) -> None:
        pass


class _Storage:
    """Where a tensor's elements lie: `count` elements of the storage `key`, from element `start` on."""

    __slots__ = ("count", "dtype", "key", "start")

    def __init__(self, dtype: torch.dtype, key: str, count: int, start: int = 0) -> None:
        self.dtype, self.key, self.count, self.start = dtype, key, count, start

    def __setstate__(self, state: object) -> None:
        pass


class _Tensor:
    """A tensor to be: the arguments of torch's rebuild function, of which the hooks are dropped."""

    __slots__ = ("offset", "size", "storage", "stride")

    def __init__(self, storage: object, offset: object, size: object, stride: object, *_: object) -> None:
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride

    def __setstate__(self, state: object) -> None:
        pass


class _Parameter:
    """A parameter is its tensor."""

    def __new__(cls, data: object, *dropped: object) -> object:  # type: ignore[misc]
        return data

    def __setstate__(self, state: object) -> None:
        pass


STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

# Exact names, nothing else. Dense tensors only: a quantised or sparse one becomes a placeholder.
ALLOWED: dict[tuple[str, str], object] = {
    ("collections", "OrderedDict"): _Dict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("__builtin__", "frozenset"): frozenset,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _Tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _Parameter,
    **{("torch", name): _StorageType(dtype) for name, dtype in STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Builds records. Every global goes through `find_class`, every storage through `persistent_load`.

    The pickle machine may set the state of whatever it can name, classes included: that is why each type
    above answers `__setstate__` itself (called on the class, a placeholder's does nothing, the others' fails).
    `dtypes` is the element type of each storage, which the old format needs.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.dtypes: dict[str, torch.dtype] = {}
        self.placeholders: dict[str, type[Placeholder]] = {}

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        path = f"{module}.{name}"
        if path not in self.placeholders:
            self.placeholders[path] = type("Placeholder", (Placeholder,), {"__slots__": (), "path": path})
        return self.placeholders[path]

    def persistent_load(self, pid: object) -> object:
        match pid:
            case ("storage", _StorageType() as kind, str(key), _, int(count)):
                return _Storage(kind.dtype, key, count)
            case ("storage", _StorageType() as kind, str(key), _, int(count), None):
                self.dtypes[key] = kind.dtype
                return _Storage(kind.dtype, key, count)
            case ("storage", _StorageType() as kind, str(key), _, int(), (_, int(start), int(count))):
                self.dtypes[key] = kind.dtype
                return _Storage(kind.dtype, key, count, start)
            case ("module", kind, *_):
                return kind
        raise pickle.UnpicklingError(f"unknown persistent id {pid!r}")


def read_restricted(path: Path) -> object:
    """What a torch.save file holds, its foreign objects as `Placeholder`s.

    Raises UserError when the file is truncated, malformed or of a kind that this reader does not know.
    """
    try:
        return _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
    except Exception as error:  # a hostile file may raise anything, and none of it is a bug of ours
        raise UserError(
            f"teacher.weights: {path} cannot be read as a torch.save file: {type(error).__name__}: {error}; "
            "fetch it again, or convert it to safetensors where it was made"
        ) from error


def _read_zip(path: Path) -> object:
    with zipfile.ZipFile(path) as archive:
        (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        root = pickled.removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist():
            order = _stored(archive, f"{root}byteorder").decode()
            if order != sys.byteorder:
                raise ValueError(f"its byte order is {order}, this machine's is {sys.byteorder}")
        tree = _Unpickler(io.BytesIO(_stored(archive, pickled))).load()
        return _Rebuild(lambda key: _stored(archive, f"{root}data/{key}")).plain(tree)


def _stored(archive: zipfile.ZipFile, name: str) -> bytearray:
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed, which torch.save never does")
    return bytearray(archive.read(name))


def _read_legacy(path: Path) -> object:
    with path.open("rb") as file:
        if _Unpickler(file).load() != LEGACY_MAGIC or _Unpickler(file).load() != LEGACY_VERSION:
            raise ValueError("it is neither a zip archive nor the older format of torch.save")
        _Unpickler(file).load()  # the writer's word sizes
        reader = _Unpickler(file)
        tree = reader.load()
        keys = _Unpickler(file).load()
        storages = {key: _legacy_storage(file, reader.dtypes[key].itemsize) for key in keys}
    return _Rebuild(storages.__getitem__).plain(tree)


def _legacy_storage(file: BinaryIO, itemsize: int) -> bytearray:
    (count,) = struct.unpack("<q", file.read(8))
    left = os.fstat(file.fileno()).st_size - file.tell()
    if not 0 <= count * itemsize <= left:
        raise ValueError(f"it is truncated: a storage of {count * itemsize} bytes where {left} are left")
    return bytearray(file.read(count * itemsize))


class _Rebuild:
    """The second pass: records to tensors, containers to plain ones, each object once."""

    def __init__(self, read: Callable[[str], bytearray]) -> None:
        self.read = read
        self.storages: dict[str, bytearray] = {}
        self.done: dict[int, object] = {}

    def plain(self, node: object) -> object:
        if id(node) not in self.done:
            self.done[id(node)] = self._plain(node)
        return self.done[id(node)]

    def _plain(self, node: object) -> object:
        if isinstance(node, _Tensor):
            return self._tensor(node)
        if isinstance(node, dict):
            self.done[id(node)] = copy = dict[Hashable, object]()  # before its values: it may hold itself
            copy.update((key, self.plain(value)) for key, value in node.items())
            return copy
        if isinstance(node, list):
            self.done[id(node)] = elements = list[object]()
            elements.extend(self.plain(item) for item in node)
            return elements
        return tuple(self.plain(item) for item in node) if isinstance(node, tuple) else node

    def _tensor(self, record: _Tensor) -> Tensor:
        storage = record.storage
        if not isinstance(storage, _Storage):
            raise ValueError(f"a tensor without a storage: {storage!r}")
        size, stride, (offset,) = _counts(record.size), _counts(record.stride), _counts((record.offset,))
        last = offset + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True))
        if 0 not in size and last >= storage.count:
            raise ValueError(f"a tensor that reaches element {last} of a storage of {storage.count}")
        return torch.as_strided(self._elements(storage), size, stride, offset)

    def _elements(self, storage: _Storage) -> Tensor:
        if storage.key not in self.storages:
            self.storages[storage.key] = self.read(storage.key)
        data, first = self.storages[storage.key], storage.start * storage.dtype.itemsize
        if storage.count == 0:
            return torch.empty(0, dtype=storage.dtype)
        return torch.frombuffer(data, dtype=storage.dtype, count=storage.count, offset=first)


def _counts(values: object) -> tuple[int, ...]:
    """Whole numbers from 0 up; anything else in a tensor's shape is an attack or a broken file."""
    if not isinstance(values, tuple) or not all(isinstance(v, int) and v >= 0 for v in values):
        raise ValueError(f"a tensor's offset, size and stride are whole numbers, got {values!r}")
    return values
