"""Whether a classifier's file fits the head that the settings describe; torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fdscale.config.settings import FinetuneSettings, HeadSettings

Shapes = Mapping[str, tuple[int, ...]]
NORM, LINEAR = "fc_norm.weight", "head.weight"
EARLIER = "the classifier.safetensors of an earlier fine-tuning"


def head_problems(settings: FinetuneSettings, width: int | None) -> Iterator[str]:
    """What is wrong with `head.weights`, one sentence each; `width` is the student's, None where it is not known."""
    head = settings.head
    if head.weights is None:
        if head.keep == "norm":
            yield 'head.keep: got "norm" without head.weights; name a classifier.safetensors, or leave it out'
        return
    try:
        shapes = _shapes(Path(head.weights))
    except (OSError, SafetensorError) as error:
        yield f"head.weights: {head.weights} cannot be read ({error}); allowed: {EARLIER}"
        return
    if LINEAR not in shapes:
        yield f"head.weights: {head.weights} holds {', '.join(sorted(shapes)[:3])}; allowed: {EARLIER}"
        return
    yield from _disagreements(settings, shapes[LINEAR], NORM in shapes, width)


def _disagreements(
    settings: FinetuneSettings, linear: tuple[int, ...], has_norm: bool, width: int | None
) -> Iterator[str]:
    head, (classes, theirs) = settings.head, linear
    if width not in (None, theirs):
        yield f"head.weights: {head.weights} is of a student {theirs} wide, this one is {width} wide: another student's"
    if has_norm != (head.norm == "after_pooling"):
        other = "after_pooling" if has_norm else "student"
        yield f'head.weights: {head.weights} is of a head with head.norm="{other}"; set that, or leave head.weights out'
    elif head.keep == "norm" and not has_norm:
        yield f'head.keep: with head.norm="{head.norm}" the head has no norm of its own; leave head.weights out'
    if head.keep == "all" and classes != settings.classes:
        remedy = _without_linear(head, has_norm)
        yield f"classes: got {settings.classes}, but {head.weights} has {classes}: for a new linear layer {remedy}"


def _without_linear(head: HeadSettings, has_norm: bool) -> str:
    return 'set head.keep="norm"' if has_norm and head.norm == "after_pooling" else "leave head.weights out"


def _shapes(file: Path) -> Shapes:
    with safe_open(file, "numpy") as held:
        return {name: tuple(held.get_slice(name).get_shape()) for name in held.keys()}  # noqa: SIM118 (no mapping)
