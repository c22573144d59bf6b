"""A finished student, or classifier, as a folder that Hugging Face transformers loads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from fdscale.config.errors import UserError
from fdscale.export.finished import Finished, finished
from fdscale.export.model_card import OWN_ARCHITECTURE, transformers_card
from fdscale.export.model_source import network_source
from fdscale.export.parity import Report, Size, ask, checked
from fdscale.export.timm_format import has_extra_norms, timm_names, timm_network
from fdscale.export.transformers_names import beit_name, swin_v2_name
from fdscale.students.files import new_folder, refuse_taken
from fdscale.students.geometry import SwinV2Geometry, ViTGeometry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL_FILE = f"modeling_{OWN_ARCHITECTURE}.py"
WRAPPER = Path(__file__).with_name("fd_swin_v2_model.py")  # SwinV2 as transformers' models
CLASSIFIER = "classifier"


def export_transformers(source: Path, output: Path) -> Path:
    """Writes weights, configuration, image processor, `parity.json` and a model card; returns the full path.

    `source` and `output` as for `export_timm`. A ViT becomes a Beit, a SwinV2 a Swinv2; one with extra norms, which
    transformers does not have, brings its model file along and is loaded with `trust_remote_code=True`. Raises
    UserError likewise, and for students that transformers has no network for, naming `--format timm`.
    """
    if find_spec("transformers") is None:
        raise UserError(
            "--format transformers needs transformers: pip install 'fdscale[transformers]', or --format timm"
        )
    student = finished(source)
    refuse_taken(output)
    _refuse_what_it_has_not(student)
    timm_network(student)
    with checked(student) as check, new_folder(output) as folder:
        write_transformers(student, folder)
        report = ask(check, "transformers", folder, lambda size: is_exact(student, size))
        finish_transformers(student, report, folder)
    return output.resolve()


def write_transformers(student: Finished, folder: Path) -> None:
    """Everything but the parity report and the card."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = _model(student)
    model.load_state_dict(dict(_state(student, model)), strict=True, assign=True)
    model.save_pretrained(folder)
    _image_processor(student).save_pretrained(folder)
    if "auto_map" in json.loads((folder / "config.json").read_text()):
        (folder / MODEL_FILE).write_text(network_source(WRAPPER))


def finish_transformers(student: Finished, report: Report, folder: Path) -> None:
    """The parity report and the model card that shows it."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "parity.json").write_text(report.as_json())
    (folder / "README.md").write_text(transformers_card(student, config, report, folder.name, _remarks(student)))


def is_exact(student: Finished, size: Size) -> bool:
    """Whether transformers' network gives fdscale's outputs at this size (docs/exports.md says why it may not)."""
    geometry = student.geometry
    if isinstance(geometry, SwinV2Geometry):
        return has_extra_norms(geometry) or all(
            _stage_is_exact(geometry, stage, size) for stage in range(len(geometry.depths))
        )
    assert isinstance(geometry, ViTGeometry)
    return size == (geometry.image_size, geometry.image_size)


def _stage_is_exact(geometry: SwinV2Geometry, stage: int, size: Size) -> bool:
    """Windows that are shifted over a padded map differ: one pads before the shift, the other after it.

    They agree without padding, and where the padding is as wide as the shift and half the window.
    """
    maps = [side // (geometry.patch_size * 2**stage) for side in size]
    windows = [min(side, geometry.window_size) for side in maps]
    shifts = [0 if side <= window else geometry.window_size // 2 for side, window in zip(maps, windows, strict=True)]
    if windows[0] != windows[1]:
        return False  # transformers' are square
    if geometry.depths[stage] < 2:
        return True
    padded = [-side % window for side, window in zip(maps, windows, strict=True)]
    alike = all(
        pad == 0 or shift == 0 or 2 * pad == 2 * shift == window
        for pad, shift, window in zip(padded, shifts, windows, strict=True)
    )
    return shifts[0] == shifts[1] and alike


def _remarks(student: Finished) -> str:
    """What a user has to know for other sizes."""
    geometry = student.geometry
    if isinstance(geometry, ViTGeometry):
        return (
            f"Other sizes than {geometry.image_size} run as they are. transformers interpolates the position biases "
            "linearly, timm and fdscale on a geometric grid: outputs are approximate there (see Parity)."
        )
    told = "For another size load it with `image_size=384` or `image_size=[384, 512]`, which fits the windows."
    if isinstance(geometry, SwinV2Geometry) and has_extra_norms(geometry):
        return told
    return (
        f"{told} Where a stage's map is no multiple of its window, transformers pads before it shifts the windows, "
        "timm and fdscale after: outputs are approximate there (see Parity)."
    )


def _refuse_what_it_has_not(student: Finished) -> None:
    geometry, head = student.geometry, student.head
    if not isinstance(geometry, ViTGeometry | SwinV2Geometry):
        raise UserError(f"{student.weights}: transformers has no network for a timm student; use --format timm")
    if isinstance(geometry, ViTGeometry) and head is not None and not head.new_norm:
        raise UserError(
            f"{head.weights}: head.norm=student: transformers' Beit has its norm after the pooling alone; "
            "use --format timm"
        )


def _model(student: Finished) -> PreTrainedModel:
    """The network on the meta device, with its configuration."""
    geometry, labels = student.geometry, _labels(student)
    with torch.device("meta"):
        if isinstance(geometry, ViTGeometry):
            return _beit(geometry, labels)
        assert isinstance(geometry, SwinV2Geometry)
        return _own_swin_v2(student, labels) if has_extra_norms(geometry) else _swin_v2(geometry, labels)


def _labels(student: Finished) -> dict[str, Any]:
    """The configuration's names of the classes; empty for a student without a head."""
    if student.head is None:
        return {}
    names = student.class_names or [f"LABEL_{number}" for number in range(student.head.classes)]
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def _beit(geometry: ViTGeometry, labels: Mapping[str, Any]) -> PreTrainedModel:
    from transformers import BeitConfig, BeitForImageClassification, BeitModel

    config = BeitConfig(
        image_size=geometry.image_size,
        patch_size=geometry.patch_size,
        hidden_size=geometry.embed_dim,
        num_hidden_layers=geometry.depth,
        num_attention_heads=geometry.num_heads,
        intermediate_size=geometry.hidden,
        layer_scale_init_value=geometry.init_values,
        layer_norm_eps=1e-6,
        use_relative_position_bias=geometry.position_bias == "per_block",
        use_shared_relative_position_bias=geometry.position_bias == "shared",
        use_mean_pooling=bool(labels),
        drop_path_rate=0.0,
        **labels,
    )
    return BeitForImageClassification(config) if labels else BeitModel(config)


