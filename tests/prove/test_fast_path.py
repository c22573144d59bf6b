"""The fast path learns as the reference path does: loss curves of 200 steps, five seeds, a ViT and a SwinV2 in bf16.

`python -m pytest -m prove tests/prove/test_fast_path.py` writes docs/measurements/fast_path.json and .md, and
docs/images/fast_path.png.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor

import fdscale.students.swin_v2
from fdscale.bench.pairs import PAIRS, Pair
from fdscale.bench.plots import COLOURS, DPI, STYLE, WIDTH
from fdscale.bench.product import started
from fdscale.training.engine import Connection
from tests.prove.page import REPOSITORY, Page
from tests.prove.reference_attention import reference_attention

pytestmark = [pytest.mark.prove, pytest.mark.timeout(3000)]

STEPS, SEEDS, IMAGES, SIDE, SMOOTHED = 200, range(5), 16, 32, 10
BOTH = ("student", "teacher")
FAST, SLOW = "student.skip_dropped=true", "student.skip_dropped=false"  # and the attention is another one
SHAPES = {
    "ViT": ("vit_b16", "{embed_dim=64,depth=4,num_heads=2,patch_size=4}"),
    "SwinV2": ("swinv2_b", "{embed_dim=32,depths=[2,2,2],num_heads=[1,2,4],patch_size=2,window_size=4}"),
}

Curves = NDArray[np.float64]  # (seeds, steps)


def network(name: str) -> Pair:
    """A recipe's pair at 32 pixels, both networks of one shape."""
    pair, shape = SHAPES[name]
    numbers = (f"image_size={SIDE}", f"geometry={shape}")
    return PAIRS[pair].shrunk("optim.lr=1e-3", *(f"{of}.{number}" for of in BOTH for number in numbers))


def batches(seed: int) -> Iterator[Tensor]:
    """Digits as pixels (B, 3, 32, 32) in [0, 1], in an order of the seed's."""
    digits = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    for step in range(STEPS):
        rows = order[torch.arange(step * IMAGES, (step + 1) * IMAGES) % len(order)]
        yield F.interpolate(digits[rows], (SIDE, SIDE), mode="bilinear").expand(-1, 3, -1, -1).contiguous()


@contextmanager
def awake() -> Iterator[None]:
    """SwinV2's residual norms start at 1, so that every block counts from the first step on."""
    own, fdscale.students.swin_v2.RESIDUAL_NORM_WEIGHT = fdscale.students.swin_v2.RESIDUAL_NORM_WEIGHT, 1.0
    yield
    fdscale.students.swin_v2.RESIDUAL_NORM_WEIGHT = own


def losses(connection: Connection, name: str, seed: int, fast: bool) -> list[float]:
    """Of each step, by the fast path or by the reference's way with dropped branches."""
    settings = network(name).settings(IMAGES, f"seed={seed}", FAST if fast else SLOW)
    with awake():
        engine, step = started(settings, IMAGES, bf16=True, device=connection.device)
    found = [float(step(pixels)) for pixels in batches(seed)]
    engine.destroy()
    return found


def reference_losses(connection: Connection, name: str, seed: int) -> list[float]:
    """The same with the attention as it is written down."""
    with reference_attention():
        return losses(connection, name, seed, fast=False)


def curves(page: Page, name: str) -> tuple[Curves, Curves]:
    """Of the fast path and of the reference, smoothed over ten steps."""
    rows = [page.rows[f"{name}, seed {seed}"] for seed in SEEDS]
    window = np.ones(SMOOTHED) / SMOOTHED
    fast, slow = (
        np.stack([np.convolve(row[way], window, mode="valid") for row in rows]) for way in ("fast", "reference")
    )
    return fast, slow


