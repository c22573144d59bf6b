"""Teachers that timm builds: those of the table, and any other by its name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.activations import QuickGELU
from torch import Tensor, nn

from fdscale.config.errors import UserError, nearest
from fdscale.teachers.layouts import to_timm
from fdscale.teachers.spec import TeacherSpec, UnbuiltTeacher
from fdscale.teachers.teacher import Float32LayerNorm, Teacher
from fdscale.teachers.weights import StateDict, load_strictly, read_state_dict
from fdscale.tokens import as_tokens

PROBE_TOLERANCE = 1e-3


def timm_teacher(spec: TeacherSpec, weights: str, checkpoint_key: str) -> Teacher:
    """A teacher of the table. Raises UserError where its weights do not fit."""
    name = f"{spec.model}.{spec.pretrained}" if spec.pretrained else spec.model
    resample = spec.image_size != spec.pretrained_size
    model = _create(name, weights, checkpoint_key, _arguments(spec), resample)
    if spec.layer is not None:
        model.prune_intermediate_layers([spec.layer], prune_norm=False, prune_head=False)
    return Teacher(
        model,
        final_norm=_split_norm(model, spec.width) if spec.has_norm else nn.Identity(),
        width=spec.width,
        grid=spec.grid,
        prefix_tokens=spec.prefix_tokens,
        mean=spec.mean,
        std=spec.std,
        image_size=spec.image_size,
    )


def any_timm_teacher(spec: UnbuiltTeacher, weights: str, checkpoint_key: str) -> Teacher:
    """timm's model `spec.model`, its width and grid read off one forward of a noise image.

    Raises UserError for a name that timm lacks, for weights that were trained with QuickGELU on a model that lacks
    it, and for a layer that the model has not or cannot be cut at.
    """
    config = _pretrained_config(spec.model)
    size = spec.image_size or int(config["input_size"][-1])
    arguments = dict(spec.overrides)
    if spec.image_size is not None and config.get("fixed_input_size"):
        arguments["img_size"] = size
    model = _create(spec.model, weights, checkpoint_key, arguments, size != config["input_size"][-1])
    noise = torch.randn(1, 3, size, size)
    norm, tokens = _probe(model, spec.model, noise) if spec.layer is None else _cut(model, spec, noise)
    prefix_tokens = int(getattr(model, "num_prefix_tokens", 0))
    return Teacher(
        model,
        final_norm=norm,
        width=tokens.shape[-1],
        grid=_square(tokens.shape[1] - prefix_tokens, spec.model),
        prefix_tokens=prefix_tokens,
        mean=config["mean"],
        std=config["std"],
        image_size=size,
    )


def _arguments(spec: TeacherSpec) -> dict[str, Any]:
    """The table's shape in timm's words."""
    sizes = {"img_size": spec.image_size, "patch_size": spec.patch_size, "embed_dim": spec.embed_dim}
    shape: dict[str, Any] = {**sizes, "num_heads": spec.num_heads, "mlp_ratio": spec.mlp_ratio}
    if spec.family == "swin":
        return {**shape, "depths": spec.depth, "window_size": spec.window_size}
    if spec.family == "dinov2" and spec.blocks.gated:  # timm counts gate and values as one; it rounds down to a whole
        shape["mlp_ratio"] = (2 * spec.hidden(spec.embed_dim) + 0.5) / spec.embed_dim
    if spec.blocks.activation:
        shape["act_layer"] = spec.blocks.activation
    return {**shape, "depth": spec.depth}


def _pretrained_config(name: str) -> Mapping[str, Any]:
    config = timm.get_pretrained_cfg(name, allow_unregistered=False) if timm.is_model(name) else None
    if config is None:
        close = nearest(name, timm.list_models(pretrained=True) + timm.list_models())
        raise UserError(f"teacher.name: timm has no model {name!r}{close}")
    if "quickgelu" not in name and "QuickGELU" in " ".join(config.notes or ()):
        better = name.replace("_clip_", "_clip_quickgelu_")
        raise UserError(
            f"teacher.name: the weights of timm:{name} were trained with QuickGELU, which this model "
            f"lacks: its tokens would be wrong without a word; use timm:{better}"
        )
    return dict(config.to_dict())


def _create(name: str, weights: str, checkpoint_key: str, arguments: Mapping[str, Any], resample: bool) -> Any:
    """The network without classifier and pooling: its own call gives all tokens after the final norm."""
    try:
        model: Any = timm.create_model(name, pretrained=False, num_classes=0, **arguments)
    except Exception as error:  # timm's models raise whatever their layers do
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"teacher.geometry: timm cannot build {name} ({reason}); check the overrides") from error
    if weights != "random":
        _load(model, name, Path(weights), checkpoint_key, resample)
    try:
        model.reset_classifier(0, "")
    except AssertionError as error:
        raise UserError(f"teacher.name: timm:{name} gives no tokens ({error}); choose another model") from error
    return model.eval()


def _load(model: Any, name: str, path: Path, checkpoint_key: str, resample: bool) -> None:
    state = read_state_dict(path, checkpoint_key)
    _refuse_plain_gelu(model, name, state, path)
    load_strictly(model, to_timm(state, model, resample), path, f"timm's {name}", _classifier(model))


def _refuse_plain_gelu(model: nn.Module, name: str, state: StateDict, path: Path) -> None:
    """OpenAI's own files are told by the sizes that they carry; every one of them was trained with QuickGELU."""
    if "input_resolution" in state and not any(isinstance(module, QuickGELU) for module in model.modules()):
        raise UserError(
            f"teacher.weights: {path} is a file of OpenAI's CLIP, trained with QuickGELU, which timm's {name} lacks: "
            "its tokens would be wrong without a word; set teacher.name to clip_vit_b16 or another clip_vit_*"
        )


