"""Weight files of the teachers: read without running them, and loaded with nothing missing and nothing left over."""

from __future__ import annotations

import logging
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fdscale.config.errors import UserError
from fdscale.teachers.restricted import read_restricted
from fdscale.teachers.table import TEACHERS

log = logging.getLogger(__name__)

StateDict = dict[str, Tensor]
# Dropped where the network has no such key: classifiers, projection and pooling heads; buffers that are computed.
DROPPED_PREFIXES = ("head.", "head_dense.", "head_dist.", "dino_head.", "ibot_head.", "attn_pool.")
DROPPED_SUFFIXES = (".relative_position_index", ".relative_coords_table", ".attn_mask", ".freqs_cos", ".freqs_sin")
# What a file of each family has under timm's or open_clip's names: the first row that fits tells the family.
SIGNS: tuple[tuple[tuple[str, ...], str, str | None], ...] = (
    (("norm_pre.weight",), "CLIP", "clip"),
    (("ln_pre.weight",), "CLIP", "clip"),
    (("encoder.patch_embed.proj.weight",), "feature distillation or SimMIM", None),
    (("layers.0.blocks.0.attn.logit_scale",), "Swin V2", None),
    (("layers.0.blocks.0.attn.relative_position_bias_table",), "Swin v1", "swin"),
    (("rel_pos_bias.relative_position_bias_table",), "BEiT", None),
    (("blocks.0.attn.relative_position_bias_table",), "BEiT", None),
    (("blocks.0.ls1.gamma",), "DINOv2", "dinov2"),
    (("reg_token", "blocks.0.gamma_1"), "DINOv3", "dinov3"),
    (("blocks.0.attn.q_bias",), "EVA-CLIP", "eva_clip"),
    (("blocks.0.attn.q_proj.bias",), "EVA-CLIP", "eva_clip"),
    (("blocks.0.attn.qkv.weight", "cls_token"), "a plain ViT", "vit"),
    (("blocks.0.attn.qkv.weight",), "SigLIP 2, a ViT without cls_token", "siglip2"),
)


def read_state_dict(path: Path, checkpoint_key: str) -> StateDict:
    """The tensors of a teacher's file, without wrappers and the prefixes of wrapping modules.

    `checkpoint_key`: "student" or "teacher", for files that hold both (DINO, EsViT). Raises UserError.
    """
    tree = read_checkpoint(path)
    if isinstance(tree, Mapping) and {"student", "teacher"} & tree.keys():
        if checkpoint_key not in tree:
            raise UserError(f"teacher.weights: {path} has no {checkpoint_key!r}; allowed: 'student', 'teacher'")
        tree = tree[checkpoint_key]
    for wrapper in ("model", "state_dict", "model"):
        if isinstance(tree, Mapping) and isinstance(tree.get(wrapper), Mapping):
            tree = tree[wrapper]
    if not isinstance(tree, Mapping):
        raise UserError(f"teacher.weights: {path} holds no state dict but {tree!r}; save state_dict() instead")
    state = {key: value for key, value in tree.items() if isinstance(key, str) and isinstance(value, Tensor)}
    return _without_prefix(_without_prefix(state, "module."), "backbone.")