@pytest.mark.parametrize("name", SHAPES)
def test_the_curves_differ_less_than_seeds_do(one_rank: Any, name: str) -> None:
    page = Page("fast_path", ("fdscale/students", "fdscale/training", "fdscale/distill", "fdscale/bench/product.py"))

    def measured(seed: int) -> dict[str, Any]:
        (fast,) = one_rank(losses, name, seed, True, timeout=600)
        (slow,) = one_rank(reference_losses, name, seed, timeout=600)
        return {"fast": [round(loss, 6) for loss in fast], "reference": [round(loss, 6) for loss in slow]}

    for seed in SEEDS:
        page.row(f"{name}, seed {seed}", lambda seed=seed: measured(seed))  # type: ignore[misc]
    done = [each for each in SHAPES if f"{each}, seed {SEEDS[-1]}" in page.rows]
    write(page, {each: curves(page, each) for each in done})
    fast, slow = curves(page, name)
    spread = slow.std(axis=0, ddof=1)
    assert slow[:, -1].mean() < 0.8 * slow[:, 0].mean(), "nothing was learned"
    assert (np.abs((fast - slow).mean(axis=0)) < spread).all()
    assert np.abs(fast - slow)[:, -1].mean() < spread[-1]


def write(page: Page, found: dict[str, tuple[Curves, Curves]]) -> None:
    page.write_table(
        "The fast path beside the reference path",
        HOW,
        COLUMNS,
        [line(name, *both) for name, both in found.items()],
    )
    plot(found)


HOW = f"""Losses of {STEPS} steps of {IMAGES} digits at {SIDE} px in bf16, {len(SEEDS)} seeds (of weights, order and
draws), each both ways. Fast: as a recipe trains, and what drop path drops left out. Reference: attention as it is
written down, its logits in fp32, everything computed. Means of {SMOOTHED} steps; ± the standard deviation between
seeds."""
COLUMNS = ("network", "loss at first", "fast, at last", "reference, at last", "mean difference", "most, of the spread")


def line(name: str, fast: Curves, slow: Curves) -> dict[str, str]:
    ends = [f"{each[:, -1].mean():.4f} ± {each[:, -1].std(ddof=1):.4f}" for each in (fast, slow)]
    difference = (fast - slow)[:, -1]
    most = (np.abs((fast - slow).mean(axis=0)) / slow.std(axis=0, ddof=1)).max()
    last = f"{difference.mean():+.5f} ± {difference.std(ddof=1):.5f}"
    return dict(zip(COLUMNS, (name, f"{slow[:, 0].mean():.4f}", *ends, last, f"{most:.2f}"), strict=True))


def plot(found: dict[str, tuple[Curves, Curves]]) -> None:
    """The curves of all seeds, and below them the mean difference inside the spread between seeds."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
        panels = figure.subplots(2, len(found), squeeze=False, sharex=True, height_ratios=(2, 1))
        for column, (name, (fast, slow)) in enumerate(found.items()):
            above, below = panels[:, column]
            steps = np.arange(SMOOTHED, STEPS + 1)
            for way, each, dashes in (("plain", slow, "-"), ("fdscale", fast, (0, (3, 2)))):
                above.plot(steps, each.T, color=COLOURS[way], ls=dashes, lw=0.8)
                above.plot([], [], color=COLOURS[way], ls=dashes, label="fast" if way == "fdscale" else "reference")
            above.set_title(f"{name}: loss, {len(slow)} seeds")
            above.set_yscale("log")
            above.yaxis.set_major_formatter("{x:g}")
            above.yaxis.set_minor_formatter("")
            above.legend(frameon=False)
            percent = 100 / slow.mean(axis=0)
            spread, difference = slow.std(axis=0, ddof=1) * percent, (fast - slow).mean(axis=0) * percent
            below.fill_between(steps, -spread, spread, color="#dddddd", label="± one deviation between seeds")
            most = f"fast - reference, mean: at most {np.abs(difference).max():.2g} % of the loss"
            below.plot(steps, difference, color=COLOURS["fdscale"], label=most)
            below.set_xlabel("step")
            below.set_ylabel("% of the loss")
            below.legend(frameon=False, fontsize=6)
        figure.savefig(REPOSITORY / "docs" / "images" / "fast_path.png", dpi=DPI)
