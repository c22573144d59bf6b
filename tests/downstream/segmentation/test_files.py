"""A saved segmenter computes the same in transformers' hands: buffers that no file holds come back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, AutoModelForUniversalSegmentation

from fdscale.config.errors import UserError
from fdscale.downstream.segmentation.files import load_segmenter, save_segmenter
from fdscale.downstream.segmentation.segmenter import Segmenter, build_segmenter
from fdscale.students.geometry import Geometry, TimmGeometry, ViTGeometry
from fdscale.students.student import build_student
from tests.downstream.segmentation.test_sharded import GEOMETRIES, SMALL
from tests.downstream.test_backbone import perturb, pixels

NAMES = ["wall", "building", "sky", "floor", "tree"]
DEEP = ViTGeometry(16, 5, 2, patch_size=16, image_size=64, position_bias="per_block")
KINDS: dict[str, tuple[Geometry, dict[str, Any]]] = {
    "vit": (GEOMETRIES["vit"], {}),
    "vit_layers": (DEEP, {"plain": "layers", "indices": (0, 1, 2, 4)}),
    "swin_v2": (GEOMETRIES["swin_v2"], {}),
    "swin_v2_window": (GEOMETRIES["swin_v2"], {"window_size": 8}),
    "timm_vit": (
        TimmGeometry("vit_base_patch16_clip_224", 64, {"depth": 2, "embed_dim": 32, "num_heads": 2}),
        {},
    ),
}
AUTO = {"upernet": AutoModelForSemanticSegmentation, "mask2former": AutoModelForUniversalSegmentation}
LOADED_ELSEWHERE = """
import sys, torch
import fdscale.downstream.segmentation.networks
from transformers import AutoModelForSemanticSegmentation, AutoModelForUniversalSegmentation
for auto, folder in ((AutoModelForSemanticSegmentation, sys.argv[1]), (AutoModelForUniversalSegmentation, sys.argv[2])):
    model = auto.from_pretrained(folder)
    given = torch.load(folder + "/pixels.pt")
    with torch.no_grad():
        torch.save(dict(model(given)), folder + "/found.pt")
"""


def made(head: Any, kind: str) -> Segmenter:
    """A segmenter for evaluation, none of whose weights is at its start, with statistics of its own."""
    geometry, arguments = KINDS[kind]
    student = build_student(geometry, seed=1)
    student.mean.mul_(0.9)
    torch.manual_seed(3)
    segmenter = build_segmenter(student, head, channels=32, **{**SMALL, **arguments})
    perturb(segmenter)
    return segmenter.eval()


def scores_of(head: str, found: Any, size: tuple[int, int]) -> Tensor:
    """What transformers' outputs say, as documented by transformers and by Mask2Former's authors."""
    if head == "upernet":
        return found["logits"].softmax(dim=1)
    masks = torch.nn.functional.interpolate(found["masks_queries_logits"], size, mode="bilinear").sigmoid()
    kinds = found["class_queries_logits"].softmax(dim=-1)
    return sum(kinds[:, query, :-1, None, None] * masks[:, query, None] for query in range(masks.shape[1]))  # type: ignore[return-value]


@pytest.mark.parametrize("head", ["upernet", "mask2former"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_computes_the_same(head: str, kind: str, tmp_path: Path) -> None:
    segmenter = made(head, kind)
    save_segmenter(segmenter, segmenter.state_dict(), tmp_path, NAMES)
    model, ours = AUTO[head].from_pretrained(tmp_path), load_segmenter(tmp_path)
    assert model.config.id2label == dict(enumerate(NAMES))
    fixed = kind == "timm_vit"
    for size in [(64, 64)] if fixed else [(64, 64), (50, 90)]:
        given = pixels(2, *size)
        with torch.no_grad():
            expected = segmenter(given)
            assert float(expected.std()) > 1e-2
            torch.testing.assert_close(ours(given), expected, rtol=0, atol=1e-6)
            torch.testing.assert_close(scores_of(head, model(given), size), expected, rtol=0, atol=2e-6)


def test_a_fresh_process_needs_one_module_and_may_be_given_images(tmp_path: Path) -> None:
    folders = {head: tmp_path / head for head in AUTO}
    given = pixels(1, 70, 50)
    expected = {}
    for head, kind in (("upernet", "swin_v2"), ("mask2former", "vit")):
        segmenter = made(head, kind)
        save_segmenter(segmenter, segmenter.state_dict(), folders[head])
        torch.save(given, folders[head] / "pixels.pt")
        expected[head] = segmenter(given).detach()
    arguments = [str(folder) for folder in folders.values()]
    subprocess.run([sys.executable, "-c", LOADED_ELSEWHERE, *arguments], check=True, capture_output=True)
    for head, folder in folders.items():
        found = torch.load(folder / "found.pt")
        torch.testing.assert_close(scores_of(head, found, (70, 50)), expected[head], rtol=0, atol=2e-6)


@pytest.mark.parametrize("head", ["upernet", "mask2former"])
def test_the_image_processor_leaves_pixels_as_they_are(head: str, tmp_path: Path) -> None:
    segmenter = made(head, "vit")
    save_segmenter(segmenter, segmenter.state_dict(), tmp_path, short_side=64, long_side=200)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    image = torch.randint(256, (64, 96, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    seen = processor(Image.fromarray(image.numpy()), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(seen, image.permute(2, 0, 1)[None] / 255)
    larger = processor(Image.fromarray(image.repeat(2, 2, 1).numpy()), return_tensors="pt")["pixel_values"]
    assert larger.shape == (1, 3, 64, 96)


def test_what_a_configuration_says_is_what_was_built(tmp_path: Path) -> None:
    segmenter = made("upernet", "swin_v2_window")
    save_segmenter(segmenter, segmenter.state_dict(), tmp_path)
    maps = json.loads((tmp_path / "config.json").read_text())["backbone_config"]
    assert maps["window_size"] == 8
    assert maps["geometry"]["extra_norm_period"] == 2
    assert maps["mean"] == pytest.approx([0.9 * value for value in (0.485, 0.456, 0.406)])


def test_a_folder_is_replaced_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "segmenter"
    segmenter = made("upernet", "vit")
    save_segmenter(segmenter, segmenter.state_dict(), folder)
    (folder / "left").write_text("by an earlier attempt")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def no_room(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", no_room)
        with pytest.raises(UserError, match=r"could not be written: .*No space left"):
            save_segmenter(segmenter, segmenter.state_dict(), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    save_segmenter(segmenter, segmenter.state_dict(), folder)
    assert {path.name for path in folder.iterdir()} == before.keys() - {"left"}
    assert list(tmp_path.iterdir()) == [folder]


def test_what_is_no_whole_segmenter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no segmenter that can be read"):
        load_segmenter(tmp_path / "nowhere")
    segmenter = made("upernet", "vit")
    save_segmenter(segmenter, segmenter.state_dict(), tmp_path / "whole")
    weights = tmp_path / "whole" / "model.safetensors"
    held = load_file(weights)
    save_file({name: held[name] for name in sorted(held)[1:]}, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"weights are missing, or left over: "):
        load_segmenter(tmp_path / "whole")
    for spoil in (lambda: weights.write_bytes(b"nothing"), weights.unlink):
        spoil()
        with pytest.raises(UserError, match="no segmenter that can be read"):
            load_segmenter(tmp_path / "whole")
    (tmp_path / "whole" / "config.json").write_text("{")
    with pytest.raises(UserError, match="no segmenter that can be read"):
        load_segmenter(tmp_path / "whole")
