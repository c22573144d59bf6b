"""What a dense network says, drawn on its image: classes of pixels, objects; beside the truth, with a legend."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fdscale.data.dense.ade20k import IGNORED
from fdscale.data.dense.masks import draw_masks

READABLE = 512  # pixels of the longer side, up to which images are enlarged
COVER = 0.5  # of a class's colour over its pixels
GOLDEN_ANGLE = 0.381966  # of a circle of hues: the next colour is far from all before it
SATURATIONS, VALUES = (0.9, 0.55, 1.0), (0.95, 0.65, 1.0, 0.5, 0.8)  # in turn: hues come near each other again
INK, PAPER, UNKNOWN = (20, 20, 20), (255, 255, 255), (128, 128, 128)

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def colour(label: int) -> Colour:
    """The colour of a class, whatever their number."""
    saturation, value = SATURATIONS[label % len(SATURATIONS)], VALUES[label % len(VALUES)]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(label * GOLDEN_ANGLE % 1, saturation, value))
    return red, green, blue


def segmentation_overlay(image: Tensor, prediction: Tensor, truth: Tensor | None, names: Sequence[str]) -> Image.Image:
    """Classes on an image, predicted beside true ones, above a legend of those that are there.

    `image` uint8 (3, h, w); `prediction` and `truth` (h, w) labels from 0, 255 grey; `names` by label. Small images
    are enlarged.
    """
    given = {"prediction": prediction} if truth is None else {"truth": truth, "prediction": prediction}
    labels = {title: _array(values) for title, values in given.items()}
    pixels = _array(image).transpose(1, 2, 0)
    factor = _enlargement(pixels)
    panels = {title: Image.fromarray(_painted(pixels, values, factor)) for title, values in labels.items()}
    present = sorted({int(label) for values in labels.values() for label in np.unique(values)})
    entries = [("unlabelled", UNKNOWN) if label == IGNORED else (names[label], colour(label)) for label in present]
    return _above(beside(panels), _legend(entries, sum(panel.width for panel in panels.values())))


def detection_overlay(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    scores: Tensor | None,
    masks: Tensor | Sequence[Any] | None,
    names: Sequence[str],
) -> Image.Image:
    """Objects on an image: masks see-through with an outline, boxes, names, and scores where there are any.

    `image` uint8 (3, h, w); `boxes` (n, 4) x1, y1, x2, y2 in its pixels; `labels` (n,) from 0; `scores` (n,);
    `masks` (n, h, w) of 0 and 1, or n RLE; `names` by label. The best lie on top. Small images are enlarged.
    """
    pixels = _array(image).transpose(1, 2, 0)
    factor = _enlargement(pixels)
    canvas = _enlarged(pixels, factor)
    order = list(range(len(boxes))) if scores is None else np.argsort(_array(scores), kind="stable").tolist()
    shapes = _shapes(masks, pixels.shape[0], pixels.shape[1])
    if shapes is not None:
        for place in order:
            _cover(canvas, _enlarged(shapes[place], factor) > 0, colour(int(labels[place])), COVER)
    drawn = Image.fromarray(canvas)
    for place in order:
        score = "" if scores is None else f" {float(scores[place]):.2f}"
        label = int(labels[place])
        _box(drawn, _array(boxes[place]) * factor, f"{names[label]}{score}", colour(label))
    return drawn


def beside(panels: Mapping[str, Image.Image]) -> Image.Image:
    """Pictures side by side, each under its title."""
    font = _font(next(iter(panels.values())).size)
    gap = _line(font)
    sheet = Image.new(
        "RGB",
        (sum(panel.width for panel in panels.values()) + gap * (len(panels) - 1), gap + _tallest(panels)),
        PAPER,
    )
    pen, left = ImageDraw.Draw(sheet), 0
    for title, panel in panels.items():
        pen.text((left + gap // 4, gap // 2), title, INK, font, anchor="lm")
        sheet.paste(panel, (left, gap))
        left += panel.width + gap
    return sheet


def _painted(pixels: NDArray[np.uint8], labels: NDArray[Any], factor: int) -> NDArray[np.uint8]:
    canvas, labels = _enlarged(pixels, factor), _enlarged(labels, factor)
    for label in np.unique(labels).tolist():
        if label == IGNORED:
            _cover(canvas, labels == label, UNKNOWN, 0.8)
        else:
            _cover(canvas, labels == label, colour(label), COVER)
    return canvas


def _cover(canvas: NDArray[np.uint8], mask: NDArray[np.bool_], tint: Colour, share: float) -> None:
    """A see-through colour on the mask, and its outline within it in the full one."""
    canvas[mask] = ((1 - share) * canvas[mask] + share * np.array(tint)).astype(np.uint8)
    inside = mask
    for _ in range(_stroke(canvas.shape[1], canvas.shape[0])):
        around = np.pad(inside, 1, mode="edge")
        inside = inside & around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    canvas[mask & ~inside] = tint


def _box(drawn: Image.Image, box: NDArray[Any], text: str, tint: Colour) -> None:
    """A box with its text above, or below its upper edge where the image ends; always within the image."""
    pen, font = ImageDraw.Draw(drawn), _font(drawn.size)
    stroke, line = _stroke(*drawn.size), _line(font)
    x1, y1, x2, y2 = (float(value) for value in box)
    pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=tint, width=stroke)
    width = pen.textlength(text, font) + line // 2
    left = min(max(0.0, x1), max(0.0, drawn.width - width))
    top = y1 - line if y1 >= line else min(max(0.0, y1), drawn.height - line)
    pen.rectangle((left, top, left + width, top + line), fill=tint)
    pen.text((left + line // 4, top + line / 2), text, _readable_on(tint), font, anchor="lm")


def _legend(entries: Sequence[tuple[str, Colour]], width: int) -> Image.Image:
    """Names with their colours, in as many lines as they need."""
    font = _font((width // 2, width // 2))
    line = _line(font)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    places, x, y = [], line // 4, line // 4
    for name, _ in entries:
        taken = int(line * 1.75 + measure.textlength(name, font))
        if x + taken > width and x > line // 4:
            x, y = line // 4, y + int(1.25 * line)
        places.append((x, y))
        x += taken
    legend = Image.new("RGB", (width, y + int(1.25 * line)), PAPER)
    pen = ImageDraw.Draw(legend)
    for (name, tint), (x, y) in zip(entries, places, strict=True):
        pen.rectangle((x, y, x + line, y + line), fill=tint, outline=INK)
        pen.text((x + int(1.25 * line), y + line / 2), name, INK, font, anchor="lm")
    return legend


def _above(upper: Image.Image, lower: Image.Image) -> Image.Image:
    sheet = Image.new("RGB", (max(upper.width, lower.width), upper.height + lower.height), PAPER)
    sheet.paste(upper, (0, 0))
    sheet.paste(lower, (0, upper.height))
    return sheet


def _shapes(masks: Tensor | Sequence[Any] | None, height: int, width: int) -> NDArray[Any] | None:
    if masks is None or isinstance(masks, Tensor):
        return None if masks is None else _array(masks)
    return draw_masks(masks, height, width, "a mask to draw")


def _array(values: Tensor) -> NDArray[Any]:
    found: NDArray[Any] = values.detach().cpu().numpy()
    return found


def _enlargement(pixels: NDArray[np.uint8]) -> int:
    return max(1, -(-READABLE // max(pixels.shape[:2])))


def _enlarged(values: NDArray[Any], factor: int) -> NDArray[Any]:
    return values.repeat(factor, axis=0).repeat(factor, axis=1)


def _stroke(width: int, height: int) -> int:
    return max(2, round(max(width, height) / 500))


def _font(size: tuple[int, int]) -> Font:
    return ImageFont.load_default(max(13, round(max(size) / 45)))


def _line(font: Font) -> int:
    _, top, _, bottom = font.getbbox("Ag|")
    return round(1.4 * (bottom - top))


def _tallest(panels: Mapping[str, Image.Image]) -> int:
    return max(panel.height for panel in panels.values())


def _readable_on(tint: Colour) -> Colour:
    red, green, blue = tint
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else PAPER
