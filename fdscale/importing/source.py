"""A checkpoint taken apart: the backbone's tensors, and what else the file holds, by kind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fdscale.config.errors import UserError
from fdscale.teachers.weights import read_checkpoint

StateDict = dict[str, Tensor]
ENCODER = "encoder."  # official feature distillation and SimMIM wrap the backbone
WRAPPED = {"decoder.": "decoder", "feature_model.": "teacher"}
HEADS = ("head.", "lm_head.")
BUFFERS = {".relative_position_index": 2, ".relative_coords_table": 4, ".attn_mask": 3}  # and their dimensions
IN_A_BLOCK = re.compile(r"layers\.\d+\.blocks\.\d+\.")
CODEBASE_ENTRY = "config"  # Swin's, SimMIM's and feature distillation's checkpoints hold their yacs node there
NETWORKS = ("feature distillation", "SimMIM", "Swin", "SwinV2", "BEiT", "CLIP")


@dataclass(frozen=True)
class Source:
    """A backbone in its original names: `tensors` to be taken, Swin's `buffers` to be read, and what is left behind.

    `left_behind` counts tensors (or entries without any) by kind. `wrapper` tells who trained it, as far as the
    file shows: "feature distillation", "SimMIM", or "" for a bare backbone. `entries` are the checkpoint's keys.
    """

    path: Path
    tensors: StateDict
    buffers: StateDict
    left_behind: Mapping[str, int]
    wrapper: str
    entries: frozenset[str]

    def shape(self, key: str, dims: int) -> tuple[int, ...]:
        """The shape of a tensor that the network cannot be without; raises UserError when it is not as expected."""
        if key not in self.tensors:
            raise UserError(f"{self.path}: 1 missing ({key}), so that its geometry cannot be told; is the file whole?")
        shape = tuple(self.tensors[key].shape)
        if len(shape) != dims:
            raise UserError(f"{self.path}: 1 of another shape ({key} {shape}, not of {dims} dimensions)")
        return shape


def read_source(path: Path) -> Source:
    """What `path` holds. Raises UserError for a file that cannot be read or has no state dict."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; name the checkpoint to import")
    state, entries = _state_dict(path, _read(path))
    wrapped = any(key.startswith(ENCODER) for key in state)
    outside = [key for key in state if wrapped and key.startswith(tuple(WRAPPED))]
    backbone = {key.removeprefix(ENCODER): value for key, value in state.items() if key not in outside}
    kept = {key: value for key, value in backbone.items() if _kind(key) is None}
    counts = Counter(entries)
    counts.update(kind for key in outside for prefix, kind in WRAPPED.items() if key.startswith(prefix))
    counts.update(kind for key in backbone if (kind := _kind(key)) is not None)
    buffers = {key: value for key, value in backbone.items() if _is_swins_buffer(key, value)}
    return Source(path, kept, buffers, dict(counts), _wrapper(state, wrapped), frozenset(entries))


def _read(path: Path) -> object:
    try:
        return read_checkpoint(path)
    except UserError as error:  # the teachers' reader names their setting
        raise UserError(str(error).removeprefix("teacher.weights: ")) from error


def _state_dict(path: Path, tree: object) -> tuple[StateDict, dict[str, int]]:
    """The network's tensors, and the tensors (or 1) of each other entry of the checkpoint."""
    entries: dict[str, int] = {}
    for wrapper in ("model", "state_dict", "module"):
        if isinstance(tree, Mapping) and isinstance(tree.get(wrapper), Mapping):
            entries |= {str(key): _tensors_in(value) or 1 for key, value in tree.items() if key != wrapper}
            tree = tree[wrapper]
    if not isinstance(tree, Mapping):
        raise UserError(f"{path}: holds no state dict but {tree!r}; {_known()}")
    state = {str(key): value for key, value in tree.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"{path}: holds no tensors but {first(map(str, tree))}; {_known()}")
    return {key.removeprefix("module."): value for key, value in state.items()}, entries


def _tensors_in(value: object) -> int:
    if isinstance(value, Tensor):
        return 1
    inner: Iterable[object] = value.values() if isinstance(value, Mapping) else ()
    inner = value if isinstance(value, list | tuple) else inner
    return sum(_tensors_in(item) for item in inner)


def _kind(key: str) -> str | None:
    """What a tensor of a wrapped or bare backbone is, where the student has no place for it."""
    if key == "mask_token":
        return "mask token"
    if key.startswith(HEADS):
        return "head"
    return "buffer" if key.endswith(tuple(BUFFERS)) else None


def _is_swins_buffer(key: str, value: Tensor) -> bool:
    return bool(IN_A_BLOCK.match(key)) and any(key.endswith(end) and value.ndim == n for end, n in BUFFERS.items())


def _wrapper(state: StateDict, wrapped: bool) -> str:
    if not wrapped:
        return ""
    decoder = state.get("decoder.0.weight")  # a Conv1d to the teacher's width, or a Conv2d to pixels
    teaches = any(key.startswith("feature_model.") for key in state) or (decoder is not None and decoder.ndim == 3)
    return "feature distillation" if teaches else "SimMIM"


def first(keys: Iterable[str], shown: int = 3) -> str:
    """The first keys and how many more there are."""
    found = list(keys)
    more = f" and {len(found) - shown} more" if len(found) > shown else ""
    return ", ".join(found[:shown]) + more


def unknown(source: Source) -> UserError:
    """The refusal of a backbone of none of the known families."""
    return UserError(f"{source.path}: its first keys are {first(source.tensors)}; {_known()}")


def _known() -> str:
    return (
        f"what can be imported are checkpoints of {', '.join(NETWORKS[:-1])} and {NETWORKS[-1]}; "
        "files of other teachers are given to teacher.weights as they are"
    )
