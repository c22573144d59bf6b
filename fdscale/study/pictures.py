"""Which figures the report has, drawn from results and from the measurements beside the runs. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fdscale.diagnostics.rows import Measurement, read_rows
from fdscale.diagnostics.selection import Array, by_layer, curves, layer_means
from fdscale.study.claims import ACCURACY, INGREDIENTS, RESULT, SEPARABILITY, judged
from fdscale.study.results import Result, by_seed
from fdscale.study.tasks import AFTER, BEFORE, FULL, SCRATCH, TEACHER, TEACHERS

BY_LAYER = {
    "head_similarity": "head similarity",
    "attention_diagonality": "diagonality",
    "attention_offset_share": "share of the offset",
    "attention_column_share": "share of the column",
}
BOUNDED = ("head similarity", "share of the offset", "share of the column")  # by 0 and 1
NAMES = {BEFORE: "teacher (before)", AFTER: "distilled (after)", SCRATCH: "random weights"}
Diagnosed = Mapping[str, Sequence[Sequence[Measurement]]]
"""For each teacher the measurements of each seed."""


@dataclass(frozen=True)
class Picture:
    """A figure: `NAME.png` and `NAME.svg` in the figures' folder, how it is read, and words in its place."""

    name: str
    reading: str
    instead: str


