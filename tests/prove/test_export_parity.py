"""Exports read without fdscale against fdscale, size by size, and why a SwinV2 differs in transformers at some sizes.

`python -m pytest -m prove tests/prove/test_export_parity.py -s` writes docs/measurements/export_parity.json and .md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fdscale.config.errors import UserError
from fdscale.data.packing.digits import pack_digits
from fdscale.downstream.classifier import Classifier, save_classifier
from fdscale.export.finished import finished
from fdscale.export.parity import LIMIT
from fdscale.export.timm_format import export_timm, timm_network, write_timm
from fdscale.export.transformers_format import export_transformers, is_exact, write_transformers
from fdscale.students.files import save_student
from fdscale.students.geometry import STUDENTS, Geometry, SwinV2Geometry, TimmGeometry, ViTGeometry
from fdscale.students.student import build_student
from tests.prove.page import Page

pytestmark = [pytest.mark.prove, pytest.mark.timeout(1500)]

VIT = ViTGeometry(192, 12, 3, 16)
SWIN = SwinV2Geometry(32, (2, 2, 6, 2), (1, 2, 4, 8), window_size=8)
CASES: dict[str, tuple[Geometry, str | None]] = {
    "ViT, shared bias": (VIT, None),
    "ViT, bias per block": (replace(VIT, position_bias="per_block"), None),
    "SwinV2": (SWIN, None),
    "SwinV2, extra norms": (replace(SWIN, extra_norm_period=6), None),
    "ViT-B/16, shared bias": (STUDENTS["vit_b16"], None),
    "ViT-B/16, bias per block, classifier": (replace(STUDENTS["vit_b16"], position_bias="per_block"), "after_pooling"),
    "SwinV2-T": (STUDENTS["swinv2_t"], None),
    "SwinV2-T, extra norms, classifier": (replace(STUDENTS["swinv2_t"], extra_norm_period=6), "student"),
}
EXPORTS = {"timm": export_timm, "transformers": export_transformers}
CAUSE_SIZES = ((256, 256), (384, 384), (512, 512), (288, 288), (320, 320), (480, 352))
HOW = """\
Networks whose every weight was moved by a normal draw of 0.05 (position bias tables: of 1), so that no block is the
identity. Each was exported with `fdscale export` and read back in a process that cannot import fdscale: two digits from
shards, fp32; the largest difference as a share of the largest value. No key was missing, none was unexpected.

The last rows ask why a SwinV2 differs in transformers: each block of timm's network and of transformers' gets the same
input. Blocks part where they shift their windows over a padded map. When timm's blocks pad before they shift, nothing
is left; "edges" is how much a map's first row moves with its last row, through one such block, in timm and in
transformers.
"""


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    page = Page("export_parity")
    yield page
    write_tables(page)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "digits"
    pack_digits(folder, "test")
    return folder


def trained(geometry: Geometry, norm: str | None, folder: Path, shards: Path | None = None) -> Path:
    """A student file, with a classifier where `norm` says so, and a recipe that names the images it was shown."""
    folder.mkdir(parents=True)
    student = build_student(geometry, seed=1).eval()
    module: nn.Module = student if norm is None else Classifier(student, 10, 0.0, norm, 1.0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            width = 1.0 if "relative_position_bias_table" in name else 0.05
            parameter.add_(width * torch.randn(parameter.shape, generator=generator))
    if norm is None:
        save_student(student, student.backbone.state_dict(), folder)
    else:
        save_classifier(student, module.state_dict(), folder)
    if shards is not None:
        recipe = f'program = "finetune"\nepochs = 1.0\nclasses = 10\n[student]\nname = "{geometry.family}"\n'
        recipe += f'[data]\nglobal_batch = 8\n[eval]\nshards = "{shards}"\n'
        (folder / "recipe.toml").write_text(recipe)
    return folder / "student.safetensors"


@pytest.mark.parametrize("format", EXPORTS)
@pytest.mark.parametrize("case", CASES)
def test_an_export_gives_what_fdscale_gives(page: Page, tmp_path: Path, shards: Path, case: str, format: str) -> None:
    def measure() -> dict[str, Any]:
        geometry, norm = CASES[case]
        folder = EXPORTS[format](trained(geometry, norm, tmp_path / "run", shards), tmp_path / "export")
        report = json.loads((folder / "parity.json").read_text())
        config, digits = json.loads((folder / "config.json").read_text()), [str(digit) for digit in range(10)]
        names = config.get("label_names") or list(config.get("id2label", {}).values())
        held = (
            names == (digits if norm else [])
            and report["missing_keys"] == report["unexpected_keys"] == []
            and "run's shards" in report["images"]
        )
        return {"case": case, **report, "held": held and len(report["rows"]) >= 5}

    row = page.row(f"{case} / {format}", measure)
    assert row["held"]
    assert all(size["relative"] <= LIMIT / 10 for size in row["rows"] if size["exact"])


def test_an_export_that_differs_is_taken_back(tmp_path: Path) -> None:
    """timm's ConvNeXt has its norm after the pooling, our classifier before it."""
    weights = trained(TimmGeometry("test_convnext"), "student", tmp_path / "run")
    with pytest.raises(UserError, match="the export was taken back: read by timm without fdscale, it has outputs at"):
        export_timm(weights, tmp_path / "export")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("size", CAUSE_SIZES)
