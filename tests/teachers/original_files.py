"""Files as each family's authors published them, small and random: real names, real wrappers, made-up tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

WIDTH, DEPTH, HEADS, PATCH, SIZE = 48, 2, 3, 8, 32
GRID = (SIZE // PATCH) ** 2
GEOMETRY = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "patch_size": PATCH, "image_size": SIZE}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
SATELLITE = (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)


# --- the layouts' names and shapes ----------------------------------------------------------------


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int = WIDTH) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def patch(name: str) -> Shapes:
    return {f"{name}.weight": (WIDTH, 3, PATCH, PATCH), f"{name}.bias": (WIDTH,)}


def blocks(name: str, parts: Shapes) -> Shapes:
    return {f"{name}{index}.{key}": shape for index in range(DEPTH) for key, shape in parts.items()}


def swiglu(hidden: int, packed: bool) -> Shapes:
    if packed:
        return linear("mlp.w12", WIDTH, 2 * hidden) | linear("mlp.w3", hidden, WIDTH)
    return linear("mlp.w1", WIDTH, hidden) | linear("mlp.w2", WIDTH, hidden) | linear("mlp.w3", hidden, WIDTH)


MLP = linear("mlp.fc1", WIDTH, 4 * WIDTH) | linear("mlp.fc2", 4 * WIDTH, WIDTH)
NORMS = norm("norm1") | norm("norm2")
QKV, PROJ = linear("attn.qkv", WIDTH, 3 * WIDTH), linear("attn.proj", WIDTH, WIDTH)
CLS, POSITIONS = {"cls_token": (1, 1, WIDTH)}, {"pos_embed": (1, 1 + GRID, WIDTH)}
STEM = CLS | POSITIONS | patch("patch_embed.proj")
SCALES, MASK = {"ls1.gamma": (WIDTH,), "ls2.gamma": (WIDTH,)}, {"mask_token": (1, WIDTH)}
PLAIN = STEM | blocks("blocks.", NORMS | QKV | PROJ | MLP) | norm("norm")

OPENAI = {
    "class_embedding": (WIDTH,),
    "positional_embedding": (1 + GRID, WIDTH),
    "conv1.weight": (WIDTH, 3, PATCH, PATCH),
    **norm("ln_pre"),
    **blocks(
        "transformer.resblocks.",
        norm("ln_1")
        | norm("ln_2")
        | {"attn.in_proj_weight": (3 * WIDTH, WIDTH), "attn.in_proj_bias": (3 * WIDTH,)}
        | linear("attn.out_proj", WIDTH, WIDTH)
        | linear("mlp.c_fc", WIDTH, 4 * WIDTH)
        | linear("mlp.c_proj", 4 * WIDTH, WIDTH),
    ),
    **norm("ln_post"),
    "proj": (WIDTH, 7),
}
ATTENTION = {key: shape for part in "qkv" for key, shape in linear(f"self_attn.{part}_proj", WIDTH, WIDTH).items()}
ENCODER = norm("layer_norm1") | norm("layer_norm2") | ATTENTION | linear("self_attn.out_proj", WIDTH, WIDTH) | MLP
SIGLIP = {
    **patch("embeddings.patch_embedding"),
    "embeddings.position_embedding.weight": (GRID, WIDTH),
    **blocks("encoder.layers.", ENCODER),
    **norm("post_layernorm"),
    **{"head.probe": (1, 1, WIDTH), "head.attention.in_proj_weight": (3 * WIDTH, WIDTH)},
}
TRANSFORMERS_CLIP = {
    "embeddings.class_embedding": (WIDTH,),
    "embeddings.patch_embedding.weight": (WIDTH, 3, PATCH, PATCH),
    "embeddings.position_embedding.weight": (1 + GRID, WIDTH),
    **norm("pre_layrnorm"),
    **blocks("encoder.layers.", ENCODER),
    **norm("post_layernorm"),
}
SIGLIP_TRUNK = {
    "pos_embed": (1, GRID, WIDTH),
    **patch("patch_embed.proj"),
    **blocks("blocks.", NORMS | QKV | PROJ | MLP),
    **norm("norm"),
    "attn_pool.latent": (1, 1, WIDTH),
}
QV = {"attn.q_bias": (WIDTH,), "attn.v_bias": (WIDTH,)}
EVA_E = STEM | blocks("blocks.", NORMS | QV | {"attn.qkv.weight": (3 * WIDTH, WIDTH)} | PROJ | MLP) | norm("norm")
EVA_L_ATTENTION = {f"attn.{part}_proj.weight": (WIDTH, WIDTH) for part in "qkv"} | norm("attn.inner_attn_ln")
EVA_L = {
    **STEM,
    **blocks("blocks.", NORMS | QV | EVA_L_ATTENTION | PROJ | swiglu(128, packed=False) | norm("mlp.ffn_ln", 128)),
    **norm("norm"),
    **{"rope.freqs_cos": (GRID, WIDTH // HEADS), "blocks.0.attn.rope.freqs_sin": (GRID, WIDTH // HEADS)},
    **linear("head", WIDTH, 7),
}
MAE_DECODER = {
    **linear("decoder_embed", WIDTH, 32),
    **{"mask_token": (1, 1, 32), "decoder_pos_embed": (1, 1 + GRID, 32)},
    **linear("decoder_blocks.0.attn.qkv", 32, 96),
    **norm("decoder_norm", 32),
    **linear("decoder_pred", 32, 3 * PATCH**2),
}


def dinov2(feed: Shapes, registers: bool) -> Shapes:
    extra = {"register_tokens": (1, 4, WIDTH)} if registers else {}
    return STEM | MASK | extra | blocks("blocks.", NORMS | QKV | PROJ | SCALES | feed) | norm("norm")


def dinov3(feed: Shapes, bias: bool) -> Shapes:
    """Positions are the rotary ones; k's bias is there, and masked."""
    qkv = QKV | {"attn.qkv.bias_mask": (3 * WIDTH,)} if bias else {"attn.qkv.weight": (3 * WIDTH, WIDTH)}
    stem = CLS | MASK | {"storage_tokens": (1, 4, WIDTH), "rope_embed.periods": (WIDTH // HEADS // 4,)}
    body = blocks("blocks.", NORMS | qkv | PROJ | SCALES | feed)
    return stem | patch("patch_embed.proj") | body | norm("norm") | norm("local_cls_norm")


def swin() -> Shapes:
    """Two stages of one block and two, the second of which shifts; the merging is at the first one's end."""
    shapes = {"patch_embed.proj.weight": (16, 3, 4, 4), "patch_embed.proj.bias": (16,), **norm("patch_embed.norm", 16)}
    for name, width, heads in (("0.blocks.0", 16, 2), ("1.blocks.0", 32, 4), ("1.blocks.1", 32, 4)):
        block = linear("attn.qkv", width, 3 * width) | linear("attn.proj", width, width)
        block |= linear("mlp.fc1", width, 4 * width) | linear("mlp.fc2", 4 * width, width)
        block |= norm("norm1", width) | norm("norm2", width)
        block |= {"attn.relative_position_bias_table": (49, heads), "attn.relative_position_index": (16, 16)}
        shapes |= {f"layers.{name}.{key}": shape for key, shape in block.items()}
    merging = {**norm("layers.0.downsample.norm", 64), "layers.0.downsample.reduction.weight": (32, 64)}
    return shapes | merging | {"layers.1.blocks.1.attn_mask": (16, 16, 16)} | norm("norm", 32)


def filled(shapes: Shapes) -> State:
    """Random tensors, norms and scales around 1; DINOv3's mask and its periods, rounded as published."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, shape in shapes.items():
        around = 1.0 if name.endswith("gamma") or (len(shape) == 1 and name.endswith("weight")) else 0.0
        state[name] = around + 0.15 * torch.randn(shape, generator=generator)
        if name.endswith("bias_mask"):
            state[name] = torch.cat([torch.ones(WIDTH), torch.zeros(WIDTH), torch.ones(WIDTH)])
        if name.endswith("periods"):
            state[name] = (100 ** (torch.arange(shape[0]) / shape[0])).bfloat16()
    return state


# --- the files around them ------------------------------------------------------------------------


def bare(state: State) -> object:
    return state


def two_towers(prefix: str) -> Callable[[State], object]:
    """A CLIP file: the image tower under a prefix, and beside it what open_clip's, EVA's and transformers' have."""
    beside = ["positional_embedding", "transformer.resblocks.0.ln_1.weight", "token_embedding.weight", "ln_final.bias"]
    others = ["text_projection", "logit_scale", "logit_bias", "text.blocks.0.x", "text_model.x", "visual_projection.x"]
    return lambda state: {prefix + k: v for k, v in state.items()} | {k: torch.ones(5) for k in beside + others}


def openai(state: State) -> object:
    sizes = {"input_resolution": torch.tensor(SIZE), "context_length": torch.tensor(7), "vocab_size": torch.tensor(5)}
    return {**two_towers("visual.")(state), **sizes}


def trunk(state: State) -> object:
    return {**two_towers("visual.trunk.")(state), "visual.head.proj.weight": torch.ones(7, WIDTH)}


def self_distilled(state: State) -> object:
    student = {f"module.backbone.{key}": torch.zeros_like(value) for key, value in state.items()}
    teacher = {f"backbone.{key}": value for key, value in state.items()}
    return {"student": student, "teacher": {**teacher, "head.last_layer.weight_g": torch.ones(3)}, "epoch": 100}


def distributed(state: State) -> object:
    """EsViT's student and teacher, of which the student is taken."""
    student = {f"module.{key}": value for key, value in state.items()}
    heads = {"module.head.mlp.0.weight": torch.ones(2), "module.head_dense.last_layer.weight_g": torch.ones(2)}
    return {"student": {**student, **heads}, "teacher": {key: value + 1 for key, value in student.items()}}


def classified(state: State) -> object:
    return {"model": {**state, "head.weight": torch.ones(10, WIDTH), "head.bias": torch.ones(10)}}


def flax(stacked: bool) -> Callable[[State], object]:
    """A big_vision file of a SigLIP in transformers' names: inputs before outputs, heads on an axis of their own."""
    attention, channels = "MultiHeadDotProductAttention_0", WIDTH // HEADS

    def write(state: State) -> object:
        names = {
            "embedding/kernel": state["embeddings.patch_embedding.weight"].permute(2, 3, 1, 0),
            "embedding/bias": state["embeddings.patch_embedding.bias"],
            "pos_embedding": state["embeddings.position_embedding.weight"][None],
            "Transformer/encoder_norm/scale": state["post_layernorm.weight"],
            "Transformer/encoder_norm/bias": state["post_layernorm.bias"],
            "MAPHead_0/probe": state["head.probe"],
        }
        layers = [block(state, f"encoder.layers.{index}.") for index in range(DEPTH)]
        if stacked:
            names |= {f"Transformer/encoderblock/{k}": torch.stack([layer[k] for layer in layers]) for k in layers[0]}
        else:
            names |= {
                f"Transformer/encoderblock_{i}/{k}": v for i, layer in enumerate(layers) for k, v in layer.items()
            }
        tree = {f"params/img/{key}": value for key, value in names.items()}
        tree |= {"params/txt/Embed_0/embedding": torch.ones(3, 3), "params/t": torch.ones(1), "params/b": torch.ones(1)}
        return {key: value.numpy() for key, value in tree.items()}

    def block(state: State, name: str) -> State:
        layer = {}
        for other, part in (("query", "q"), ("key", "k"), ("value", "v")):
            weight, bias = state[f"{name}self_attn.{part}_proj.weight"], state[f"{name}self_attn.{part}_proj.bias"]
            layer[f"{attention}/{other}/kernel"] = weight.T.reshape(WIDTH, HEADS, channels)
            layer[f"{attention}/{other}/bias"] = bias.reshape(HEADS, channels)
        layer[f"{attention}/out/kernel"] = state[f"{name}self_attn.out_proj.weight"].T.reshape(HEADS, channels, WIDTH)
        layer[f"{attention}/out/bias"] = state[f"{name}self_attn.out_proj.bias"]
        for index in (0, 1):
            layer[f"LayerNorm_{index}/scale"] = state[f"{name}layer_norm{index + 1}.weight"]
            layer[f"LayerNorm_{index}/bias"] = state[f"{name}layer_norm{index + 1}.bias"]
            layer[f"MlpBlock_0/Dense_{index}/kernel"] = state[f"{name}mlp.fc{index + 1}.weight"].T
            layer[f"MlpBlock_0/Dense_{index}/bias"] = state[f"{name}mlp.fc{index + 1}.bias"]
        return layer

    return write


class Row(NamedTuple):
    """A teacher's name, its file's, what it holds in which wrapper, the reference and the pixels' statistics."""

    teacher: str
    file: str
    shapes: Shapes
    wrapped: Callable[[State], object]
    reference: str
    statistics: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    geometry: dict[str, int | float | list[int]] = GEOMETRY


VISUAL, VISION_MODEL = two_towers("visual."), two_towers("vision_model.")
EVA_HEAD = linear("head", WIDTH, 7)
FOUR, EIGHT_THIRDS = {**GEOMETRY, "mlp_ratio": 4.0}, {**GEOMETRY, "mlp_ratio": 8 / 3}
SWIN = {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 64}
ROWS = [
    Row("clip_vit_b16", "ViT-B-16.pt", OPENAI, openai, "clip", CLIP),
    Row("clip_vit_l14", "pytorch_model.bin", TRANSFORMERS_CLIP, VISION_MODEL, "clip_transformers", CLIP),
    Row("clip_vit_b16_open_clip", "ViT-B-16.pt", OPENAI, openai, "clip", CLIP),
    Row("laion_clip_vit_h14", "open_clip_pytorch_model.bin", OPENAI, VISUAL, "laion", CLIP),
    Row("laion_clip_vit_l14", "open_clip_model.safetensors", OPENAI, VISUAL, "laion", HALF),
    Row("laion_clip_vit_bigg14", "open_clip_model.safetensors", OPENAI, VISUAL, "laion", CLIP, FOUR),
    Row(
        "eva02_clip_l14",
        "EVA02_CLIP_L_psz14_s4B.pt",
        EVA_L,
        VISUAL,
        "eva_clip_l",
        CLIP,
        {**GEOMETRY, "mlp_ratio": 128 / 48},
    ),
    Row("eva02_clip_e14", "EVA02_CLIP_E_psz14_s4B.pt", EVA_E | EVA_HEAD, VISUAL, "eva_clip_e", CLIP, FOUR),
    Row("eva02_clip_e14_plus", "open_clip_model.safetensors", EVA_E, trunk, "eva_clip_e", CLIP, FOUR),
    Row("siglip2_vit_so400m16", "open_clip_model.safetensors", SIGLIP_TRUNK, trunk, "siglip_trunk", HALF, FOUR),
    Row("siglip2_vit_b16", "model.safetensors", SIGLIP, VISION_MODEL, "siglip", HALF),
    Row("siglip2_vit_l16", "siglip2_l16_256.npz", SIGLIP, flax(stacked=True), "siglip", HALF),
    Row("siglip2_vit_giantopt16", "siglip2_g-opt16_256.npz", SIGLIP, flax(stacked=False), "siglip", HALF),
    Row("dino_vit_b16", "dino_vitbase16_pretrain.pth", PLAIN, bare, "vit"),
    Row("dino_vit_s16", "dino_deitsmall16_pretrain_full_checkpoint.pth", PLAIN, self_distilled, "vit"),
    Row("deit_b16", "deit_base_patch16_224-b5f2ef4d.pth", PLAIN, classified, "vit"),
    Row("mae_vit_b16", "mae_pretrain_vit_base.pth", PLAIN, lambda state: {"model": state}, "vit"),
    Row("mae_vit_l16", "mae_visualize_vit_large.pth", PLAIN | MAE_DECODER, lambda state: {"model": state}, "vit"),
    Row("dinov2_vit_b14", "dinov2_vitb14_pretrain.pth", dinov2(MLP, False), bare, "dinov2"),
    Row("dinov2_vit_l14_reg", "dinov2_vitl14_reg4_pretrain.pth", dinov2(MLP, True), bare, "dinov2_reg"),
    Row("dinov2_vit_g14", "dinov2_vitg14_pretrain.pth", dinov2(swiglu(128, True), False), bare, "dinov2_g"),
    Row("dinov2_vit_g14_reg", "dinov2_vitg14_reg4.pth", dinov2(swiglu(128, True), True), bare, "dinov2_g_reg"),
    Row("dinov3_vit_l16", "dinov3_vitl16_pretrain_lvd1689m.pth", dinov3(MLP, True), bare, "dinov3"),
    Row("dinov3_vit_l16_sat", "dinov3_vitl16_sat493m.pth", dinov3(MLP, True), bare, "dinov3", SATELLITE),
    Row("dinov3_vit_h16_plus", "dinov3_vith16plus.pth", dinov3(swiglu(192, False), True), bare, "dinov3_swiglu"),
    Row("dinov3_vit_7b16", "dinov3_vit7b16.pth", dinov3(swiglu(128, False), False), bare, "dinov3_swiglu"),
    Row("esvit_swin_b", "checkpoint_best.pth", swin(), distributed, "swin", geometry=SWIN),
]


def row_of(teacher: str) -> Row:
    """The first row of a teacher."""
    return next(row for row in ROWS if row.teacher == teacher)


def written(row: Row, state: State, folder: Path) -> str:
    path, content = folder / row.file, row.wrapped(state)
    match path.suffix:
        case ".safetensors":
            save_file(content, path)
        case ".npz":
            np.savez(path, **content)
        case _:
            torch.save(content, path)
    return str(path)
