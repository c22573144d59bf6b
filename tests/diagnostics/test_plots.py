"""What figures show of measurements that are few, all alike, missing, or of models with odd names; no warnings."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from fdscale.diagnostics import plots
from fdscale.diagnostics.figures import draw
from fdscale.diagnostics.rows import Measurement

ODD = ("$a_{$", "_hidden", "100 %_$x$")


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn, as they are when they are saved."""
    kept: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *given: Any, **named: Any) -> None:
        save(figure, *given, **named)
        if figure not in kept:
            kept.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if isinstance(text, Text)]


def lines(model: str, values: Sequence[float], measure: str = "landscape_accuracy", **told: Any) -> list[Measurement]:
    """A value for each direction, the same at -1, 0 and 1."""
    return [
        Measurement(model, measure, value, "", 4, direction=number, at=(at,), **told)
        for number, value in enumerate(values)
        for at in (-1.0, 0.0, 1.0)
    ]


def plane(model: str, values: Sequence[Sequence[float | None]], measure: str = "landscape_loss") -> list[Measurement]:
    side = np.linspace(-1, 1, len(values)).tolist()
    return [
        Measurement(model, measure, value, "", 4, at=(x, y))
        for y, row in zip(side, values, strict=True)
        for x, value in zip(side, row, strict=True)
    ]


def layers(model: str, measure: str, values: Sequence[float | None]) -> list[Measurement]:
    return [Measurement(model, measure, value, "", 4, layer) for layer, value in enumerate(values)]


def aligned(model: str, other: str, values: Sequence[Sequence[float | None]]) -> list[Measurement]:
    return [
        Measurement(model, "cka", value, "", 4, layer, other=other, other_layer=theirs)
        for layer, row in enumerate(values)
        for theirs, value in enumerate(row)
    ]


