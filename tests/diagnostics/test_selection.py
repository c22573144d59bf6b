"""Arrays and summaries of rows that are written by hand."""

from __future__ import annotations

import numpy as np

from fdscale.diagnostics.report import missing_sentences, summary_table
from fdscale.diagnostics.rows import Measurement
from fdscale.diagnostics.selection import (
    by_layer,
    compared,
    curves,
    few,
    images_in,
    last_third,
    layer_means,
    models_in,
    pairs_in,
    reasons,
    surface,
)
from fdscale.diagnostics.summary import summary


def row(measure: str, value: float | None, model: str = "a", **place: object) -> Measurement:
    return Measurement(model, measure, value, "", 5, **place)  # type: ignore[arg-type]


HEADS = [
    row("attention_distance", 10.0 * layer + head, layer=layer, head=head) for layer in range(4) for head in (2, 4)
]
LINES = [
    row("landscape_loss", 1.0 + direction + at * at, direction=direction, at=(at,))
    for direction in (0, 1)
    for at in (1.0, 0.0, -1.0)
]
PLANE = [row("landscape_loss", x + 10 * y, at=(x, y)) for x in (0.0, 1.0) for y in (0.0, 1.0, 2.0)]


def test_layers_come_in_order_with_the_values_of_their_heads() -> None:
    layers, values = by_layer(HEADS[::-1], "a", "attention_distance")
    assert layers.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert values.tolist() == [2, 4, 12, 14, 22, 24, 32, 34]
    assert [part.tolist() for part in layer_means(HEADS, "a", "attention_distance")] == [[0, 1, 2, 3], [3, 13, 23, 33]]
    assert by_layer(HEADS, "b", "attention_distance")[1].tolist() == []


def test_the_last_third_is_rounded_up() -> None:
    found = last_third(HEADS, "a", "attention_distance")
    assert [(layer, values.tolist()) for layer, values in found] == [(2, [22, 24]), (3, [32, 34])]
    assert last_third([], "a", "attention_distance") == []


def test_lines_and_planes_are_told_apart() -> None:
    where, values = curves([*LINES, *PLANE], "a", "landscape_loss")
    assert where.tolist() == [-1, 0, 1]
    assert values.tolist() == [[2, 1, 2], [3, 2, 3]]
    across, along, plane = surface([*LINES, *PLANE[:-1]], "a", "landscape_loss")
    assert (across.tolist(), along.tolist()) == ([0, 1], [0, 1, 2])
    assert np.array_equal(plane, [[0, 1], [10, 11], [20, np.nan]], equal_nan=True)


def test_compared_layers_are_a_matrix() -> None:
    rows = [row("cka", 0.1 * a + b, layer=a, other="b", other_layer=b) for a in range(2) for b in range(3)]
    assert pairs_in(rows, "cka") == [("a", "b")]
    assert np.allclose(compared(rows, "a", "b", "cka"), [[0, 1, 2], [0.1, 1.1, 2.1]])


def test_what_was_compared_without_a_value_keeps_its_place() -> None:
    """A broken model's layers have no value; the others keep their numbers."""
    rows = [row("cka", 0.5, layer=2, other="b", other_layer=1), row("cka", None, layer=0, other="b", other_layer=2)]
    rows += [row("cka", 1.0, layer=5, other="c", other_layer=0), row("cka", None, other="d", reason="failed")]
    shown = np.full((3, 3), np.nan)
    shown[2, 1] = 0.5
    assert np.array_equal(compared(rows, "a", "b", "cka"), shown, equal_nan=True)
    assert compared(rows, "a", "d", "cka").size == 0


def test_a_comparison_without_a_value_is_told_of_both() -> None:
    rows = [row("cka", None, other="b", reason="its layers are NaN"), row("cka", None, other="c", reason="too few")]
    assert missing_sentences(rows) == [
        "a: cka with b not measured: its layers are NaN",
        "a: cka with c not measured: too few",
    ]


