"""What the folders and JSONs of dense tasks hold, and whether the recipe fits them; torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from math import log2
from pathlib import Path
from typing import Any

from fdscale.config.dense_settings import (
    DetectSettings,
    SegmentBackboneSettings,
    SegmentDataSettings,
    SegmentEvalSettings,
    SegmentHeadSettings,
    SegmentSettings,
)
from fdscale.config.errors import UserError, attempt
from fdscale.config.programs import DenseSettings
from fdscale.data.dense.ade20k import ScenePairs, load_ade20k
from fdscale.data.dense.coco import CocoScenes, load_coco
from fdscale.planning.data_check import DataFacts
from fdscale.planning.detector_file import detector_file_problems
from fdscale.planning.networks import refuse_no_file
from fdscale.students.geometry import Geometry, SwinV2Geometry, TimmGeometry, ViTGeometry

MASK2FORMER_GROUPS = 32  # that transformers normalises its channels in
SCENES = "scenes"  # the embedded sample, rendered on first use
SCENE_CLASSES = {"segment": 8, "detect": 5}
NEEDED = {"segment": ("transformers", "scipy"), "detect": ("faster_coco_eval",)}  # beyond what fdscale always needs
# timm's networks that are built for one size of images, unless `dynamic_img_size` is set; of some it is by default
ONE_SIZE, SOME_TAKE_ANY = ("vit_", "deit", "flexivit_", "eva", "swin_"), ("dinov3", "intern")


def dense_facts(settings: DenseSettings) -> DataFacts:
    """Read what there is to train on; raises UserError as its reader does."""
    _refuse_missing_packages(settings.program)
    if SCENES in training_data(settings):
        _refuse_classes(settings, SCENE_CLASSES[settings.program], "the embedded scenes have")
        return DataFacts(None, None, None, None, None)
    samples = count_of(settings)
    steps_per_epoch = samples // settings.data.global_batch
    return DataFacts(None, None, samples, steps_per_epoch, settings.total_steps(steps_per_epoch))


def training_data(settings: DenseSettings) -> tuple[str, ...]:
    """The folder that is trained on, or images and annotations."""
    data = settings.data
    return (data.folder,) if isinstance(data, SegmentDataSettings) else (data.images, data.annotations)


def count_of(settings: DenseSettings) -> int:
    """The images that can be trained on; raises UserError for what is wrong with them."""
    if isinstance(settings, SegmentSettings):
        return len(_ade20k("data.folder", settings.data.folder, "training", settings.classes))
    return len(_coco(settings, "data").trainable())


def dense_problems(settings: DenseSettings, facts: DataFacts | None) -> Iterator[str]:
    """Every disagreement between the recipe and its images, one sentence each."""
    batch, samples = settings.data.global_batch, None if facts is None else facts.samples
    if samples is not None and samples < batch:
        yield f"data.global_batch: got {batch}, allowed: at most the {samples} images that can be trained on"
    halves = {"data": training_data(settings), "eval": _held_out(settings)}
    for table, named in halves.items():
        if len(set(named)) > 1 and SCENES in named:
            yield f"{table}.images, {table}.annotations: got {' and '.join(named)}, allowed: both {SCENES}, or neither"
            return
    held_out = halves["eval"]
    if not held_out:
        if settings.eval.every:
            yield f"eval.every: got {settings.eval.every} without held-out images; name them, or set it to 0"
    elif SCENES not in held_out:
        yield from _held_out_problems(settings)


def network_problems(
    settings: DenseSettings, student: Geometry | None, deepspeed_json: Mapping[str, Any]
) -> Iterator[str]:
    """What student, heads and precision cannot have together, one sentence each; `student` None: not known."""
    for where, windows in (("backbone", settings.backbone.window_size), ("eval", settings.eval.window_size)):
        if windows is not None and isinstance(student, ViTGeometry):
            yield f"{where}.window_size: got {windows}, but {settings.student.name} has no windows; leave it out"
    yield from _size_problems(settings, student)
    if isinstance(settings, DetectSettings):
        yield from _detector_problems(settings, student)
        return
    yield from _unused_problems(settings, isinstance(student, SwinV2Geometry))
    if settings.head.kind == "mask2former":
        yield from _mask2former_problems(settings.head.channels, deepspeed_json)


def _mask2former_problems(channels: int, deepspeed_json: Mapping[str, Any]) -> Iterator[str]:
    if channels % MASK2FORMER_GROUPS:
        yield f"head.channels: got {channels}, allowed beside mask2former: multiples of {MASK2FORMER_GROUPS}"
    for key in ("bf16", "fp16"):
        if deepspeed_json.get(key, {}).get("enabled"):
            yield f"head.kind: mask2former counts positions, too many for {key}.enabled; use torch_autocast"


def _size_problems(settings: DenseSettings, student: Geometry | None) -> Iterator[str]:
    """Images of another size than a network takes; where only the built one tells, its first forward refuses them."""
    if not isinstance(student, TimmGeometry) or student.arguments.get("dynamic_img_size"):
        return
    name = student.name
    if not name.startswith(ONE_SIZE) or any(word in name for word in SOME_TAKE_ANY):
        return
    remedy = "student.geometry.dynamic_img_size=true where the network has it"
    if isinstance(settings, DetectSettings):
        yield f"student.name: timm:{name} takes images of one size, but detection sees images of many; set {remedy}"
        return
    of_its_name = re.search(r"_(\d{3})(?!\d)", name)
    size = student.image_size or (int(of_its_name[1]) if of_its_name else None)
    crops = {"data.crop": settings.data.crop} | ({"eval.crop": settings.eval.crop} if settings.eval.folder else {})
    for where, crop in crops.items() if size is not None else ():
        if _shown(crop, name) != size:
            got, alone = crop or "0, whole images", f"timm:{name} takes images of {size} px alone"
            yield f"{where}: got {got}, but {alone}: set student.image_size to it, or {remedy}"


def _shown(crop: int, name: str) -> int:
    """The side that a network sees of a crop: whole patches, each of 14 px, say, made of 16 (`Backbone`)."""
    found = re.search(r"patch(\d+)", name)
    if found is None:
        return crop
    patch = int(found[1])
    return -(-crop // 2 ** round(log2(patch))) * patch


def _unused_problems(settings: SegmentSettings, hierarchical: bool) -> Iterator[str]:
    """Settings that say something where it has no meaning."""
    backbone, head = settings.backbone, settings.head
    if hierarchical:
        why = f"{settings.student.name} has maps of four strides"
        yield from _said("backbone", backbone, SegmentBackboneSettings(), why, "plain", "indices", "pyramid_channels")
    elif backbone.plain == "pyramid":
        yield from _said("backbone", backbone, SegmentBackboneSettings(), 'backbone.plain is "pyramid"', "indices")
    else:
        why = 'backbone.plain is "layers"'
        yield from _said("backbone", backbone, SegmentBackboneSettings(), why, "pyramid_channels")
    unused = ("queries", "decoder_layers") if head.kind == "upernet" else ("auxiliary_weight",)
    yield from _said("head", head, SegmentHeadSettings(), f"head.kind is {head.kind}", *unused)


def _said(table: str, given: Any, defaults: Any, why: str, *names: str) -> Iterator[str]:
    for name in names:
        if (value := getattr(given, name)) != getattr(defaults, name):
            told = f'"{value}"' if isinstance(value, str) else value
            yield f"{table}.{name}: got {list(told) if isinstance(told, tuple) else told}, but {why}; leave it out"


def _detector_problems(settings: DetectSettings, student: Geometry | None) -> Iterator[str]:
    weights, problems = settings.head.weights, []  # type: str | None, list[str]
    if weights is None:
        return
    attempt(lambda: refuse_no_file("head.weights", weights), problems)
    yield from problems
    if settings.student.weights is not None:
        yield f"student.weights: head.weights={weights} holds the whole network, the student too; leave one of them out"
    elif not problems:
        yield from detector_file_problems(Path(weights), student, settings.head)


def _held_out(settings: DenseSettings) -> tuple[str, ...]:
    """As `training_data`; () where nothing is held out."""
    seen = settings.eval
    named = (seen.folder,) if isinstance(seen, SegmentEvalSettings) else (seen.images, seen.annotations)
    return tuple(name for name in named if name is not None)


def _held_out_problems(settings: DenseSettings) -> Sequence[str]:
    """What is wrong with the held-out images, and with what they and the training data call their classes."""
    problems: list[str] = []
    evaluated = attempt(lambda: _categories(settings, "eval"), problems)
    if evaluated is None or SCENES in training_data(settings):
        return problems
    trained = attempt(lambda: _categories(settings, "data"), [])  # what is wrong with it was told
    if trained and evaluated and trained != evaluated:
        problems.append(_other_classes(settings, trained, evaluated))
    return problems


def _categories(settings: DenseSettings, table: str) -> tuple[Any, ...]:
    """The classes in the order of their labels: ids and names in a JSON, names in ADE20K's table, () without one."""
    if isinstance(settings, DetectSettings):
        scenes = _coco(settings, table)
        return tuple(zip(scenes.category_ids, scenes.class_names, strict=True))
    folder, split = (settings.data.folder, "training") if table == "data" else (settings.eval.folder, "validation")
    return _ade20k(f"{table}.folder", str(folder), split, settings.classes).class_names or ()


