"""From the layouts in which each family's authors published their weights to timm's and open_clip's names.

timm's own filters know most of these files, but they resize positions and patches unasked, leave biases behind
that the network happens to lack, and drop what they do not know. Here a file's keys are renamed, and what is left
behind is named; everything else must find its place under strict loading.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from torch import Tensor, nn

from fdscale.teachers.weights import StateDict

BFLOAT16_ROUNDING = 2**-8

# Where a file of two towers keeps the image's: open_clip around timm, OpenAI and open_clip and EVA-CLIP,
# transformers, big_vision.
IMAGE_TOWERS = ("visual.trunk.", "visual.", "vision_model.", "params/img/")
# Left behind beside it: the text tower, the temperature, OpenAI's sizes, open_clip's projection around timm's tower.
TEXT_TOWERS = (
    *("text.", "text_model.", "params/txt/", "transformer.", "token_embedding.", "positional_embedding", "ln_final."),
    *("text_projection", "logit_scale", "logit_bias", "params/t", "params/b"),
    *("input_resolution", "context_length", "vocab_size", "visual.head.", "visual_projection."),
)


class Layout(NamedTuple):
    """How one layout's names become timm's; `sign` is a key that the layout has and timm's names have not.

    `names` are replaced in order. `left` are the prefixes of what no teacher needs: projections onto embeddings that
    are not the tokens, pretext decoders, norms of crops at training. `convert` changes tensors, after the names.
    """

    sign: str
    names: tuple[tuple[str, str], ...] = ()
    left: tuple[str, ...] = ()
    convert: Callable[[StateDict, nn.Module], StateDict] | None = None


def to_timm(state: StateDict, model: nn.Module, resample: bool) -> StateDict:
    """A teacher's state in any known family's published layout, under the names and in the shapes of timm's `model`.

    `resample` fits positions and bias tables to the model's image size; without it another size keeps its shape, which
    strict loading refuses. DINOv3's rotary periods are no parameter of timm's: the file's are put into `model`.
    """
    state = _image_tower(state)
    for layout in LAYOUTS:
        if layout.sign in state:
            state = _renamed(state, layout)
            state = state if layout.convert is None else layout.convert(state, model)
    return _resampled(state, model) if resample else state


def to_open_clip(state: StateDict, grid: tuple[int, int] | None = None) -> StateDict:
    """The vision tower of a CLIP file under open_clip's names, without its projection; positions fitted to `grid`."""
    tower = _image_tower(state)
    tower.pop("proj", None)  # the tokens are the target, not the pooled embedding
    positions = tower.get("positional_embedding")
    if grid is None or positions is None or len(positions) == grid[0] * grid[1] + 1:
        return tower
    return {**tower, "positional_embedding": resample_abs_pos_embed(positions[None], list(grid))[0]}


def _image_tower(state: StateDict) -> StateDict:
    prefix = next((tower for tower in IMAGE_TOWERS if any(key.startswith(tower) for key in state)), None)
    if prefix is None:
        return dict(state)
    return {key.removeprefix(prefix): value for key, value in state.items() if not key.startswith(TEXT_TOWERS)}


def _renamed(state: StateDict, layout: Layout) -> StateDict:
    renamed = {}
    for key, value in state.items():
        if not key.startswith(layout.left):
            for old, new in layout.names:
                key = key.replace(old, new)
            renamed[key] = value
    return renamed


def _batched(state: StateDict, model: nn.Module) -> StateDict:
    """CLS and positions with the batch axis that timm gives them."""
    return {k: v.reshape(1, -1, v.shape[-1]) if k in ("cls_token", "pos_embed") else v for k, v in state.items()}


def _fused(state: StateDict, model: nn.Module) -> StateDict:
    """The three projections of each attention in one, where all three are there."""
    state = _batched(state, model)
    for key in [key for key in state if ".attn.q_proj." in key]:
        parts = [key.replace(".q_proj.", f".{name}_proj.") for name in "qkv"]
        if all(part in state for part in parts):
            state[key.replace(".q_proj.", ".qkv.")] = torch.cat([state.pop(part) for part in parts])
    return state


