"""`fdscale diagnose` where its output cannot be written, its page not drawn, or its images not read; odd names."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from fdscale.cli import main
from fdscale.data.index import build_index
from fdscale.diagnostics.diagnose import read_numbers

TIMM = "timm:test_vit=random"
FEW = ("--images", "4", "--workers", "0", "--only", "features")


def run(digits: Path, output: Path, *more: str, models: tuple[str, ...] = (TIMM,)) -> int:
    return main(["diagnose", *models, "--data", str(digits), "--output", str(output), *FEW, *more])


def shards(folder: Path, whole: int, broken: int) -> Path:
    folder.mkdir()
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)).save(stream, "png")
    with tarfile.open(folder / "only.tar", "w") as tar:
        for number in range(whole + broken):
            data = stream.getvalue()[: None if number < whole else 40]
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    build_index(folder)
    return folder


@pytest.mark.parametrize("taken", ["/proc/nowhere/out", "index.json/x"])
def test_an_output_that_cannot_be_made_is_told_before_anything_is_measured(
    taken: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "index.json").write_text("{}")
    assert run(digits, tmp_path / taken) == 2
    read = capsys.readouterr()
    assert f"{taken}: cannot be written: " in read.err
    assert read.out == ""
    assert (tmp_path / "index.json").read_text() == "{}"


def test_a_page_that_cannot_be_drawn_leaves_the_numbers_and_the_way_to_draw_it(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(figure: Figure, *given: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "an output"
    output.mkdir()  # an empty folder is accepted
    with monkeypatch.context() as patched:
        patched.setattr(Figure, "savefig", interrupted)
        assert run(digits, output) == 2
    told = capsys.readouterr().err
    assert "index.html could not be drawn: interrupted; what was measured is in" in told
    assert read_numbers(output)[0].rows
    assert not (output / "index.html").exists()
    subprocess.run(told[told.index("python -c ") :].strip(), shell=True, check=True)
    assert (output / "index.html").is_file()


def test_images_of_which_none_can_be_decoded_are_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(shards(tmp_path / "shards", 0, 5), tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert "none of the 4 images that were to be looked at can be decoded" in told
    assert list((tmp_path / "out").iterdir()) == []


def test_images_are_counted_that_were_looked_at(tmp_path: Path) -> None:
    assert run(shards(tmp_path / "shards", 3, 2), tmp_path / "out", "--images", "5") == 0
    assert "3 of 5 images of" in json.loads((tmp_path / "out" / "about.json").read_text())["told"]


def test_images_of_the_landscape_alone_are_told_as_such(digits: Path, tmp_path: Path) -> None:
    assert run(digits, tmp_path / "out", "--only", "landscape", "--images", "32") == 0
    assert "the landscape on 8 of 449 images of" in (tmp_path / "out" / "index.html").read_text()


def test_odd_names_are_shown_and_empty_ones_refused(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = (TIMM, TIMM)
    assert run(digits, tmp_path / "out", "--name", " ", "--name", "b", models=two) == 2
    assert "--name ' ': a model's name is not empty" in capsys.readouterr().err
    assert run(digits, tmp_path / "out", "--name", "$a_{$", "--name", "_b", models=two) == 0
    drawn = (tmp_path / "out" / "figures" / "features.svg").read_text()
    assert "<!-- $a_{$ -->" in drawn
    assert "<!-- _b -->" in drawn
