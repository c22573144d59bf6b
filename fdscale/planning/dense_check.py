"""What the folders and JSONs of dense tasks hold, and whether the recipe fits them; torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fdscale.config.dense_settings import DetectSettings, SegmentDataSettings, SegmentSettings
from fdscale.config.errors import UserError, attempt
from fdscale.config.programs import DenseSettings
from fdscale.data.dense.ade20k import ScenePairs, load_ade20k
from fdscale.data.dense.coco import CocoScenes, load_coco
from fdscale.planning.data_check import DataFacts
from fdscale.planning.detector_file import detector_file_problems
from fdscale.planning.networks import refuse_no_file
from fdscale.students.geometry import Geometry, ViTGeometry

SCENES = "scenes"  # the embedded sample, rendered on first use
SCENE_CLASSES = {"segment": 8, "detect": 5}
NEEDED = {"segment": ("transformers", "scipy"), "detect": ("faster_coco_eval",)}  # beyond what fdscale always needs


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
    held_out = settings.eval.folder if isinstance(settings, SegmentSettings) else settings.eval.annotations
    if held_out is None:
        if settings.eval.every:
            yield f"eval.every: got {settings.eval.every} without held-out images; name them, or set it to 0"
    elif held_out != SCENES:
        yield from _held_out_problems(settings)


def network_problems(
    settings: DenseSettings, student: Geometry | None, deepspeed_json: Mapping[str, Any]
) -> Iterator[str]:
    """What student, heads and precision cannot have together, one sentence each; `student` None: not known."""
    for where, windows in (("backbone", settings.backbone.window_size), ("eval", settings.eval.window_size)):
        if windows is not None and isinstance(student, ViTGeometry):
            yield f"{where}.window_size: got {windows}, but {settings.student.name} has no windows; leave it out"
    if isinstance(settings, DetectSettings):
        yield from _detector_problems(settings, student)
    elif settings.head.kind == "mask2former":
        for key in ("bf16", "fp16"):
            if deepspeed_json.get(key, {}).get("enabled"):
                yield f"head.kind: mask2former counts positions, too many for {key}.enabled; use torch_autocast"


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


def _held_out_problems(settings: DenseSettings) -> Sequence[str]:
    problems: list[str] = []
    attempt(lambda: _look_at_held_out(settings), problems)
    return problems


def _look_at_held_out(settings: DenseSettings) -> None:
    if isinstance(settings, DetectSettings):
        _coco(settings, "eval")
    else:
        _ade20k("eval.folder", str(settings.eval.folder), "validation", settings.classes)


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
