"""Teachers that timm builds: those of the table, and any other by its name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from torch import Tensor, nn

from fdscale.config.errors import UserError, nearest
from fdscale.teachers.table import TeacherSpec, UnbuiltTeacher
from fdscale.teachers.teacher import Float32LayerNorm, Teacher
from fdscale.teachers.weights import StateDict, load_strictly, read_state_dict, to_timm_names
from fdscale.tokens import as_tokens

PROBE_TOLERANCE = 1e-3


def timm_teacher(spec: TeacherSpec, weights: str | None, checkpoint_key: str, after_norm: bool) -> Teacher:
    """A teacher of the table. Raises UserError where its weights cannot be had or do not fit."""
    if weights is None and not spec.pretrained:
        raise UserError(
            f"teacher.weights: no hub carries the weights of {spec.model} that this teacher needs; "
            "set it to the original checkpoint file, or to 'random'"
        )
    name = f"{spec.model}.{spec.pretrained}" if spec.pretrained else spec.model
    resample = spec.image_size != spec.pretrained_size
    model = _create(name, weights, checkpoint_key, _arguments(spec), resample)
    return Teacher(
        model,
        final_norm=_split_norm(model, spec.width),
        width=spec.width,
        grid=spec.grid,
        prefix_tokens=spec.prefix_tokens,
        mean=spec.mean,
        std=spec.std,
        image_size=spec.image_size,
        after_norm=after_norm,
    )


def any_timm_teacher(spec: UnbuiltTeacher, weights: str | None, checkpoint_key: str, after_norm: bool) -> Teacher:
    """timm's model `spec.model`, its width and grid read off one forward of a noise image.

    Raises UserError for a name that timm lacks, and for an `openai` tag on a model with a plain GELU.
    """
    config = _pretrained_config(spec.model, weights)
    size = spec.image_size or int(config["input_size"][-1])
    arguments = dict(spec.overrides)
    if spec.image_size is not None and config.get("fixed_input_size"):
        arguments["img_size"] = size
    model = _create(spec.model, weights, checkpoint_key, arguments, size != config["input_size"][-1])
    width, prefix_tokens = int(model.num_features), int(getattr(model, "num_prefix_tokens", 0))
    norm, grid = _probe(model, spec.model, size, width, prefix_tokens)
    return Teacher(
        model,
        final_norm=norm,
        width=width,
        grid=grid,
        prefix_tokens=prefix_tokens,
        mean=config["mean"],
        std=config["std"],
        image_size=size,
        after_norm=after_norm,
    )


def _arguments(spec: TeacherSpec) -> dict[str, Any]:
    """The table's shape in timm's words."""
    sizes = {"img_size": spec.image_size, "patch_size": spec.patch_size, "embed_dim": spec.embed_dim}
    heads = {"num_heads": spec.num_heads, "mlp_ratio": spec.mlp_ratio}
    if spec.family == "swin":
        return {**sizes, **heads, "depths": spec.depth, "window_size": spec.window_size}
    return {**sizes, **heads, "depth": spec.depth}


def _pretrained_config(name: str, weights: str | None) -> Mapping[str, Any]:
    config = timm.get_pretrained_cfg(name, allow_unregistered=False) if timm.is_model(name) else None
    if config is None:
        close = nearest(name, timm.list_models(pretrained=True) + timm.list_models())
        raise UserError(f"teacher.name: timm has no model {name!r}{close}")
    if weights is None and "quickgelu" not in name and "QuickGELU" in " ".join(config.notes or ()):
        better = name.replace("_clip_", "_clip_quickgelu_")
        raise UserError(
            f"teacher.name: the weights of timm:{name} were trained with QuickGELU, which this model "
            f"lacks: its tokens would be wrong without a word; use timm:{better}"
        )
    return dict(config.to_dict())


def _create(name: str, weights: str | None, checkpoint_key: str, arguments: Mapping[str, Any], resample: bool) -> Any:
    """The network without classifier and pooling: its own call gives all tokens after the final norm."""
    try:
        model: Any = timm.create_model(name, pretrained=weights is None, num_classes=0, **arguments)
    except Exception as error:  # the hub's clients share no base class of their errors
        raise _cannot_create(name, weights, error) from error
    if weights not in (None, "random"):
        path = Path(str(weights))
        state = to_timm_names(read_state_dict(path, checkpoint_key))
        state = _resampled(state, model) if resample else state
        load_strictly(model, state, path, f"timm's {name}", _classifier(model))
    model.reset_classifier(0, "")
    return model


def _cannot_create(name: str, weights: str | None, error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {error}"
    if weights is None:
        return UserError(
            f"teacher.weights: timm cannot fetch {name} from the hub ({reason}); "
            "pass teacher.weights=FILE with a downloaded copy, or teacher.weights=random for a trial"
        )
    return UserError(f"teacher.geometry: timm cannot build {name} ({reason}); check the overrides")


def _classifier(model: Any) -> tuple[str, ...]:
    names = model.pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _resampled(state: StateDict, model: Any) -> StateDict:
    """Positions fitted to another image size by timm's own bicubic resampling."""
    wanted = model.state_dict()
    prefix_tokens = int(getattr(model, "num_prefix_tokens", 0))
    fitted = {}
    for key, value in state.items():
        fits = key not in wanted or value.shape == wanted[key].shape
        if not fits and key == "pos_embed" and _is_square(value, prefix_tokens):
            grid = list(model.patch_embed.grid_size)
            value = resample_abs_pos_embed(value, grid, num_prefix_tokens=prefix_tokens)
        elif not fits and key.endswith(".relative_position_bias_table"):
            attention = model.get_submodule(key.rpartition(".")[0])
            value = resize_rel_pos_bias_table(value, attention.window_size, tuple(wanted[key].shape))
        fitted[key] = value
    return fitted


def _is_square(positions: Tensor, prefix_tokens: int) -> bool:
    tokens = positions.shape[1] - prefix_tokens
    return tokens > 0 and math.isqrt(tokens) ** 2 == tokens


def _split_norm(model: nn.Module, width: int) -> Float32LayerNorm | None:
    """Take the final norm out of the network, to be run in float32 after it.

    `fc_norm` is the norm of networks that pool first; without pooling it sees each token.
    """
    for name in ("norm", "fc_norm"):
        norm = getattr(model, name, None)
        if isinstance(norm, nn.LayerNorm) and tuple(norm.normalized_shape) == (width,):
            setattr(model, name, nn.Identity())
            return Float32LayerNorm.of(norm)
    return None


@torch.no_grad()
def _probe(
    model: Any, name: str, size: int, width: int, prefix_tokens: int
) -> tuple[Float32LayerNorm | None, tuple[int, int]]:
    """The final norm where taking it out is exact, and the token grid, found by running the network."""
    noise = torch.randn(1, 3, size, size)
    model.eval()
    features = model(noise)
    tokens = as_tokens(features, width)
    if tokens.ndim != 3 or tokens.shape[-1] != width:
        shape = tuple(features.shape)
        raise UserError(f"teacher.name: timm:{name} gives features {shape}, not tokens or a map")
    norm = _split_norm(model, width)
    if norm is not None and not torch.allclose(norm(as_tokens(model(noise), width)), tokens, atol=PROBE_TOLERANCE):
        raise UserError(f"teacher.name: timm:{name} works on after its norm; wrap it in a Teacher of your own")
    side = math.isqrt(tokens.shape[1] - prefix_tokens)
    if side * side + prefix_tokens != tokens.shape[1]:
        raise UserError(f"teacher.name: timm:{name} gives {tokens.shape[1]} tokens, which are no square grid")
    return norm, (side, side)
