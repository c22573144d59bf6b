"""Which figures there are of what was measured, and how each is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from fdscale.diagnostics import plots
from fdscale.diagnostics.rows import Measurement
from fdscale.diagnostics.selection import Array, curves, models_in, of, pairs_in, surface

Maps = Mapping[str, Mapping[int, Array]]
"""Of each model the averaged attention map (W, n, n) of each block."""

DISTANCE = {"attention_distance": "attention distance (pixels)"}
INFORMATION = {
    "attention_entropy": "entropy (nats)",
    "attention_information": "normalised mutual\ninformation",
}
SIMILARITY = {"head_similarity": "head similarity (cosine)"}
SHAPE = {
    "attention_diagonality": "diagonality",
    "attention_offset_share": "share of the offset",
    "attention_column_share": "share of the column",
    "attention_on_prefix": "attention on\nprefix tokens",
}
FEATURES = {"feature_rank": "effective rank (dimensions)", "token_similarity": "token similarity (cosine)"}
LANDSCAPE = {"landscape_loss": "cross entropy (nats)", "landscape_accuracy": "accuracy"}
ALIGNMENT = "cka"


@dataclass(frozen=True)
class Picture:
    """A figure as `NAME.png` and `NAME.svg`: its title, one sentence on how to read it, and words in its place."""

    name: str
    title: str
    reading: str
    instead: str


def draw(rows: Sequence[Measurement], maps: Maps, folder: Path) -> list[Picture]:
    """Draw every figure that there are measurements for into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = list(_drawn(rows, maps, folder))
    return [Picture(name, *TOLD[name]) for name in TOLD if name in drawn]


def _drawn(rows: Sequence[Measurement], maps: Maps, folder: Path) -> Iterator[str]:
    """The names of the figures, each when it is drawn."""
    models = models_in(rows)
    for name, (plot, measures) in {
        "attention_distance": (plots.plot_heads, DISTANCE),
        "attention_information": (plots.plot_heads, INFORMATION),
        "head_similarity": (plots.plot_layers, SIMILARITY),
        "attention_shape": (plots.plot_layers, SHAPE),
        "features": (plots.plot_features, FEATURES),
    }.items():
        if there := {measure: label for measure, label in measures.items() if _any(rows, models, measure)}:
            plot(rows, models, there, folder / name)
            yield name
    if any(maps.get(model) for model in models):
        plots.plot_maps(rows, models, maps, folder / "attention_maps")
        yield "attention_maps"
    yield from _landscapes(rows, models, folder)
    if pairs_in(rows, ALIGNMENT) and _any(rows, models, ALIGNMENT):
        plots.plot_alignment(rows, ALIGNMENT, folder / "alignment")
        yield "alignment"


def _landscapes(rows: Sequence[Measurement], models: Sequence[str], folder: Path) -> Iterator[str]:
    lines = {measure: label for measure, label in LANDSCAPE.items() if any(_has_line(rows, measure, m) for m in models)}
    if lines:
        plots.plot_curves(rows, models, lines, folder / "landscape")
        yield "landscape"
    for measure, label in LANDSCAPE.items():
        if any(np.isfinite(surface(rows, model, measure)[2]).any() for model in models):
            name = measure.replace("landscape", "surface")
            plots.plot_surfaces(rows, models, measure, label, folder / name)
            yield name


def _has_line(rows: Sequence[Measurement], measure: str, model: str) -> bool:
    return len(curves(rows, model, measure)[0]) > 0


def _any(rows: Sequence[Measurement], models: Sequence[str], measure: str) -> bool:
    return any(map(partial(of, rows, measure=measure), models))


TOLD = {
    "attention_distance": (
        "Attention distance of every head",
        "A dot is a head: how far from its own place, in pixels of the image, a patch looks on average. Dots spread "
        "over many distances in the deep blocks are heads that do different things; dots that crowd together near the "
        "top are heads that all look everywhere. Distances grow with the side of a model's images, which the table "
        "tells: compare models of the same.",
        "Mean attention distance in pixels of each head against its block, one panel a model.",
    ),
    "head_similarity": (
        "How alike the heads of a block are",
        "The mean cosine similarity of the attention maps of any two heads of a block: at 1 they all look at the same "
        "places, and more heads bring nothing new; lower is more diverse.",
        "Head similarity against block, one line a model.",
    ),
    "attention_maps": (
        "Averaged attention maps",
        "Row: the patch that looks; column: the patch that is looked at; patches are numbered line by line. A bright "
        "diagonal, and lines beside it, are patches that look at their neighbours; bright columns are a few places "
        "that every patch looks at, whatever it is. Windowed networks show the mean over their windows.",
        "Attention maps averaged over images and heads, of the first, a middle and the last block of each model.",
    ),
    "attention_shape": (
        "What the averaged maps are made of",
        "Diagonality is 1 where each patch sees itself alone and 0 where it sees all equally. The two shares say how "
        "much of a map is explained by the offset between two patches alone (bands: translation-invariant, as a "
        "convolution), and by the patch looked at alone (columns); they mean little where a map is nearly uniform, its "
        "information near 0. Prefix tokens are CLS and registers.",
        "Diagonality and the shares of the averaged attention maps against block, one line a model.",
    ),
    "attention_information": (
        "Attention entropy and information",
        "A dot is a head. Entropy is high where attention is spread over many patches. Mutual information is 0 where "
        "all patches look at the same places (collapse) and rises as where a head looks depends on who looks.",
        "Attention entropy and normalised mutual information of each head against its block, one panel a model.",
    ),
    "landscape": (
        "Loss and accuracy around the weights",
        "Each thin line is one random direction, each filter's step as long as its weights (Li et al., 2018); the "
        "thick line is their mean, with five directions or more in a band, the mean's 95 % interval. The wider and "
        "flatter the valley around 0, the less the network minds that its weights are disturbed. A head fitted to "
        "these images tells how well these few can be told apart, and stays as it is while the network moves: compare "
        "models under heads of the same kind.",
        "Cross entropy and accuracy against the distance from the trained weights, one colour a model.",
    ),
    "surface_loss": (
        "Loss in a plane around the weights",
        "Contours of the cross entropy along two random directions, the trained weights at the cross; all panels have "
        "one scale. Contours far apart are a flat minimum; grey is where the loss is no number. Compare models under "
        "heads of the same kind, as above.",
        "Contours of the cross entropy in a plane, one panel a model.",
    ),
    "surface_accuracy": (
        "Accuracy in the same plane",
        "As above, in images classified correctly: the larger the bright area around the cross, the flatter.",
        "Contours of the accuracy in a plane, one panel a model.",
    ),
    "features": (
        "Rank and likeness of the features",
        "Effective rank is how many dimensions the patch tokens of a block fill; token similarity is how alike the "
        "patches of one image are, 1 where they have collapsed into one. The network's output, after its final norm, "
        "stands apart, behind the blocks of all models.",
        "Effective rank and token similarity against block, one line a model.",
    ),
    "alignment": (
        "Which layers of two models resemble each other",
        "Centred kernel alignment of every block of the one with every block of the other, on the same images: 1 where "
        "they tell images apart alike. A bright diagonal is two networks that build up features in step; where it "
        "darkens, they part; grey has no value. All are compared with the first model, which is compared with itself.",
        "Heat maps of centred kernel alignment between the blocks of the first model and of each.",
    ),
}
