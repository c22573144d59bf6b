"""CLIP's own vision tower as a student, to be fine-tuned directly: OpenAI's and LAION's files, and timm's of them."""

from __future__ import annotations

import re

from fdscale.config.errors import UserError
from fdscale.importing.found import Found, Overrides, mlp_ratio, refuse_unknown, settled
from fdscale.importing.source import Source
from fdscale.students.from_timm import build_on_meta
from fdscale.students.geometry import TimmGeometry
from fdscale.teachers.layouts import to_timm

TOWER, TIMMS = "visual.class_embedding", "norm_pre.weight"  # a key of theirs that no other family has
OPENAIS = "input_resolution"  # OpenAI's own files carry their sizes
AFTER_TOKENS = ("head.", "proj", "attn_pool.")  # what makes the embedding of them
SHAPES = {  # width, depth, patch, heads
    (768, 12, 32, 12): "vit_base_patch32_clip",
    (768, 12, 16, 12): "vit_base_patch16_clip",
    (1024, 24, 14, 16): "vit_large_patch14_clip",
    (1280, 32, 14, 16): "vit_huge_patch14_clip",
}
HEADS = {1280: 16}  # else heads of 64 channels
ACTIVATIONS = {"quickgelu": "_quickgelu_224", "gelu": "_224"}


def is_clip(source: Source) -> bool:
    """Whether these are the names of a CLIP file, or of timm's copy of its tower."""
    return TOWER in source.tensors or TIMMS in source.tensors


def read_clip(source: Source, overrides: Overrides) -> Found:
    """timm's network for this tower; raises UserError where the file does not tell its activation and nobody does."""
    refuse_unknown(overrides, ("activation", "num_heads", "normalisation"), source.path)
    geometry = _geometry(source, overrides)
    model = build_on_meta(geometry)
    state = {name: tensor.float() for name, tensor in to_timm(source.tensors, model, resample=False).items()}
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(AFTER_TOKENS)}
    return Found("CLIP", geometry, kept, "clip")


def _geometry(source: Source, overrides: Overrides) -> TimmGeometry:
    prefix, theirs = ("visual.", True) if TOWER in source.tensors else ("", False)
    width, _, patch, _ = source.shape(f"{prefix}conv1.weight" if theirs else "patch_embed.proj.weight", 4)
    positions = source.tensors[f"{prefix}positional_embedding" if theirs else "pos_embed"].shape[-2]
    block = rf"{re.escape(prefix)}(?:transformer\.resblocks|blocks)\.(\d+)\."
    depth = 1 + max(int(found[1]) for key in source.tensors if (found := re.match(block, key)))
    hidden = source.shape(
        f"{prefix}transformer.resblocks.0.mlp.c_fc.weight" if theirs else "blocks.0.mlp.fc1.weight", 2
    )
    (heads,) = settled({"num_heads": None}, {"num_heads": HEADS.get(width, width // 64), **overrides}, source.path)
    size = round((positions - 1) ** 0.5) * patch
    ending = ACTIVATIONS[_activation(source, overrides)]
    name = SHAPES.get((width, depth, patch, heads))
    if name is not None and hidden[0] == 4 * width:
        return TimmGeometry(name + ending, size)
    shape = {"patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
    return TimmGeometry(f"vit_base_patch16_clip{ending}", size, {**shape, "mlp_ratio": mlp_ratio(hidden[0], width)})


def _activation(source: Source, overrides: Overrides) -> str:
    """OpenAI trained with QuickGELU: with another activation every token would be wrong without a word."""
    given = overrides.get("activation", "quickgelu" if OPENAIS in source.tensors else None)
    if given not in ACTIVATIONS:
        raise UserError(
            f"{source.path}: got activation={given}, allowed: activation=quickgelu (OpenAI's weights) or "
            "activation=gelu (LAION's, most others'), which the tensors do not tell"
        )
    return str(given)