def draw(results: Sequence[Result], runs: Path, folder: Path) -> dict[str, Picture]:
    """Draw every figure that there are numbers for; returns them by name."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        of: [
            read_rows(runs / row.task / "measurements.jsonl")
            for row in results
            if (row.kind, row.of) == ("diagnose", of)
        ]
        for of in TEACHERS
    }
    drawn = list(_of_results(results, folder))
    if all(found.values()):
        drawn += [*_of_measurements(found, folder), *_of_maps(results, runs, found, folder)]
    return {picture.name: picture for picture in drawn}


def _of_results(results: Sequence[Result], folder: Path) -> Iterator[Picture]:
    from fdscale.study import plots

    scratch = {"random\nweights": _percent(results, "", SCRATCH)}
    groups = [
        {f"{of}\nteacher": _percent(results, of, TEACHER), "distilled\nfrom it": _percent(results, of, FULL)}
        for of in TEACHERS
    ]
    plots.plot_accuracies(
        scratch, groups, "held-out images told right,\nfine-tuned on few labels (%)", folder / "accuracy"
    )
    yield Picture("accuracy", READING["accuracy"], "Fine-tuned accuracy of each network, a dot a seed.")
    lines = [
        plots.Paired(f"{claim.sentence}: {of}", number, list(found.differences.values()), claim.sign)
        for claim in (*RESULT, *INGREDIENTS, *SEPARABILITY)
        for number, of in enumerate(TEACHERS)
        if (found := judged(claim, results, of)) is not None
    ]
    plots.plot_differences(lines, "difference between runs of one seed (points of accuracy)", folder / "differences")
    yield Picture("differences", READING["differences"], "Paired differences with their 95 % intervals.")


def _percent(results: Sequence[Result], of: str, network: str) -> dict[int, float]:
    return {seed: 100 * value for seed, value in by_seed(results, "finetune", of, network, ACCURACY).items()}


def _of_measurements(found: Diagnosed, folder: Path) -> Iterator[Picture]:
    from fdscale.study import plots

    heads = {
        of: {
            name: _joined([by_layer(rows, model, "attention_distance") for rows in seeds])
            for model, name in NAMES.items()
            if model != SCRATCH  # six panels are too many
        }
        for of, seeds in found.items()
    }
    plots.plot_heads(heads, "attention distance (pixels)", folder / "heads")
    yield Picture("heads", READING["heads"], "Attention distance of every head against its block.")
    layers = {
        f"{of} teacher": {
            label: {
                name: _stacked([layer_means(rows, model, measure) for rows in seeds]) for model, name in NAMES.items()
            }
            for measure, label in BY_LAYER.items()
        }
        for of, seeds in found.items()
    }
    plots.plot_lines(layers, "block", folder / "attention", BOUNDED)
    yield Picture("attention", READING["attention"], "Head similarity and the shape of averaged maps against block.")
    lines = {
        f"{of} teacher": {name: _stacked([_rise(rows, model) for rows in seeds]) for model, name in NAMES.items()}
        for of, seeds in found.items()
    }
    plots.plot_lines(
        {"rise of the cross entropy (nats)": lines}, "distance along random directions", folder / "landscape"
    )
    yield Picture(
        "landscape", READING["landscape"], "Rise of the cross entropy against the distance from the trained weights."
    )


def _of_maps(results: Sequence[Result], runs: Path, found: Diagnosed, folder: Path) -> Iterator[Picture]:
    """The averaged attention maps of the first seed, as far as they are finite."""
    from fdscale.diagnostics.plots import plot_maps

    rows: list[Measurement] = []
    maps: dict[str, dict[int, Array]] = {}
    for of in TEACHERS:
        task = next(row.task for row in results if (row.kind, row.of) == ("diagnose", of))
        names = {BEFORE: f"{of} teacher", AFTER: f"student of the {of} teacher"}
        rows += [replace(row, model=names[row.model]) for row in found[of][0] if row.model in names]
        with np.load(runs / task / "maps.npz") as stored:
            for key in stored.files:
                model, _, block = key.partition("/")
                if model in names and np.isfinite(stored[key]).all():
                    maps.setdefault(names[model], {})[int(block)] = stored[key]
    if maps:
        plot_maps(rows, list(maps), maps, folder / "maps")
        yield Picture("maps", READING["maps"], "Averaged attention maps of first, middle and last block.")


def _joined(parts: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _stacked(parts: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """All places (X,), and a line for each seed (S, X), NaN where it has no value."""
    places = np.unique(np.concatenate([where for where, _ in parts]))
    lines = np.full((len(parts), len(places)), np.nan)
    for line, (where, values) in zip(lines, parts, strict=True):
        line[np.searchsorted(places, where)] = values
    return places, lines


def _rise(rows: Sequence[Measurement], model: str) -> tuple[Array, Array]:
    """Distances (X,) and how much more than at the centre the loss is there (X,), a mean over directions."""
    where, values = curves(rows, model, "landscape_loss")
    if 0.0 not in where:
        return np.empty(0), np.empty(0)
    line = values.mean(axis=0)
    return where, line - line[where == 0.0]


READING = {
    "accuracy": "A small dot is a seed, a grey line joins runs of one seed, the large marker is their "
    "mean with its 95 % interval; the two scales differ. Students have the size of their teachers, and were given no "
    "label before fine-tuning; but the supervised teacher's features, which its students learn, come from labels.",
    "differences": "Small markers are seeds, the large one is their mean with its 95 % interval. Shaded is "
    "the side of zero that the paper expects: on the right the distilled student is better than its teacher, or with "
    "the ingredient than without; a linear probe of the student is expected on the left, below its teacher's.",
    "heads": "A dot is a head of one of the seeds: how far from its own place a patch looks on average. Dots that are "
    "spread over many distances are heads that do different things; the line is their mean.",
    "attention": "Lines are means over seeds, bands their 95 % intervals. Lower head similarity is more diverse heads; "
    "diagonality and the shares say what the attention maps, averaged over images, are made of. Random weights are "
    "those of the student before its distillation.",
    "maps": "One seed. Row: the patch that looks; column: the patch that is looked at, numbered line by line. A bright "
    "diagonal and lines beside it are patches that look at their neighbours, bright columns a few places that every "
    "patch looks at.",
    "landscape": "How much the loss of the fine-tuned networks on held-out images rises when their weights are moved "
    "along random filter-normalised directions (Li et al., 2018): mean over directions and seeds, the band is the 95 % "
    "interval over seeds. The loss of the trained weights is taken off each line. The wider the valley, the flatter.",
}