def test_names_are_shown_as_they_are(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [
        row
        for name in ODD
        for row in [
            *layers(name, "attention_distance", [1, 2]),
            *layers(name, "head_similarity", [0.5, 0.6]),
            *layers(name, "feature_rank", [5, 6]),
            *lines(name, [0.5, 0.6]),
            *plane(name, [[1, 2, 3]] * 3),
            *aligned(ODD[0], name, [[1, 0.5], [0.5, 1]]),
        ]
    ]
    draw(rows, {name: {0: np.full((1, 2, 2), 0.5)} for name in ODD}, tmp_path)
    assert len(figures) == 7
    for figure in figures:
        assert [name for name in ODD if not any(name in text for text in texts(figure))] == []


def test_a_logarithmic_axis_is_numbered_without_mathematics(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [*lines("a", [1.0], "landscape_loss"), *lines("b", [5000.0], "landscape_loss")]
    plots.plot_curves(rows, ["a", "b"], {"landscape_loss": "loss"}, tmp_path / "x")
    (axes,) = figures[0].axes
    assert axes.get_yscale() == "log"
    ticks = [label.get_text() for label in axes.get_yticklabels() if label.get_text()]
    assert ticks
    assert all(float(tick) > 0 for tick in ticks)


@pytest.mark.parametrize(("directions", "bands"), [(4, 0), (5, 1)])
def test_a_band_is_drawn_of_enough_directions_and_stays_within_bounds(
    directions: int, bands: int, tmp_path: Path, figures: list[Figure]
) -> None:
    rows = lines("a", [1.0, 0.0, 1.0, 0.0, 1.0][:directions])
    plots.plot_curves(rows, ["a"], {"landscape_accuracy": "accuracy"}, tmp_path / "x")
    (axes,) = figures[0].axes
    assert len(axes.collections) == bands
    assert len(axes.lines) == directions + 1
    for band in axes.collections:
        (path,) = band.get_paths()
        assert (path.vertices[:, 1].min(), path.vertices[:, 1].max()) == (0, 1)


def test_accuracies_that_are_all_nought_or_far_apart_have_a_linear_axis(tmp_path: Path, figures: list[Figure]) -> None:
    for value in (0.0, 0.01):
        rows = [*lines("a", [value]), *lines("b", [value * 50])]
        plots.plot_curves(rows, ["a", "b"], {"landscape_accuracy": "accuracy"}, tmp_path / "x")
        (axes,) = figures[-1].axes
        assert axes.get_yscale() == "linear"
        assert axes.get_ylim()[1] >= 0.05


def test_the_head_stands_beside_the_name(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [*lines("a", [0.5], classifier="run"), *lines("b", [0.5], classifier="fitted"), *lines("c", [0.5])]
    plots.plot_curves(rows, ["a", "none", "b", "c"], {"landscape_accuracy": "accuracy"}, tmp_path / "x")
    (legend,) = figures[0].legends
    assert sorted(text.get_text() for text in legend.get_texts()) == [
        "a (its own head)",
        "b (head fitted to these images)",
        "c",
    ]
    drawn = [line.get_color() for line in figures[0].axes[0].lines if line.get_linewidth() == 2]
    assert drawn == [plots.COLOURS[place] for place in (0, 2, 3)]


def test_a_surface_of_one_model_has_a_figure_of_its_size(tmp_path: Path, figures: list[Figure]) -> None:
    for models, width in ((["a"], 1080), (["a", "b"], 2160)):
        rows = [row for model in models for row in plane(model, [[1, 2, 3]] * 3)]
        plots.plot_surfaces(rows, models, "landscape_loss", "loss", tmp_path / "x")
        with Image.open(tmp_path / "x.png") as image:
            assert image.width == width
    assert figures[0].axes[0].get_position().x0 < 0.3


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, 1.0 + 1e-13, 3.0])
def test_a_constant_surface_has_a_scale_that_can_be_read(value: float, tmp_path: Path, figures: list[Figure]) -> None:
    rows = plane("a", [[value, value, value + 1e-13]] * 3)
    plots.plot_surfaces(rows, ["a"], "landscape_loss", "loss", tmp_path / "x")
    levels = [float(label.get_text()) for label in figures[0].axes[1].get_yticklabels()]
    assert max(levels) - min(levels) >= 0.04
    assert min(levels) >= 0


def test_a_surface_with_holes_keeps_its_plane(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [*plane("a", [[None, 2, 3]] * 3), *plane("none", [[None] * 3] * 3)]
    assert [picture.name for picture in draw(rows, {}, tmp_path)] == ["surface_loss"]
    assert [axes.get_title() for axes in figures[0].axes] == ["a", ""]
    assert figures[0].axes[0].get_xlim() == (-1, 1)


def test_what_hardly_differs_is_not_magnified(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [*layers("a", "attention_column_share", [1e-4, 2e-4]), *layers("a", "feature_rank", [1e-4, 2e-4])]
    plots.plot_layers(rows, ["a"], {"attention_column_share": "share", "feature_rank": "rank"}, tmp_path / "x")
    assert [axes.get_ylim()[1] >= 0.05 for axes in figures[0].axes] == [True, False]
    assert figures[0].axes[0].get_ylim()[0] == 0


def test_the_output_stands_apart_from_the_blocks(tmp_path: Path, figures: list[Figure]) -> None:
    """Of a network without blocks it is all there is, and no block 0 of others."""
    rows = [
        *layers("deep", "feature_rank", [1, 2, 3, 4]),
        *layers("flat", "feature_rank", [7]),
        *layers("broken", "feature_rank", [1, 2, None]),
    ]
    plots.plot_features(rows, ["deep", "flat", "broken"], {"feature_rank": "rank"}, tmp_path / "x")
    (axes,) = figures[0].axes
    drawn = [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines]
    assert drawn[:4] == [([0, 1, 2], [1, 2, 3]), ([3], [4]), ([], []), ([3], [7])]
    assert drawn[4:] == [([0, 1], [1, 2]), ([], [])]
    assert [label.get_text() for label in axes.get_xticklabels()][-2:] == ["2", "output"]


def test_a_pair_without_values_says_so_and_blocks_keep_their_numbers(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [
        *aligned("a", "half", [[None, 0.5, 0.5], [None, 0.2, 0.3]]),
        *aligned("a", "none", [[None, None]] * 2),
        Measurement("a", "cka", None, "", 0, other="failed", reason="its forward fails"),
    ]
    plots.plot_alignment(rows, "cka", tmp_path / "x")
    half, none, failed, _ = figures[0].axes
    (image,) = half.get_images()
    assert np.array_equal(
        np.ma.filled(image.get_array(), np.nan), [[np.nan, 0.5, 0.5], [np.nan, 0.2, 0.3]], equal_nan=True
    )
    assert [label.get_text() for label in half.get_xticklabels()] == ["0", "1", "output"]  # none runs into the next
    assert [label.get_text() for label in half.get_yticklabels()] == ["0", "output"]
    for axes in (none, failed):
        assert [text.get_text() for text in axes.texts] == ["not measured"]
        assert not axes.get_images()
        assert len(axes.get_xticks()) == 0


def test_a_model_without_attention_has_no_ticks_and_no_place_in_the_legend(
    tmp_path: Path, figures: list[Figure]
) -> None:
    """And a measure without values does not narrow the panel of the other."""
    rows = [*layers("a", "attention_entropy", [1.0] * 12), *layers("a", "head_similarity", [0.5] * 12)]
    measures = {"attention_entropy": "entropy", "attention_information": "information"}
    plots.plot_heads(rows, ["a", "none"], measures, tmp_path / "x")
    there, none = figures[0].axes[2:]
    assert there.get_xlim()[1] > 11
    assert len(there.get_xticks()) > 2
    assert len(none.get_xticks()) == 0
    plots.plot_layers(rows, ["none", "a"], {"head_similarity": "similarity"}, tmp_path / "y")
    assert [text.get_text() for text in figures[1].legends[0].get_texts()] == ["a"]
    (_, line) = figures[1].axes[0].lines
    assert line.get_color() == plots.COLOURS[1]