def _from_flax(state: StateDict, model: nn.Module) -> StateDict:
    """Flax's kernels, inputs first and heads apart, as torch has them; blocks out of their stack where there is one."""
    single = {key: value for key, value in state.items() if not key.startswith("encoderblock.")}
    for key in state.keys() - single.keys():
        name = key.removeprefix("encoderblock.")
        single |= {f"blocks.{i}.{name}": value for i, value in enumerate(state[key].unbind(0))}
    return _fused({key: _torch_shape(key, value) for key, value in single.items()}, model)


def _torch_shape(key: str, value: Tensor) -> Tensor:
    if key.endswith(".bias"):
        return value.flatten()
    if value.ndim < 2 or not key.endswith(".weight"):
        return value
    if value.ndim == 4:  # a patch's (h, w, in, out)
        return value.permute(3, 2, 0, 1)
    if key.endswith(".attn.proj.weight"):  # (heads, channels of a head, out)
        return value.flatten(0, -2).T
    return value.flatten(1).T


def _registers(state: StateDict, model: nn.Module) -> StateDict:
    """DINOv2's registers have no position; timm then keeps positions of patches only, CLS's is added to CLS."""
    if not {"cls_token", "pos_embed"} <= state.keys():
        return state
    positions = state["pos_embed"]
    return {**state, "cls_token": state["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}


def _dinov3(state: StateDict, model: nn.Module) -> StateDict:
    """Biases split as timm has them, masked as officially; the file's rotary periods put into the model.

    A bias of zeros is left behind where the network has none: the distilled models' are zero. Any other one stays, and
    strict loading refuses it.
    """
    wanted = model.state_dict()
    for key in [key for key in state if key.endswith(".attn.qkv.bias")]:
        mask = state.pop(f"{key}_mask", torch.ones(()))
        for part, bias in zip("qkv", (state.pop(key) * mask).chunk(3), strict=False):
            name = key.replace("qkv.bias", f"{part}_bias")
            if name in wanted or bias.any():
                state[name] = bias
    rope, periods = getattr(model, "rope", None), state["rope_embed.periods"].float()
    if isinstance(rope, RotaryEmbeddingDinoV3) and _is_rounding(periods, rope.periods):
        model.rope = _FilePeriods(rope, periods)
        del state["rope_embed.periods"]
    return state


def _is_rounding(periods: Tensor, exact: Tensor) -> bool:
    return periods.shape == exact.shape and torch.allclose(periods, exact.cpu(), rtol=BFLOAT16_ROUNDING, atol=0)


class _FilePeriods(RotaryEmbeddingDinoV3):
    """DINOv3's rotary embedding with the periods of a file, which Meta rounded to bfloat16; timm computes exact ones.

    timm computes them anew at every cast of the network: hence here, and not in the buffer.
    """

    def __init__(self, rope: Any, periods: Tensor) -> None:
        self.of_the_file = periods.tolist()  # numbers: no cast reaches them
        super().__init__(
            rope.dim,
            feat_shape=rope.feat_shape,
            normalize_coords=rope.normalize_coords,
            grid_offset=rope.grid_offset,
            grid_indexing=rope.grid_indexing,
            rotate_half=rope.rotate_half,
        )

    def _compute_periods(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(self.of_the_file, device=device, dtype=dtype)


def _next_stage(state: StateDict, model: nn.Module) -> StateDict:
    """Microsoft's Swin merges at a stage's end, timm's at the next one's start."""
    return {re.sub(r"^layers\.(\d+)\.downsample", _one_later, key): value for key, value in state.items()}


def _one_later(match: re.Match[str]) -> str:
    return f"layers.{int(match[1]) + 1}.downsample"


def _resampled(state: StateDict, model: Any) -> StateDict:
    """Positions and bias tables fitted to another image size by timm's own bicubic resampling."""
    wanted = model.state_dict()
    fitted = {}
    for key, value in state.items():
        fits = key not in wanted or value.shape == wanted[key].shape
        if not fits and key == "pos_embed":
            prefix_tokens = wanted[key].shape[1] - math.prod(model.patch_embed.grid_size)
            if _is_square(value, prefix_tokens):
                value = resample_abs_pos_embed(value, list(model.patch_embed.grid_size), None, prefix_tokens)
        elif not fits and key.endswith(".relative_position_bias_table"):
            attention = model.get_submodule(key.rpartition(".")[0])
            value = resize_rel_pos_bias_table(value, attention.window_size, tuple(wanted[key].shape))
        fitted[key] = value
    return fitted


def _is_square(positions: Tensor, prefix_tokens: int) -> bool:
    tokens = positions.shape[1] - prefix_tokens
    return tokens > 0 and math.isqrt(tokens) ** 2 == tokens


SWIGLU = ((".mlp.w12.", ".mlp.fc1."), (".mlp.w1.", ".mlp.fc1_g."), (".mlp.w2.", ".mlp.fc1_x."))
CLIP = (
    *(("conv1.", "patch_embed.proj."), ("class_embedding", "cls_token"), ("positional_embedding", "pos_embed")),
    *(("ln_pre.", "norm_pre."), ("ln_post.", "norm."), ("transformer.resblocks.", "blocks.")),
    *((".ln_1.", ".norm1."), (".ln_2.", ".norm2."), (".in_proj_", ".qkv."), (".out_proj.", ".proj.")),
    *((".c_fc.", ".fc1."), (".c_proj.", ".fc2.")),
)
TRANSFORMERS = (
    *(("embeddings.patch_embedding.", "patch_embed.proj."), ("embeddings.position_embedding.weight", "pos_embed")),
    *(("embeddings.class_embedding", "cls_token"), ("pre_layrnorm.", "norm_pre."), ("post_layernorm.", "norm.")),
    *(("encoder.layers.", "blocks."), (".layer_norm1.", ".norm1."), (".layer_norm2.", ".norm2.")),
    *((".self_attn.", ".attn."), (".out_proj.", ".proj.")),
)
BIG_VISION = (
    *(("Transformer/", ""), ("encoder_norm/", "norm/"), ("encoderblock_", "blocks/"), ("pos_embedding", "pos_embed")),
    *(("embedding/", "patch_embed/proj/"), ("LayerNorm_0", "norm1"), ("LayerNorm_1", "norm2")),
    *(("MultiHeadDotProductAttention_0", "attn"), ("attn/query", "attn/q_proj"), ("attn/key", "attn/k_proj")),
    *(("attn/value", "attn/v_proj"), ("attn/out", "attn/proj"), ("MlpBlock_0/Dense_0", "mlp/fc1")),
    *(("MlpBlock_0/Dense_1", "mlp/fc2"), ("/kernel", "/weight"), ("/scale", "/weight"), ("/", ".")),
)
EVA_CLIP = (
    *((".ffn_ln.", ".norm."), (".inner_attn_ln.", ".norm.")),
    *((".q_bias", ".q_proj.bias"), (".v_bias", ".v_proj.bias")),
)
DINOV3 = ((".ls1.gamma", ".gamma_1"), (".ls2.gamma", ".gamma_2"), ("storage_tokens", "reg_token"))

# In this order: a layout's sign is looked for among the names that those before it left.
LAYOUTS = (
    Layout("class_embedding", CLIP, ("proj",), _batched),  # OpenAI, LAION
    Layout("embeddings.patch_embedding.weight", TRANSFORMERS, ("head.", "embeddings.position_ids"), _fused),
    Layout("embedding/kernel", BIG_VISION, ("MAPHead_0/",), _from_flax),  # Google's SigLIP
    Layout("blocks.0.attn.inner_attn_ln.weight", EVA_CLIP),  # EVA02-CLIP-B and -L; -E has timm's names
    Layout("blocks.0.mlp.w3.weight", (*SWIGLU, (".mlp.w3.", ".mlp.fc2."))),  # EVA02, DINOv2-g, DINOv3
    Layout("rope_embed.periods", DINOV3, ("mask_token", "local_cls_norm."), _dinov3),  # that norm: local crops only
    Layout("register_tokens", (("register_tokens", "reg_token"),), convert=_registers),  # DINOv2 with registers
    Layout("blocks.0.ls1.gamma", left=("mask_token",)),  # DINOv2, whose other names are timm's
    Layout("decoder_embed.weight", left=("decoder_", "mask_token")),  # a MAE file of pre-training
    Layout("layers.0.downsample.reduction.weight", convert=_next_stage),  # Microsoft Swin, EsViT
)
