"""timm's parameter names as those of transformers' running models; `{a|b|c}` is a fused weight that is cut in three.

Names in transformers' files are others: `save_pretrained` writes those, from a model that was filled by these.
"""

from __future__ import annotations

BEIT = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "cls_token": "embeddings.cls_token",
    "rel_pos_bias": "shared_position_bias",
    "fc_norm": "pooler.layernorm",
    "norm": "layernorm",
}
BEIT_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "gamma_1": "lambda_1",
    "gamma_2": "lambda_2",
    "attn.relative_position_bias_table": "relative_position_bias.relative_position_bias_table",
    "attn.qkv.weight": "attention.{q_proj|k_proj|v_proj}.weight",
    "attn.q_bias": "attention.q_proj.bias",
    "attn.v_bias": "attention.v_proj.bias",
    "attn.proj": "attention.o_proj",
    "mlp": "mlp",
}
SWIN_V2 = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "patch_embed.norm": "embeddings.norm",
    "norm": "layernorm",
}
SWIN_V2_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.logit_scale": "attention.self.logit_scale",
    "attn.cpb_mlp": "attention.self.continuous_position_bias_mlp",
    "attn.qkv.weight": "attention.self.{query|key|value}.weight",
    "attn.q_bias": "attention.self.query.bias",
    "attn.v_bias": "attention.self.value.bias",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def beit_name(name: str) -> str:
    """Of a Beit's parameter."""
    if name.startswith("blocks."):
        _, block, rest = name.split(".", 2)
        return f"layers.{block}.{_renamed(rest, BEIT_BLOCK)}"
    return _renamed(name, BEIT)


def swin_v2_name(name: str) -> str:
    """Of a SwinV2's parameter; timm merges patches when a stage starts, transformers when the one before it ends."""
    if not name.startswith("layers."):
        return _renamed(name, SWIN_V2)
    _, stage, part, rest = name.split(".", 3)
    if part == "downsample":
        return f"encoder.layers.{int(stage) - 1}.downsample.{rest}"
    block, _, rest = rest.partition(".")
    return f"encoder.layers.{stage}.blocks.{block}.{_renamed(rest, SWIN_V2_BLOCK)}"


def _renamed(name: str, table: dict[str, str]) -> str:
    for known, renamed in table.items():
        if name == known or name.startswith(f"{known}."):
            return renamed + name.removeprefix(known)
    raise AssertionError(f"{name} is no parameter of this network")
