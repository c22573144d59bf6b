"""What an export knows of its run: the images and class names behind the recipe."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fdscale.data.images import ImageReader
from fdscale.data.index import load_index
from fdscale.data.packing.digits import pack_digits
from fdscale.export.finished import Finished, finished
from fdscale.students.geometry import ViTGeometry
from tests.data.shard_server import ShardServer

VIT = ViTGeometry(embed_dim=32, depth=1, num_heads=4, patch_size=8, image_size=32)


@pytest.fixture
def run(tmp_path: Path, completed_finetuning: Callable[..., object]) -> Callable[[str], Finished]:
    """A completed run of a classifier that was trained on shards behind this URL."""
    folder = tmp_path / "run"
    completed_finetuning(VIT, folder, "after_pooling")

    def of(url: str) -> Finished:
        recipe = (folder / "recipe.toml").read_text()
        cache = f"cache = {json.dumps(str(tmp_path / 'cache'))}\nallow_pipe = true\n"
        (folder / "recipe.toml").write_text(f"{recipe}{cache}shards = {json.dumps(url)}\n")
        return finished(folder)

    return of


def test_class_names_and_images_come_from_behind_a_url(run: Callable[[str], Finished], tmp_path: Path) -> None:
    packed = pack_digits(tmp_path / "digits", "test")
    with ShardServer(tmp_path / "digits").serving() as server:
        student = run(server.url)
        assert student.class_names == packed.classes
        shown = student.shown
        assert shown is not None
        pixels = [np.asarray(ImageReader(index).decode(0)) for index in (shown, load_index(tmp_path / "digits"))]
        assert np.array_equal(*pixels)
        assert server.asked["index.json"] == 1


def test_a_command_in_a_recipe_is_not_run(
    run: Callable[[str], Finished], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        student = run(f"pipe:touch '{tmp_path}/marker'; cat {{}}")
        assert student.class_names is None
    assert "is left out: an export runs no command of a recipe" in caplog.text
    assert not (tmp_path / "marker").exists()
