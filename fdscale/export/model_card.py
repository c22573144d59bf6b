"""The model card of an export: how to load it, what it is, where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

OWN_ARCHITECTURE = "fd_swin_v2"  # SwinV2 with extra norms: the export carries OWN_ARCHITECTURE.py

_STOCK = """\
```python
import timm
import torch

model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
tokens = {call}(torch.rand(1, {input_size}))  # normalised as below
```

`timm.create_model(..., num_classes=10{pooling})` puts a new head on it for fine-tuning.
"""

_OWN_FILE = """\
timm has no SwinV2 with extra norms. Its model file lies beside the weights and needs torch and timm.

```python
import sys

import torch

sys.path.insert(0, "{folder}")
from fd_swin_v2 import load

model = load("{folder}")
tokens = model(torch.rand(1, {input_size}))  # (B, h, w, C), normalised as below
```
"""

_CARD = """\
---
library_name: timm
pipeline_tag: image-feature-extraction
tags:{tags}
---
# {folder}

{origin}

{loading}
## Input

| | |
|---|---|
| size | {input_size} |
| mean | {mean} |
| std | {std} |
| interpolation, crop | {interpolation}, centre crop of {crop_pct} |

Images are RGB in [0, 1]; subtract the mean, divide by the standard deviation.

## Geometry

| | |
|---|---|
| architecture | {architecture} |
{arguments}
"""


def model_card(
    config: Mapping[str, Any], recipe: Mapping[str, Any], source: Mapping[str, str] | None, folder: str
) -> str:
    """README.md for the exported `config.json`; `recipe` is the run's, empty when it is not known.

    `source` (`file`, `sha256`) is the checkpoint that the weights were imported from, None where they were trained.
    """
    preprocessing = config["pretrained_cfg"]
    input_size = ", ".join(str(n) for n in preprocessing["input_size"])
    return _CARD.format(
        folder=folder,
        origin=_imported(source) if source else f"A backbone trained with fdscale. {_origin(recipe)}",
        tags="" if source else "\n- feature-distillation",
        loading=_loading(config, folder, input_size),
        input_size=input_size,
        mean=preprocessing["mean"],
        std=preprocessing["std"],
        interpolation=preprocessing["interpolation"],
        crop_pct=preprocessing["crop_pct"],
        architecture=config["architecture"],
        arguments="\n".join(f"| {name} | {value!r} |" for name, value in config["model_args"].items()),
    )


def _loading(config: Mapping[str, Any], folder: str, input_size: str) -> str:
    if config["architecture"] == OWN_ARCHITECTURE:
        return _OWN_FILE.format(folder=folder, input_size=input_size)
    pooled = config["model_args"]["global_pool"] != ""
    call, pooling = ("model.forward_features", "") if pooled else ("model", ', global_pool="avg"')
    return _STOCK.format(folder=folder, input_size=input_size, call=call, pooling=pooling)


def _imported(source: Mapping[str, str]) -> str:
    return (
        f"Weights of `{source['file']}` (SHA-256 `{source['sha256']}`), brought into timm's names by fdscale and "
        "trained by others: their licence holds."
    )


def _origin(recipe: Mapping[str, Any]) -> str:
    """One sentence on the training, as far as the recipe tells it; file names without their folders."""
    if not recipe:
        return "Its recipe was not found beside the student file."
    batch, seed = recipe["data"]["global_batch"], recipe.get("seed", 0)
    length = f"{recipe['epochs']:g} epochs, global batch {batch}, seed {seed}"
    if recipe["program"] == "finetune":
        return f"`{recipe['student']['name']}`, fine-tuned with labels of {recipe['classes']} classes: {length}."
    teachers = [recipe["teacher"], *recipe.get("further_teachers", {}).values()]
    taught = " and ".join(map(_teacher, teachers))
    return (
        f"`{recipe['student']['name']}`, distilled from the features of {taught} "
        f"by feature distillation (arXiv 2205.14141): {length}."
    )


def _teacher(table: Mapping[str, Any]) -> str:
    return f"`{table['name']}`" + (f" (weights `{Path(table['weights']).name}`)" if table.get("weights") else "")