def _classifier(model: Any) -> tuple[str, ...]:
    names = model.pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


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
def _probe(model: Any, name: str, noise: Tensor) -> tuple[Float32LayerNorm | None, Tensor]:
    """The final norm where taking it out is exact, and the tokens before it, found by running the network."""
    width = int(model.num_features)
    features = model(noise)
    if not isinstance(features, Tensor):
        raise UserError(f"teacher.name: timm:{name} gives a {type(features).__name__}, not tokens or a map")
    normed = tokens = as_tokens(features, width)
    if tokens.ndim != 3 or tokens.shape[-1] != width:
        raise UserError(f"teacher.name: timm:{name} gives features {tuple(features.shape)}, not tokens or a map")
    norm = _split_norm(model, width)
    if norm is not None:
        tokens = as_tokens(model(noise), width)
        if not _equal(norm(tokens), normed):
            raise UserError(f"teacher.name: timm:{name} works on after its norm; wrap it in a Teacher of your own")
    return norm, tokens


@torch.no_grad()
def _cut(model: Any, spec: UnbuiltTeacher, noise: Tensor) -> tuple[nn.Module | None, Tensor]:
    """Let go of what comes after the layer taken; as `_probe`, but with an Identity where no trained norm fits it.

    The tokens must be those that timm itself takes there: some models work on whatever is cut off.
    """
    name, layer, layers = spec.model, spec.layer, len(model.feature_info)
    assert layer is not None
    if layer >= layers:
        raise UserError(f"teacher.layer: got {layer}, allowed: 0 to {layers - 1}; timm:{name} has {layers} layers")
    if layer == layers - 1:
        return _probe(model, name, noise)
    last_width = model.num_features
    wanted = model.forward_intermediates(noise, indices=[layer], output_fmt="NCHW", intermediates_only=True)[0]
    wanted = wanted.flatten(2).transpose(1, 2)
    model.prune_intermediate_layers([layer], prune_norm=False, prune_head=False)
    norm, tokens = _probe(model, name, noise)
    patches = tokens[:, -wanted.shape[1] :]
    if patches.shape != wanted.shape or not _equal(patches, wanted):
        raise UserError(f"teacher.layer: timm:{name} works on after layer {layer}; leave it out")
    return (nn.Identity() if norm is None and tokens.shape[-1] != last_width else norm), tokens


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.is_meta or torch.allclose(one, other, atol=PROBE_TOLERANCE)


def _square(tokens: int, name: str) -> tuple[int, int]:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise UserError(f"teacher.name: timm:{name} gives {tokens} patch tokens, which are no square grid")
    return side, side
