"""ViTs with BEiT's names: official feature distillation, SimMIM and BEiT, before and after fine-tuning."""

from __future__ import annotations

import math
import re

from fdscale.importing.found import Found, Overrides, mlp_ratio, refuse_unknown, settled
from fdscale.importing.source import CODEBASE_ENTRY, Source, StateDict
from fdscale.students.geometry import Geometry, TimmGeometry, ViTGeometry

SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
BLOCK_TABLE = ".attn.relative_position_bias_table"
OVERRIDES = ("image_size", "num_heads", "normalisation")
POOLED_FIRST = "it was fine-tuned with its final norm after the pooling (fc_norm): taken as the norm of every token"
BEITS_STATISTICS = (
    "normalised with mean and std 0.5, as BEiT was trained; add normalisation=imagenet for BEiT v2 or a ViT of "
    "SimMIM or feature distillation whose wrapper was taken off"
)


def read_vit(source: Source, overrides: Overrides) -> Found:
    """A ViT student, or timm's Beit where it has absolute positions (or lacks what our ViT is made of)."""
    refuse_unknown(overrides, OVERRIDES, source.path)
    state, notes = _final_norm(source.tensors)
    imagenet = source.wrapper or CODEBASE_ENTRY in source.entries
    if not imagenet and "normalisation" not in overrides:
        notes = (*notes, BEITS_STATISTICS)
    normalisation = "imagenet" if imagenet else "inception"
    return Found("ViT" if imagenet else "BEiT", _geometry(source, overrides), state, normalisation, notes)


def _final_norm(tensors: StateDict) -> tuple[StateDict, tuple[str, ...]]:
    if "norm.weight" in tensors or "fc_norm.weight" not in tensors:
        return tensors, ()
    return {key.replace("fc_norm.", "norm."): value for key, value in tensors.items()}, (POOLED_FIRST,)


def _geometry(source: Source, overrides: Overrides) -> Geometry:
    width, _, patch, _ = source.shape("patch_embed.proj.weight", 4)
    tables = [key for key in source.tensors if key == SHARED_TABLE or key.endswith(BLOCK_TABLE)]
    shared, per_block = SHARED_TABLE in tables, any(key != SHARED_TABLE for key in tables)
    read = {
        "image_size": _image_size(source, tables, patch),
        "num_heads": source.shape(tables[0], 2)[1] if tables else None,
    }
    image_size, heads = settled(read, overrides, source.path)
    depth = 1 + max(int(key.split(".")[1]) for key in source.tensors if re.match(r"blocks\.\d+\.", key))
    ratio = mlp_ratio(source.shape("blocks.0.mlp.fc1.weight", 2)[0], width)
    ours = {"blocks.0.gamma_1", "blocks.0.attn.q_bias"} <= source.tensors.keys() and "pos_embed" not in source.tensors
    if ours and shared != per_block:
        position_bias = "shared" if shared else "per_block"
        return ViTGeometry(width, depth, heads, patch, image_size, mlp_ratio=ratio, position_bias=position_bias)
    arguments = {
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "patch_size": patch,
        "mlp_ratio": ratio,
        "init_values": 0.1 if "blocks.0.gamma_1" in source.tensors else 0.0,
        "qkv_bias": "blocks.0.attn.q_bias" in source.tensors,
        "use_abs_pos_emb": "pos_embed" in source.tensors,
        "use_rel_pos_bias": per_block,
        "use_shared_rel_pos_bias": shared,
    }
    return TimmGeometry("beit_base_patch16_224", image_size, arguments)


def _image_size(source: Source, tables: list[str], patch: int) -> int | None:
    """From the rows of a bias table, (2g - 1)^2 + 3, or of the absolute positions, g^2 + 1."""
    if tables:
        return (math.isqrt(max(source.shape(tables[0], 2)[0] - 3, 0)) + 1) // 2 * patch
    if "pos_embed" in source.tensors:
        return math.isqrt(max(source.shape("pos_embed", 3)[1] - 1, 0)) * patch
    return None
