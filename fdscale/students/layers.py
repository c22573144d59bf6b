"""Which layer each parameter belongs to, from 0 (the stem) to the last (norm and head), for layer-wise rates.

The official rule (`optimizer.py`), with two differences: an unknown name fails there into the last layer, silently,
and here loudly; timm names SwinV2's merging by the stage that it opens, the official code by the one it ends.
"""

from __future__ import annotations

from timm.models._manipulate import group_with_matcher
from torch import nn

from fdscale.config.errors import UserError

HEAD = "head_of_another_file"  # no network has it: timm puts names that it does not know last


def vit_layer(name: str, depth: int) -> int:
    """The layer of a ViT's parameter; a table that all blocks share belongs to the last (official)."""
    part, _, rest = name.partition(".")
    if part in ("cls_token", "patch_embed"):
        return 0
    if part in ("rel_pos_bias", "norm"):
        return depth + 1
    if part == "blocks":
        return int(rest.partition(".")[0]) + 1
    raise AssertionError(f"no layer is known for the ViT's {name}")


def swin_v2_layer(name: str, depths: tuple[int, ...]) -> int:
    """The layer of a SwinV2's parameter; a merging has its last predecessor's, an extra norm its block's."""
    part, *rest = name.split(".")
    if part == "patch_embed":
        return 0
    if part == "norm":
        return sum(depths) + 1
    if part == "layers" and rest[1] == "downsample":
        return sum(depths[: int(rest[0])])
    if part == "layers" and rest[1] == "blocks":
        return sum(depths[: int(rest[0])]) + int(rest[2]) + 1
    raise AssertionError(f"no layer is known for SwinV2's {name}")


def timm_layers(backbone: nn.Module) -> tuple[dict[str, int], int]:
    """Parameter names to layers as timm groups them for its own layer decay, and the layer that a head would have.

    Raises UserError for a network without timm's `group_matcher`.
    """
    matcher = getattr(backbone, "group_matcher", None)
    if matcher is None:
        raise UserError(
            f"optim.layer_decay: {type(backbone).__name__} tells no layers (a group_matcher(), as timm's networks "
            "have); set optim.layer_decay=1"
        )
    named = [*((name, None) for name, _ in backbone.named_parameters()), (HEAD, None)]
    layers = group_with_matcher(named, matcher(coarse=False), reverse=True)
    return {name: layer for name, layer in layers.items() if name != HEAD}, layers[HEAD]
