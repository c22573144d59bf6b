"""Figures and the page, of measurements written by hand: what is there is drawn, and the page is whole in itself."""

from __future__ import annotations

import re
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from fdscale.diagnostics.figures import TOLD, draw
from fdscale.diagnostics.page import write_page
from fdscale.diagnostics.rows import Measurement
from fdscale.diagnostics.selection import Array

MODELS = ("before", "after <i>&</i>")


def rows_of(model: str, scale: float, layers: int = 3) -> list[Measurement]:
    per_head = ("attention_distance", "attention_entropy", "attention_information")
    per_layer = (
        "head_similarity",
        "attention_diagonality",
        "attention_offset_share",
        "feature_rank",
        "token_similarity",
    )
    rows = [
        Measurement(model, m, scale + k + h, "", 4, k, h) for m in per_head for k in range(layers) for h in range(2)
    ]
    rows += [Measurement(model, m, scale + k, "", 4, k) for m in per_layer for k in range(layers)]
    for measure in ("landscape_loss", "landscape_accuracy"):
        for x in (-1.0, 0.0, 1.0):
            rows += [Measurement(model, measure, scale + x * x + k, "", 4, direction=k, at=(x,)) for k in (0, 1)]
            rows += [Measurement(model, measure, scale + x * x + y * y, "", 4, at=(x, y)) for y in (-1.0, 0.0, 1.0)]
    for k in range(layers):
        rows += [Measurement(MODELS[0], "cka", 0.5, "", 4, k, other=model, other_layer=n) for n in range(layers)]
    return rows


def maps_of(windows: int) -> dict[int, Array]:
    maps = np.full((windows, 4, 4), 0.25)
    maps[-1, 3] = np.nan  # padding
    return dict.fromkeys(range(3), maps)


ROWS = [*rows_of(MODELS[0], 1.0), *rows_of(MODELS[1], 2.0)]


class Reader(HTMLParser):
    """Every attribute that could name something outside, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [str(value) for name, value in attrs if name in ("src", "href", "srcset")]
        if tag == "img":
            assert dict(attrs)["alt"]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_everything_measured_is_drawn_and_told_how_to_read(tmp_path: Path) -> None:
    pictures = draw(ROWS, {MODELS[0]: maps_of(1), MODELS[1]: maps_of(3)}, tmp_path)
    assert [picture.name for picture in pictures] == list(TOLD)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.{kind}" for name in TOLD for kind in ("png", "svg")}
    for name in TOLD:
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width == 2160  # 7.2 inches at 300 dots
            assert np.asarray(image.convert("L")).std() > 5


def test_what_was_not_measured_is_not_drawn(tmp_path: Path) -> None:
    rows = [row for row in ROWS if row.measure.startswith(("feature", "token"))]
    assert [picture.name for picture in draw(rows, {}, tmp_path)] == ["features"]
    assert draw([Measurement("a", "attention", None, "", 1, reason="none")], {}, tmp_path / "no") == []


def test_one_block_of_one_model_is_drawn(tmp_path: Path) -> None:
    rows = rows_of(MODELS[0], 1.0, layers=1)
    assert len(draw(rows, {MODELS[0]: {0: np.full((1, 1, 1), 1.0)}}, tmp_path)) == len(TOLD)


def test_models_far_apart_and_seven_of_them_are_drawn(tmp_path: Path) -> None:
    rows = [row for number in range(7) for row in rows_of(f"model {number} with a long name indeed", 10.0**number)]
    rows = [row for row in rows if row.measure == "attention_distance" or row.direction is not None]
    assert [picture.name for picture in draw(rows, {}, tmp_path)] == ["attention_distance", "landscape"]


def test_the_page_is_whole_in_itself(tmp_path: Path) -> None:
    rows = [row for row in ROWS if row.measure in ("attention_distance", "head_similarity")]
    rows += [Measurement(MODELS[1], "landscape", None, "", 4, reason="no <labels>")]
    pictures = draw(rows, {}, tmp_path / "figures")
    write_page(rows, pictures, tmp_path / "figures", "4 images & no more", tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text()
    read = Reader(page)
    assert len(read.sources) == len(pictures) == 2
    for source in read.sources:
        Image.open(BytesIO(b64decode(source.removeprefix("data:image/png;base64,")))).verify()
    assert not {"script", "link", "i"} & set(read.tags)
    assert re.findall(r"https?://|@import|url\(", page) == []
    for text in ("4 images & no more", MODELS[1], "landscape: no <labels>", *(picture.reading for picture in pictures)):
        assert text in read.text


def test_models_stand_in_the_order_given(tmp_path: Path) -> None:
    rows = [row for model in "za" for row in rows_of(model, 1.0) if row.measure == "head_similarity"]
    write_page(rows, [], tmp_path, "", tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text()
    assert re.findall(r'<th scope="col">(\w+)</th>', page)[:2] == ["z", "a"]


def test_a_narrow_figure_stays_narrow_and_the_title_claims_no_attention(tmp_path: Path) -> None:
    pictures = draw([row for row in rows_of(MODELS[0], 1.0) if row.at and len(row.at) == 2], {}, tmp_path)
    write_page(
        [Measurement("only", "head_similarity", 1.0, "", 4, 0)], pictures[:1], tmp_path, "", tmp_path / "index.html"
    )
    page = (tmp_path / "index.html").read_text()
    assert 'style="max-width: 30rem"' in page
    assert "<h1>only under diagnosis</h1>" in page


def test_captions_tell_of_heads_and_of_image_sides() -> None:
    assert "fitted" in TOLD["landscape"][1]
    assert "heads of the same kind" in TOLD["surface_loss"][1]
    assert "side" in TOLD["attention_distance"][1]
    assert "nearly uniform" in TOLD["attention_shape"][1]