def read_checkpoint(path: Path) -> object:
    """Everything in a file: safetensors, numpy's npz, a TorchScript archive, or a pickle, read without running it."""
    if not path.is_file():
        raise UserError(
            f"teacher.weights: no such file: {path}; "
            "allowed: a file, 'random', or nothing for what `fdscale fetch` brought"
        )
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    if _is_torchscript(path):
        return _read_torchscript(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        log.info("%s holds objects besides tensors; reading its tensors only", path)
    except Exception as error:  # torch's reader raises a dozen kinds for broken files
        raise _unreadable(path, error) from error
    return read_restricted(path)


def _read_safetensors(path: Path) -> StateDict:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _read_npz(path: Path) -> StateDict:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {key: _tensor(arrays[key]) for key in arrays.files}
    except Exception as error:  # numpy's reader raises a dozen kinds for broken files, as torch's
        raise _unreadable(path, error) from error


def _tensor(array: np.ndarray) -> Tensor:
    """An array as it is; numpy has no bfloat16 and keeps Google's as two bytes without a type."""
    if array.dtype == np.dtype("V2"):
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_torchscript(path: Path) -> StateDict:
    log.warning("%s is a TorchScript archive: loading it compiles the code inside; use files you trust", path)
    try:
        return dict(torch.jit.load(path, map_location="cpu").state_dict())
    except RuntimeError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = str(error).split("\n", 1)[0]
    return UserError(
        f"teacher.weights: {path} cannot be read ({type(error).__name__}: {reason}); "
        "it may be truncated: fetch it again and compare its size"
    )


def _without_prefix(state: StateDict, prefix: str) -> StateDict:
    return {key.removeprefix(prefix): value for key, value in state.items()}


def load_strictly(model: nn.Module, state: StateDict, path: Path, network: str, classifier: Iterable[str] = ()) -> None:
    """Load `state` with nothing missing and nothing left over but heads and buffers; else UserError.

    `classifier`: further prefixes that this network's file may carry and the network has not.
    """
    wanted = model.state_dict()
    prefixes = (*DROPPED_PREFIXES, *(f"{name}." for name in classifier))
    left = [k for k in state if k not in wanted and _is_dropped(k, prefixes)]
    if left:
        log.info("%s: left behind, the teacher has no use for them: %s", path, ", ".join(left[:3]))
    state = {k: v for k, v in state.items() if k not in left}
    problems = [
        *_listed("missing", [k for k in wanted if k not in state]),
        *_listed("unexpected", [k for k in state if k not in wanted]),
        *_listed("of another shape", [_shapes(k, state, wanted) for k in state if _differs(k, state, wanted)]),
        *_listed("not finite", [k for k in state if not bool(state[k].isfinite().all())]),
    ]
    if problems:
        raise UserError(
            f"teacher.weights: {path} does not fit {network}: {'; '.join(problems)}; {_remedy(state, wanted)}"
        )
    model.load_state_dict(state)


def _is_dropped(key: str, prefixes: tuple[str, ...]) -> bool:
    return key.startswith(prefixes) or key.endswith(DROPPED_SUFFIXES)


def _differs(key: str, state: StateDict, wanted: StateDict) -> bool:
    return key in wanted and state[key].shape != wanted[key].shape


def _shapes(key: str, state: StateDict, wanted: StateDict) -> str:
    return f"{key} {tuple(state[key].shape)} where the network has {tuple(wanted[key].shape)}"


def _listed(what: str, keys: list[str], shown: int = 3) -> list[str]:
    more = f" and {len(keys) - shown} more" if len(keys) > shown else ""
    return [f"{len(keys)} {what} ({', '.join(keys[:shown])}{more})"] if keys else []


def _remedy(state: StateDict, wanted: StateDict) -> str:
    """What the file looks like, and what to set for it."""
    (words, family), (_, needed) = _family(state), _family(wanted)
    if words is None:
        return "the file is of no known family: rename its keys to timm's and set teacher.name to timm:NAME"
    if family is None:
        return f"the file is of {words}: run `fdscale import` on it and set teacher.name to student_file"
    if family == needed and any(_differs(key, state, wanted) for key in state):
        return f"the file is of {words}, as the network: set teacher.geometry to the file's shape"
    if family == needed:
        return f"the file is of {words}, as the network, but not the same keys: fetch it again, or choose another"
    names = [name for name, spec in TEACHERS.items() if spec.family == family]
    as_wide = [name for name in names if TEACHERS[name].embed_dim == _width(state)]
    return f"the file is of {words}: set teacher.name to {' or '.join(as_wide or names)}"


def _family(state: StateDict) -> tuple[str | None, str | None]:
    """What a network's names tell: its family in words, and the table's word for it."""
    return next(((words, name) for keys, words, name in SIGNS if all(key in state for key in keys)), (None, None))


def _width(state: StateDict) -> int | None:
    stem = state.get("patch_embed.proj.weight", state.get("conv1.weight"))
    return None if stem is None or not stem.ndim else len(stem)
