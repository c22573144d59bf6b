"""Rendered scenes of which every pixel is known: three backgrounds, five kinds of things, textures, overlaps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

STUFF = {"sky": (150, 190, 230), "grass": (95, 140, 70), "water": (50, 95, 150)}
THINGS = {"disc": (205, 65, 60), "square": (235, 185, 60), "triangle": (150, 75, 170), "ring": (225, 130, 60)}
THINGS |= {"star": (240, 235, 220)}
SMALLEST, LARGEST = 24 / 128, 64 / 128  # of the image's longer side
HIDDEN = 0.5  # share of a thing that others may cover
PILE = "disc"  # what a crowd is made of


@dataclass(frozen=True)
class Thing:
    """What is seen of one thing: `kind` among THINGS, `mask` bool (h, w); `crowd`: a pile of small ones."""

    kind: str
    mask: NDArray[np.bool_]
    crowd: bool


@dataclass(frozen=True)
class Scene:
    """`image` uint8 (h, w, 3), `stuff` uint8 (h, w), numbers in STUFF of what is behind all things, and the things."""

    image: NDArray[np.uint8]
    stuff: NDArray[np.uint8]
    things: tuple[Thing, ...]


def render(number: int, size: int, seed: int) -> Scene:
    """Scene `number` of a seed; its longer side has `size` pixels, and its shape changes from scene to scene.

    The second of each ten has no things, and the fifth a crowd.
    """
    draw = np.random.default_rng([seed, number])
    short = size * 3 // 4
    height, width = ((size, size), (short, size), (size, short))[number % 3]
    image, stuff = _background(height, width, draw)
    masks: list[tuple[str, NDArray[np.bool_], bool]] = []
    if number % 10 != 1:
        if number % 10 == 4:
            masks.append((PILE, _pile(height, width, size, draw), True))
        for _ in range(int(draw.integers(2, 6))):
            _add(masks, height, width, size, draw)
    for kind, mask, _ in masks:
        image[mask] = _surface(THINGS[kind], height, width, draw)[mask]
    seen = zip(masks, _visible([mask for _, mask, _ in masks]), strict=True)
    things = tuple(Thing(kind, mask, crowd) for (kind, _, crowd), mask in seen)
    return Scene(image.clip(0, 255).astype(np.uint8), stuff, things)


def _background(height: int, width: int, draw: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """Sky over grass, in half of the scenes with a pond in it."""
    rows, columns = np.mgrid[:height, :width]
    horizon = draw.uniform(0.3, 0.6) * height + draw.uniform(-0.1, 0.1) * (columns - width / 2)
    stuff = (rows > horizon).astype(np.uint8)
    if draw.random() < 0.5:
        middle = draw.uniform(0.2, 0.8) * width, draw.uniform(0.75, 0.95) * height
        radii = draw.uniform(0.3, 0.6) * width, draw.uniform(0.1, 0.25) * height
        pond = ((columns - middle[0]) / radii[0]) ** 2 + ((rows - middle[1]) / radii[1]) ** 2 < 1
        stuff[pond & (stuff == 1)] = 2
    waves = np.sin(rows / draw.uniform(1.0, 2.0) + columns / 15)[..., None]
    light = np.linspace(-25, 25, height)[:, None, None]
    textures = (light + _noise(height, width, 4, draw), _noise(height, width, 30, draw), 22 * waves)
    image = np.empty((height, width, 3))
    for label, (colour, texture) in enumerate(zip(STUFF.values(), textures, strict=True)):
        painted = _near(colour, draw) + texture + np.zeros((height, width, 3))
        image[stuff == label] = painted[stuff == label]
    return image, stuff


def _surface(colour: tuple[int, int, int], height: int, width: int, draw: np.random.Generator) -> NDArray[np.float64]:
    """A coloured surface with grain, lit from one side."""
    light = np.linspace(-1, 1, width)[None, :, None] * draw.uniform(-30, 30)
    return _near(colour, draw) + light + _noise(height, width, 10, draw)


def _near(colour: tuple[int, int, int], draw: np.random.Generator) -> NDArray[np.float64]:
    return np.array(colour) + draw.uniform(-30, 30, 3)


def _noise(height: int, width: int, strength: float, draw: np.random.Generator) -> NDArray[np.float64]:
    return draw.normal(0, strength, (height, width, 1))


def _add(
    masks: list[tuple[str, NDArray[np.bool_], bool]], height: int, width: int, size: int, draw: np.random.Generator
) -> None:
    """One more thing on top, where it leaves enough to see of the others; else none."""
    kind = str(draw.choice(list(THINGS)))
    radius = draw.uniform(SMALLEST, LARGEST) * size / 2
    centre = draw.uniform(0.5 * radius, width - 0.5 * radius), draw.uniform(0.5 * radius, height - 0.5 * radius)
    mask = _shape(kind, height, width, centre, radius, draw.uniform(0, 2 * math.pi))
    together = [*(other for _, other, _ in masks), mask]
    enough = zip(together, _visible(together), strict=True)
    if all(seen.any() and seen.sum() >= (1 - HIDDEN) * whole.sum() for whole, seen in enough):
        masks.append((kind, mask, False))


def _visible(masks: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_]]:
    """What is seen of each, where the later ones lie on top."""
    seen: list[NDArray[np.bool_]] = []
    for mask in masks:
        seen = [below & ~mask for below in seen] + [mask]
    return seen


def _shape(
    kind: str, height: int, width: int, centre: tuple[float, float], radius: float, angle: float
) -> NDArray[np.bool_]:
    canvas = Image.new("1", (width, height))
    pen = ImageDraw.Draw(canvas)
    if kind in ("disc", "ring"):
        pen.ellipse(_around(centre, radius), fill=1)
        if kind == "ring":
            pen.ellipse(_around(centre, 0.5 * radius), fill=0)
    else:
        corners, inner = {"square": (4, None), "triangle": (3, None), "star": (5, 0.45)}[kind]
        turns = 2 * corners if inner else corners
        radii = [radius * inner if inner and turn % 2 else radius for turn in range(turns)]
        angles = [angle + 2 * math.pi * turn / turns for turn in range(turns)]
        points = zip(radii, angles, strict=True)
        pen.polygon([(centre[0] + r * math.cos(a), centre[1] + r * math.sin(a)) for r, a in points], fill=1)
    return np.array(canvas)


def _around(centre: tuple[float, float], radius: float) -> tuple[float, float, float, float]:
    return centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius


def _pile(height: int, width: int, size: int, draw: np.random.Generator) -> NDArray[np.bool_]:
    """Many small discs side by side."""
    pile = np.zeros((height, width), bool)
    middle = draw.uniform(0.3, 0.7, 2) * (width, height)
    for offset in draw.normal(0, 0.12 * size, (12, 2)):
        centre = (middle + offset).clip(0, (width - 1, height - 1))
        pile |= _shape("disc", height, width, (float(centre[0]), float(centre[1])), 0.035 * size, 0.0)
    return pile