def _swin_v2(geometry: SwinV2Geometry, labels: Mapping[str, Any]) -> PreTrainedModel:
    from transformers import Swinv2Config, Swinv2ForImageClassification, Swinv2Model

    config = Swinv2Config(
        image_size=geometry.image_size,
        patch_size=geometry.patch_size,
        embed_dim=geometry.embed_dim,
        depths=list(geometry.depths),
        num_heads=list(geometry.num_heads),
        window_size=geometry.window_size,
        pretrained_window_sizes=list(geometry.pretrained_window_sizes) or [0] * len(geometry.depths),
        mlp_ratio=geometry.mlp_ratio,
        encoder_stride=geometry.stride,
        drop_path_rate=0.0,
        **labels,
    )
    return Swinv2ForImageClassification(config) if labels else Swinv2Model(config)


def _own_swin_v2(student: Finished, labels: Mapping[str, Any]) -> PreTrainedModel:
    from fdscale.export.fd_swin_v2_model import FdSwinV2Config, FdSwinV2ForImageClassification, FdSwinV2Model

    arguments = dict(timm_network(student).arguments)
    size, module = arguments.pop("img_size"), MODEL_FILE.removesuffix(".py")
    classes = {"AutoConfig": FdSwinV2Config, "AutoModel": FdSwinV2Model}
    if labels:
        classes["AutoModelForImageClassification"] = FdSwinV2ForImageClassification
    auto_map = {auto: f"{module}.{kind.__name__}" for auto, kind in classes.items()}
    config = FdSwinV2Config(arguments, size, auto_map=auto_map, **labels)
    return FdSwinV2ForImageClassification(config) if labels else FdSwinV2Model(config)


def _state(student: Finished, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The model's names and values, one tensor read at a time; transformers has no fused qkv."""
    geometry, own = student.geometry, f"{model.base_model_prefix}."
    extra = isinstance(geometry, SwinV2Geometry) and has_extra_norms(geometry)
    prefix = own if student.head or extra else ""
    files = {path: safe_open(path, framework="pt") for path, _ in timm_names(student, CLASSIFIER).values()}
    for name, (path, stored) in timm_names(student, CLASSIFIER).items():
        value = files[path].get_tensor(stored).float()
        if name.startswith(f"{CLASSIFIER}."):
            yield name, value
        elif extra:
            yield prefix + name, value
        else:
            renamed = prefix + (beit_name if isinstance(geometry, ViTGeometry) else swin_v2_name)(name)
            yield from _split(renamed, value)


def _split(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A fused `{q|k|v}` weight as three, each with storage of its own; others as they are."""
    before, brace, after = name.partition("{")
    if not brace:
        yield name, value
        return
    names, _, after = after.partition("}")
    parts = names.split("|")
    yield from ((before + part + after, piece.clone()) for part, piece in zip(parts, value.chunk(3), strict=True))


def _image_processor(student: Finished) -> Any:
    """Shorter side to size * 256 / 224, centre crop, normalisation: what evaluation does."""
    from transformers import CLIPImageProcessor

    assert isinstance(student.geometry, ViTGeometry | SwinV2Geometry)
    size = student.geometry.image_size
    return CLIPImageProcessor(
        size={"shortest_edge": size * 256 // 224},
        crop_size={"height": size, "width": size},
        resample=Image.Resampling[student.interpolation.upper()],
        image_mean=list(student.mean),
        image_std=list(student.std),
    )
