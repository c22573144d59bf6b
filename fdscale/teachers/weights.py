"""Weight files of the teachers: from the layout that their authors published to the network's names."""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fdscale.config.errors import UserError
from fdscale.teachers.restricted import read_restricted

log = logging.getLogger(__name__)

StateDict = dict[str, Tensor]
# Dropped where the network has no such key: classifiers, projection heads, Swin's index and mask buffers.
DROPPED_PREFIXES = ("head.", "head_dense.", "head_dist.")
DROPPED_SUFFIXES = (".relative_position_index", ".relative_coords_table", ".attn_mask")
CLIP_TO_TIMM = (
    ("conv1.", "patch_embed.proj."),
    ("class_embedding", "cls_token"),
    ("positional_embedding", "pos_embed"),
    ("transformer.resblocks.", "blocks."),
    ("ln_pre.", "norm_pre."),
    ("ln_post.", "norm."),
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
    (".in_proj_", ".qkv."),
    (".out_proj.", ".proj."),
    (".c_fc.", ".fc1."),
    (".c_proj.", ".fc2."),
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
    """Everything in a file: safetensors, a TorchScript archive, or a pickle, read without running it."""
    if not path.is_file():
        raise UserError(f"teacher.weights: no such file: {path}; allowed: a file, 'random', or nothing for the hub's")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if _is_torchscript(path):
        return _read_torchscript(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
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


def to_timm_names(state: StateDict) -> StateDict:
    """OpenAI CLIP and Swin v1 originals to timm's names; every other layout has them already."""
    if any(key.startswith("visual.") for key in state):
        return {_clip_to_timm(key): _clip_shape(key, value) for key, value in clip_vision(state).items()}
    if "layers.0.downsample.reduction.weight" in state:  # originals merge at a stage's end, timm at its start
        return {re.sub(r"^layers\.(\d+)\.downsample", _next_stage, k): value for k, value in state.items()}
    return state


def clip_vision(state: StateDict) -> StateDict:
    """The vision tower of an OpenAI CLIP state dict, without its projection, under open_clip's names."""
    tower = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    tower.pop("proj", None)  # the tokens are the target, not the pooled embedding
    return tower


def _clip_to_timm(key: str) -> str:
    for old, new in CLIP_TO_TIMM:
        key = key.replace(old, new)
    return key


def _clip_shape(key: str, value: Tensor) -> Tensor:
    if key == "class_embedding":
        return value.reshape(1, 1, -1)
    return value.unsqueeze(0) if key == "positional_embedding" else value


def _next_stage(match: re.Match[str]) -> str:
    return f"layers.{int(match[1]) + 1}.downsample"


def load_strictly(model: nn.Module, state: StateDict, path: Path, network: str, classifier: Iterable[str] = ()) -> None:
    """Load `state` with nothing missing and nothing left over but heads and buffers; else UserError.

    `classifier`: further prefixes that this network's file may carry and the network has not.
    """
    wanted = model.state_dict()
    prefixes = (*DROPPED_PREFIXES, *(f"{name}." for name in classifier))
    state = {k: v for k, v in state.items() if k in wanted or not _is_dropped(k, prefixes)}
    problems = [
        *_listed("missing", [k for k in wanted if k not in state]),
        *_listed("unexpected", [k for k in state if k not in wanted]),
        *_listed("of another shape", [_shapes(k, state, wanted) for k in state if _differs(k, state, wanted)]),
    ]
    if problems:
        raise UserError(f"teacher.weights: {path} does not fit {network}: {'; '.join(problems)}. {_remedy(state)}")
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


def _remedy(state: StateDict) -> str:
    """What the file looks like, and what to set for it."""
    signs = (
        ("norm_pre.weight", "CLIP", "clip_vit_b16 (768 wide) or clip_vit_l14 (1024)"),
        ("ln_pre.weight", "CLIP", "clip_vit_b16_open_clip"),
        ("layers.0.blocks.0.attn.relative_position_bias_table", "a Swin v1", "esvit_swin_b"),
        ("encoder.patch_embed.proj.weight", "an official feature distillation checkpoint", "student_file"),
        ("blocks.0.attn.qkv.weight", "a ViT in timm's names", "dino_vit_b16, deit_b16 or timm:NAME"),
    )
    for key, family, name in signs:
        if key in state:
            return f"It looks like {family}: set teacher.name to {name}, teacher.geometry to the file's shape"
    return "It is none of CLIP, DINO, DeiT, EsViT or timm: convert its keys to timm's and set timm:NAME"