def test_blocks_part_where_one_pads_before_the_shift_and_the_other_after(
    page: Page, tmp_path: Path, size: tuple[int, int]
) -> None:
    def measure() -> dict[str, Any]:
        weights = trained(SWIN, None, tmp_path / "run")
        mine, theirs = both_networks(weights, size, tmp_path)
        stock = block_differences(mine, theirs, size)
        for block in blocks_of(mine).values():
            block._attn = pad_first.__get__(block)
        padded_first = block_differences(mine, theirs, size)
        parted = {name: value for name, value in stock.items() if value["relative"] > LIMIT}
        return {
            "size": f"{size[0]}x{size[1]}",
            "blocks": stock,
            "parted": sorted(parted),
            "largest": max(value["relative"] for value in stock.values()),
            "padded_first": max(value["relative"] for value in padded_first.values()),
            "edges": max((value["edges"] for value in parted.values()), default=0.0),
            "edges_of_transformers": max((padded_first[name]["edges"] for name in parted), default=0.0),
            "expected_exact": is_exact(finished(weights), size),
        }

    row = page.row(f"cause / {size[0]}x{size[1]}", measure)
    assert row["padded_first"] <= LIMIT
    assert row["edges_of_transformers"] == 0.0
    assert (row["parted"] == []) == row["expected_exact"]
    assert all(name.endswith((".1", ".3", ".5")) for name in row["parted"])  # those that shift


def test_the_mask_that_transformers_adds_twice_is_seen_at_the_largest_temperature(page: Page, tmp_path: Path) -> None:
    def measure() -> dict[str, Any]:
        mine, theirs = both_networks(trained(SWIN, None, tmp_path / "run"), (256, 256), tmp_path)
        found = {}
        for scale in (10.0, 30.0, 100.0):
            for module in [*mine.modules(), *theirs.modules()]:
                if isinstance(getattr(module, "logit_scale", None), nn.Parameter):
                    nn.init.constant_(module.logit_scale, math.log(scale))
            found[f"{scale:g}"] = max(
                value["relative"] for value in block_differences(mine, theirs, (256, 256)).values()
            )
        return {"largest": found}

    assert page.row("mask / 256x256", measure)["largest"]["10"] <= LIMIT


def both_networks(weights: Path, size: tuple[int, int], place: Path) -> tuple[Any, Any]:
    """timm's network and transformers', as their users load them, for this size."""
    from transformers import AutoModel

    student = finished(weights)
    for name, write in (("timm", lambda folder: write_timm(student, timm_network(student), folder)), ("hf", None)):
        (place / name).mkdir()
        if write:
            write(place / name)
        else:
            write_transformers(student, place / name)
    mine = timm.create_model(f"local-dir:{place / 'timm'}", pretrained=True, img_size=size).eval()
    side = size[0] if size[0] == size[1] else list(size)
    return mine, AutoModel.from_pretrained(place / "hf", image_size=side).eval()


def blocks_of(network: Any) -> dict[str, Any]:
    return {f"{s}.{b}": block for s, stage in enumerate(network.layers) for b, block in enumerate(stage.blocks)}


@torch.no_grad()
def block_differences(mine: Any, theirs: Any, size: tuple[int, int]) -> dict[str, dict[str, float]]:
    """Each block's difference on the same input, and how much its first row moves when the last row does."""
    x = mine.patch_embed(torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(3)))
    found = {}
    for s, stage in enumerate(mine.layers):
        x = stage.downsample(x)
        for b, block in enumerate(stage.blocks):
            other = theirs.encoder.layers[s].blocks[b](x.flatten(1, 2), x.shape[1:3])[0].view_as(x)
            moved = x.clone()
            moved[:, -1] = moved[:, -1].flip(-1)
            out = block(x)
            found[f"{s}.{b}"] = {
                "relative": float((out - other).abs().max() / out.abs().max()),
                "edges": float((block(moved)[:, 0] - out[:, 0]).abs().max() / out.abs().max()),
            }
            x = out
    return found


def pad_first(block: Any, x: Tensor) -> Tensor:
    """timm's `_attn` in the order of transformers (and of Swin's detection code): pad, shift, mask, shift back, cut."""
    _, height, width, channels = x.shape
    (high, wide), shift = block.window_size, block.shift_size
    x = F.pad(x, (0, 0, 0, -width % wide, 0, -height % high))
    rows, columns = x.shape[1] // high, x.shape[2] // wide
    shifted = torch.roll(x, (-shift[0], -shift[1]), (1, 2)).view(-1, rows, high, columns, wide, channels)
    windows = block.attn(shifted.transpose(2, 3).reshape(-1, high * wide, channels), mask=block.attn_mask)
    back = windows.view(-1, rows, columns, high, wide, channels).transpose(2, 3).reshape_as(x)
    return torch.roll(back, shift, (1, 2))[:, :height, :width]


def write_tables(page: Page) -> None:
    rows = [row for row in page.rows.values() if "rows" in row]
    lines = [
        {
            "network": row["case"],
            "read by": row["format"],
            "size": size["size"],
            "difference": f"{size['relative']:.1e}",
        }
        | {"": "exact" if size["exact"] else "approximate"}
        for row in rows
        for size in row["rows"]
    ]
    for row in (row for name, row in page.rows.items() if name.startswith("cause")):
        told = f"blocks {', '.join(row['parted'])} part" if row["parted"] else "no block parts"
        edges = f"; edges {row['edges']:.1e} and {row['edges_of_transformers']:.1e}" if row["parted"] else ""
        lines.append(
            {"network": "SwinV2, block by block", "read by": "both", "size": row["size"]}
            | {"difference": f"{row['largest']:.1e}, padded first {row['padded_first']:.1e}", "": told + edges}
        )
    if mask := page.rows.get("mask / 256x256"):
        told = ", ".join(f"{value:.1e} at {scale}" for scale, value in mask["largest"].items())
        lines.append(
            {"network": "SwinV2, by logit scale", "read by": "both", "size": "256x256", "difference": told}
            | {"": "transformers adds the windows' mask twice"}
        )
    page.write_table("Exports against fdscale", HOW, ["network", "read by", "size", "difference", ""], lines)
