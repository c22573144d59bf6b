"""Top-1 of a fine-tuned ViT's two files on a folder of images, by timm and torchvision alone; run as a script.

`python imagenet_reader.py RUN VAL_FOLDER` prints JSON; it needs no fdscale.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from timm.data import create_transform
from timm.models.beit import Beit
from torch import nn
from torchvision.datasets import ImageFolder


def network(run: Path) -> tuple[Beit, dict[str, list[float]]]:
    """timm's Beit that averages its patch tokens, with both files inside."""
    described = json.loads((run / "student.json").read_text())
    shape, head = described["geometry"], load_file(run / "classifier.safetensors")
    model = Beit(
        img_size=shape["image_size"],
        patch_size=shape["patch_size"],
        num_classes=len(head["head.bias"]),
        global_pool="avg",
        embed_dim=shape["embed_dim"],
        depth=shape["depth"],
        num_heads=shape["num_heads"],
        mlp_ratio=shape["mlp_ratio"],
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        init_values=shape["init_values"],
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
    )
    backbone = {name: value for name, value in load_file(run / "student.safetensors").items() if name[:5] != "norm."}
    model.load_state_dict({**backbone, **head}, strict=True)
    return model.eval(), {"mean": described["mean"], "std": described["std"]}


@torch.no_grad()
def top_1(run: Path, folder: Path) -> float:
    """The share of the folder's images that is classified as their folder, in order of the folders' names."""
    model, statistics = network(run)
    size = model.patch_embed.img_size[0]
    transform = create_transform(size, is_training=False, crop_pct=0.875, interpolation="bicubic", **statistics)
    images = ImageFolder(str(folder), transform)
    loader = torch.utils.data.DataLoader(images, 64)
    right = sum(int((model(pixels).argmax(1) == labels).sum()) for pixels, labels in loader)
    return right / len(images)


if __name__ == "__main__":
    print(json.dumps({"top_1": top_1(*map(Path, sys.argv[-2:]))}))