def _other_classes(settings: DenseSettings, trained: Sequence[Any], evaluated: Sequence[Any]) -> str:
    """Both are as long as the settings say."""
    setting = "annotations" if isinstance(settings, DetectSettings) else "folder"
    label = next(number for number, pair in enumerate(zip(trained, evaluated, strict=True)) if pair[0] != pair[1])
    there, here = (_class_told(classes[label]) for classes in (trained, evaluated))
    return (
        f"eval.{setting}: its classes are not those of data.{setting} (label {label} is {here}, there {there}), "
        "so that one number means two classes; give held-out images with the same classes in the same order"
    )


def _class_told(named: Any) -> str:
    return named if isinstance(named, str) else f"{named[1]} with id {named[0]}"


def _ade20k(where: str, folder: str, split: str, classes: int) -> ScenePairs:
    try:
        return load_ade20k(folder, split, classes)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _coco(settings: DetectSettings, table: str) -> CocoScenes:
    named, missing = (settings.data, settings.data.max_bad_ratio) if table == "data" else (settings.eval, 0.0)
    try:
        scenes = load_coco(str(named.images), str(named.annotations), settings.head.masks, missing)
    except UserError as error:
        raise UserError(f"{table}.images, {table}.annotations: {error}") from error
    _refuse_classes(settings, len(scenes.category_ids), f"{table}.annotations={named.annotations} has")
    return scenes


def _refuse_classes(settings: DenseSettings, there: int, what: str) -> None:
    if settings.classes != there:
        raise UserError(f"classes: got {settings.classes}, but {what} {there}; set classes={there}, or name other data")


def _refuse_missing_packages(program: str) -> None:
    missing = [name.replace("_", "-") for name in NEEDED[program] if find_spec(name) is None]
    if missing:
        raise UserError(f"`fdscale {program}` needs {' and '.join(missing)}: pip install 'fdscale[dense]'")
