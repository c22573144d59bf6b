"""The model card of an export: how to load it, what it is, where it comes from, how well it agrees with fdscale."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fdscale.export.finished import CROP_PCT, Finished
from fdscale.export.parity import LIMIT, Report
from fdscale.students.geometry import file_source, geometry_to_json

OWN_ARCHITECTURE = "fd_swin_v2"  # SwinV2 with extra norms: the export carries OWN_ARCHITECTURE.py

_STOCK = """\
```python
import timm
import torch

model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
{result} = {call}(torch.rand(1, {input_size}))  # normalised as below
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
{result} = model(torch.rand(1, {input_size}))  # {shape}, normalised as below
```
"""

_TRANSFORMERS = """\
```python
from PIL import Image
from transformers import AutoImageProcessor, {kind}

processor = AutoImageProcessor.from_pretrained("{folder}")
model = {kind}.from_pretrained("{folder}"{trust})
image = Image.new("RGB", (640, 480))
{result} = model(**processor(image, return_tensors="pt")).{output}
```
{remarks}"""

_CARD = """\
---
library_name: {library}
pipeline_tag: {task}
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

## Parity

{parity}
## Geometry

| | |
|---|---|
| architecture | {architecture} |
{arguments}
"""


def timm_card(student: Finished, config: Mapping[str, Any], report: Report, folder: str) -> str:
    """README.md for timm's exported `config.json`."""
    input_size = ", ".join(str(n) for n in config["pretrained_cfg"]["input_size"])
    loading = _timm_loading(config, folder, input_size)
    return _card(student, report, folder, loading, input_size, config["architecture"], config["model_args"])


def transformers_card(student: Finished, config: Mapping[str, Any], report: Report, folder: str, remarks: str) -> str:
    """README.md for an export to transformers; `remarks` on sizes stand under the snippet."""
    kind = "AutoModelForImageClassification" if student.head else "AutoModel"
    loading = _TRANSFORMERS.format(
        folder=folder,
        kind=kind,
        trust=", trust_remote_code=True" if "auto_map" in config else "",
        result="logits" if student.head else "tokens",
        output="logits" if student.head else "last_hidden_state",
        remarks=f"\n{remarks}\n" if remarks else "",
    )
    side, shown = config["image_size"], geometry_to_json(student.geometry)
    return _card(student, report, folder, loading, f"3, {side}, {side}", config["architectures"][0], shown)


def _card(
    student: Finished,
    report: Report,
    folder: str,
    loading: str,
    input_size: str,
    architecture: str,
    arguments: Mapping[str, Any],
) -> str:
    source = file_source(student.weights)
    return _CARD.format(
        library=report.format,
        task="image-classification" if student.head else "image-feature-extraction",
        folder=folder,
        origin=_imported(source) if source else f"{_kind(student)} trained with fdscale. {_origin(student.recipe)}",
        tags="" if source else "\n- feature-distillation",
        loading=loading,
        input_size=input_size,
        mean=list(student.mean),
        std=list(student.std),
        interpolation=student.interpolation,
        crop_pct=CROP_PCT,
        parity=_parity(report),
        architecture=architecture,
        arguments="\n".join(f"| {name} | {value!r} |" for name, value in arguments.items()),
    )


def _kind(student: Finished) -> str:
    return f"A classifier of {student.head.classes} classes" if student.head else "A backbone"


def _timm_loading(config: Mapping[str, Any], folder: str, input_size: str) -> str:
    result = "logits" if config["num_classes"] else "tokens"
    if config["architecture"] == OWN_ARCHITECTURE:
        shape = "(B, classes)" if config["num_classes"] else "(B, h, w, C)"
        return _OWN_FILE.format(folder=folder, input_size=input_size, result=result, shape=shape)
    pooled = config["model_args"]["global_pool"] != ""
    call = "model.forward_features" if pooled and not config["num_classes"] else "model"
    pooling = "" if pooled else ', global_pool="avg"'
    return _STOCK.format(folder=folder, input_size=input_size, call=call, pooling=pooling, result=result)


def _parity(report: Report) -> str:
    """The sizes, and how far the exported network is from fdscale's own."""
    packages = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    head = [
        f"Read by {packages} in a process without fdscale: {len(report.missing_keys)} keys missing, "
        f"{len(report.unexpected_keys)} unexpected. fp32 outputs for two {report.images}, against fdscale's own; the "
        f"export would have failed above {LIMIT:g} of the largest value at an exact size.",
        "",
        "| height x width | largest difference | of the largest value | |",
        "|---|---|---|---|",
    ]
    rows = [
        f"| {row.size} | {row.absolute:.1e} | {row.relative:.1e} | {'exact' if row.exact else 'approximate'} |"
        for row in report.rows
    ]
    return "\n".join([*head, *rows, ""])


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
    length = f"{recipe['epochs']:g} epochs" if "epochs" in recipe else f"{recipe['steps']:,} steps"
    length += f", global batch {batch}, seed {seed}"
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