def test_a_plane_keeps_its_places_without_values() -> None:
    rows = [row("landscape_loss", y if x else None, at=(x, y)) for x in (-1.0, 0.0, 1.0) for y in (-1.0, 0.0, 1.0)]
    across, along, values = surface(rows, "a", "landscape_loss")
    assert (across.tolist(), along.tolist()) == ([-1, 0, 1], [-1, 0, 1])
    assert np.array_equal(np.isnan(values), [[False, True, False]] * 3)


def test_images_of_the_landscape_are_counted_apart() -> None:
    rows = [row("feature_rank", 1.0), Measurement("a", "sharpness", 1.0, "", 3), Measurement("b", "cka", 1.0, "", 9)]
    assert images_in(rows) == (9, 3)
    assert images_in(rows, "a") == (5, 3)
    assert images_in(rows[1:2]) == (0, 3)


def test_a_fitted_head_is_told_with_its_accuracy() -> None:
    rows = [
        row("landscape_accuracy", 0.75, model, direction=0, at=(0.0,), classifier=kind)
        for model, kind in (("a", "run"), ("b", "fitted"), ("c", None))
    ]
    told = {line.title: line.told for line in summary(rows)}
    assert told["classifier of the landscape"] == {"a": "its own head", "b": "head fitted to these images", "c": ""}
    assert told["accuracy, undisturbed"] == {"a": "0.750", "b": "", "c": "0.750"}
    assert told["accuracy on these images (head fitted to them)"] == {"a": "", "b": "0.750", "c": ""}


def test_an_output_without_a_value_is_not_told_as_the_last_block() -> None:
    rows = [
        row("feature_rank", 3.0, layer=0),
        row("feature_rank", None, layer=1),
        row("feature_rank", 4.0, "b", layer=1),
    ]
    (told,) = (line.told for line in summary(rows) if line.title == "effective rank of the output")
    assert told == {"a": "", "b": "4.0"}


def test_reasons_are_told_once_whatever_the_layer() -> None:
    rows = [
        row("attention_entropy", None, layer=0, reason="layer 0: no number"),
        row("attention_entropy", None, layer=1, reason="layer 1: no number"),
        row("landscape", None, reason="a: no number"),
        row("landscape", None, model="b", reason="no labels"),
        row("feature_rank", 1.0),
    ]
    assert list(reasons(rows)) == [
        ("a", "no number", ["attention_entropy", "landscape"]),
        ("b", "no labels", ["landscape"]),
    ]
    assert missing_sentences(rows)[1] == "b: landscape not measured: no labels"


def test_many_measures_are_told_as_few() -> None:
    assert few(["a", "b", "c"]) == "a, b, c"
    assert few(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


def test_the_summary_is_of_the_last_third_and_the_centre() -> None:
    told = {
        line.title: line.told
        for line in summary(
            [
                *HEADS,
                *LINES,
                row("sharpness", 7.0, direction=0),
                row("sharpness", 5.0, low=4.0, high=6.0),
                row("attention_diagonality", -1e-9, layer=0),
                row("feature_rank", 9.0, model="b", layer=0),
                row("feature_rank", 12.0, model="b", layer=1),
            ]
        )
    }
    assert told["attention distance"] == {"a": "28.0", "b": ""}
    assert told["its spread over the heads of a block"]["a"] == "1.0"
    assert told["sharpness (95 % interval over directions)"]["a"] == "5 (4 to 6)"
    assert told["cross entropy, undisturbed"]["a"] == "1.000"
    assert "cross entropy on these images (head fitted to them)" not in told
    assert told["diagonality of the averaged maps"]["a"] == "0.000"
    assert told["effective rank of the output"] == {"a": "", "b": "12.0"}
    assert told["images"] == {"a": "5", "b": "5"}
    assert told["images of the landscape"] == {"a": "5", "b": ""}
    assert "head similarity" not in told


def test_the_table_has_a_column_a_model() -> None:
    rows = [*HEADS, row("feature_rank", 1.0, model="[b]", layer=0)]
    assert models_in(rows) == ["a", "[b]"]
    assert [str(column.header) for column in summary_table(rows).columns] == ["", "a", "[b]", "unit"]
