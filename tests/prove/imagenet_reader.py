"""Top-1 of an exported classifier on a folder of images, by timm or transformers alone; run as a script.

`python imagenet_reader.py timm|transformers EXPORT VAL_FOLDER` prints JSON; it needs no fdscale.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.datasets import ImageFolder

Logits = Callable[[Tensor], Tensor]


def by_timm(export: Path) -> tuple[Logits, Callable[[Any], Tensor]]:
    """The network and the transform that timm makes of the folder."""
    import timm

    model = timm.create_model(f"local-dir:{export}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(model)
    return model, timm.data.create_transform(**data, is_training=False)


def by_transformers(export: Path) -> tuple[Logits, Callable[[Any], Tensor]]:
    """The same, transformers'."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(export).eval()
    processor = AutoImageProcessor.from_pretrained(export, backend="pil")
    return lambda pixels: model(pixels).logits, lambda image: processor(image, return_tensors="pt")["pixel_values"][0]


@torch.no_grad()
def top_1(how: str, export: Path, folder: Path) -> float:
    """The share of the folder's images that is classified as their folder, in order of the folders' names."""
    logits, transform = by_timm(export) if how == "timm" else by_transformers(export)
    images = ImageFolder(str(folder), transform)
    loader = torch.utils.data.DataLoader(images, 64)
    right = sum(int((logits(pixels).argmax(1) == labels).sum()) for pixels, labels in loader)
    return right / len(images)


if __name__ == "__main__":
    print(json.dumps({"top_1": top_1(sys.argv[-3], *map(Path, sys.argv[-2:]))}))
