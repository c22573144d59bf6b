"""A finished student, or classifier, as a folder in timm's hub format, which loads where fdscale is not installed."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fdscale.config.errors import UserError
from fdscale.export.finished import CROP_PCT, HEAD, Finished, Head, finished, stored_shapes
from fdscale.export.model_card import OWN_ARCHITECTURE, timm_card
from fdscale.export.model_source import network_source
from fdscale.export.parity import Report, ask, checked
from fdscale.students.files import new_folder, refuse_taken
from fdscale.students.from_timm import timm_arguments
from fdscale.students.geometry import Geometry, SwinV2Geometry, TimmGeometry, ViTGeometry
from fdscale.students.swin_v2 import SwinV2

MODEL_FILE = f"{OWN_ARCHITECTURE}.py"
FINAL_NORM = "norm."  # in a student file


@dataclass(frozen=True)
class TimmModel:
    """How timm builds the student: `timm.create_model(architecture, **arguments)`, and what fits its input.

    `architecture` None: stock timm has no such network, the folder brings `MODEL_FILE` along.
    """

    architecture: str | None
    arguments: Mapping[str, Any]
    input_layout: Mapping[str, Any]  # the pretrained_cfg's keys that name layers and sizes

    def build(self, classes: int) -> nn.Module:
        """The network on the meta device: its keys and shapes, no memory."""
        if self.architecture is None:
            network = SwinV2(**self.arguments, device="meta")
            network.reset_classifier(classes, "avg" if classes else "")
            return network
        with torch.device("meta"):
            return timm.create_model(self.architecture, num_classes=classes, **self.arguments)


def export_timm(source: Path, output: Path) -> Path:
    """Writes `model.safetensors`, `config.json`, `parity.json` and a model card into `output`; returns its full path.

    `source` is the run directory of a finished run, or a student file; a classifier beside it becomes the head.
    `output` is made whole or not at all. Stock timm loads it: `timm.create_model("local-dir:OUTPUT",
    pretrained=True)`. A student with extra norms, which timm does not have, gets its model file beside the weights.
    Raises UserError for a run that is not complete, for weights whose keys or shapes are not the network's, for an
    `output` that is not empty, and when the folder, read without fdscale, does not give what fdscale gives.
    """
    student = finished(source)
    refuse_taken(output)
    network = timm_network(student)
    with checked(student) as check, new_folder(output) as folder:
        config = write_timm(student, network, folder)
        report = ask(check, "timm", folder, same_everywhere)
        finish_timm(student, config, report, folder)
    return output.resolve()


def same_everywhere(size: tuple[int, int]) -> bool:
    """timm's networks are the student's own: every size gives the same."""
    return True


def timm_network(student: Finished) -> TimmModel:
    """How timm builds it; raises UserError unless the file's keys and shapes are those of that network."""
    model = timm_model(student.geometry, student.head)
    _check_keys(student, model)
    return model


def timm_model(geometry: Geometry, head: Head | None = None) -> TimmModel:
    """How timm builds a student of this geometry, or a classifier on it."""
    match geometry:
        case ViTGeometry():
            return _vit(geometry, head)
        case SwinV2Geometry():
            return _swin_v2(geometry)
        case TimmGeometry():
            return _timm(geometry, head)
    raise AssertionError("no student file stores another geometry")


def _vit(geometry: ViTGeometry, head: Head | None) -> TimmModel:
    arguments = {
        "img_size": geometry.image_size,
        "patch_size": geometry.patch_size,
        "embed_dim": geometry.embed_dim,
        "depth": geometry.depth,
        "num_heads": geometry.num_heads,
        "mlp_ratio": geometry.mlp_ratio,
        "init_values": geometry.init_values,
        "use_abs_pos_emb": False,
        "use_rel_pos_bias": geometry.position_bias == "per_block",
        "use_shared_rel_pos_bias": geometry.position_bias == "shared",
        "global_pool": "avg" if head else "token",  # timm moves the final norm behind the pooling when it averages,
        "use_fc_norm": bool(head and head.new_norm),  # unless it is told not to
    }
    return TimmModel("beit_base_patch16_224", arguments, _layout(geometry, classifier="head"))


def _swin_v2(geometry: SwinV2Geometry) -> TimmModel:
    arguments = {
        "img_size": geometry.image_size,
        "patch_size": geometry.patch_size,
        "embed_dim": geometry.embed_dim,
        "depths": list(geometry.depths),
        "num_heads": list(geometry.num_heads),
        "window_size": geometry.window_size,
        "mlp_ratio": geometry.mlp_ratio,
        "pretrained_window_sizes": list(geometry.pretrained_window_sizes) or [0] * len(geometry.depths),
    }
    layout = _layout(geometry, classifier="head.fc")
    if has_extra_norms(geometry):
        return TimmModel(None, arguments | {"extra_norm_period": geometry.extra_norm_period}, layout)
    return TimmModel("swinv2_base_window8_256", arguments | {"global_pool": "avg"}, layout)


def has_extra_norms(geometry: SwinV2Geometry) -> bool:
    """Whether a stage is deep enough for the first of them."""
    return 0 < geometry.extra_norm_period <= max(geometry.depths)


def _timm(geometry: TimmGeometry, head: Head | None) -> TimmModel:
    found = timm.get_pretrained_cfg(geometry.name)
    if found is None:
        raise UserError(
            f"timm {timm.__version__} has no '{geometry.name}', the student's network; install one that has"
        )
    registered = found.to_dict(remove_source=True)
    kept = ("input_size", "fixed_input_size", "pool_size", "first_conv", "classifier")
    layout = {key: registered[key] for key in kept if key in registered}
    if geometry.image_size is not None:
        layout["input_size"] = [3, geometry.image_size, geometry.image_size]
    arguments = timm_arguments(geometry) | (_pooling(geometry, head) if head else {})
    return TimmModel(geometry.name.partition(".")[0], arguments, layout)


def _pooling(geometry: TimmGeometry, head: Head) -> dict[str, Any]:
    """The mean, and the norm before or after it where timm's network lets us choose."""
    with torch.device("meta"):
        known = inspect.signature(type(timm.create_model(geometry.name)).__init__).parameters
    chosen = {keyword: head.new_norm for keyword in ("fc_norm", "use_fc_norm") if keyword in known}
    return {"global_pool": "avg", **chosen}


def _layout(geometry: ViTGeometry | SwinV2Geometry, classifier: str) -> dict[str, Any]:
    return {
        "input_size": [3, geometry.image_size, geometry.image_size],
        "fixed_input_size": True,
        "pool_size": list(geometry.grid),
        "first_conv": "patch_embed.proj",
        "classifier": classifier,
    }


def timm_names(student: Finished, classifier: str) -> dict[str, tuple[Path, str]]:
    """timm's names of all weights: {timm's: (the file, the name there)}; `classifier` is timm's name of the head."""
    found = {name: (student.weights, name) for name in stored_shapes(student.weights)}
    head = student.head
    if head is None:
        return found
    if head.new_norm:  # the student file has it once more, as its final norm
        found = {name: place for name, place in found.items() if not name.startswith(FINAL_NORM)}
    for name in stored_shapes(head.weights):
        renamed = f"{classifier}.{name.removeprefix(HEAD)}" if name.startswith(HEAD) else name
        found[renamed] = (head.weights, name)
    return found


def write_timm(student: Finished, model: TimmModel, folder: Path) -> dict[str, Any]:
    """Weights, configuration and model file into `folder`; returns the configuration."""
    if student.head is None:
        shutil.copyfile(student.weights, folder / "model.safetensors")
    else:
        files = {path: load_file(path) for path in (student.weights, student.head.weights)}
        names = timm_names(student, model.input_layout["classifier"])
        state = {name: files[path][stored] for name, (path, stored) in names.items()}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = _config(model, student)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if config["architecture"] == OWN_ARCHITECTURE:
        (folder / MODEL_FILE).write_text(network_source())
    return config


def finish_timm(student: Finished, config: Mapping[str, Any], report: Report, folder: Path) -> None:
    """The parity report and the model card that shows it."""
    (folder / "parity.json").write_text(report.as_json())
    (folder / "README.md").write_text(timm_card(student, config, report, folder.name))


def _config(model: TimmModel, student: Finished) -> dict[str, Any]:
    """timm's `config.json`; an architecture that timm does not know makes it refuse instead of guess."""
    classes, names = student.head.classes if student.head else 0, student.class_names
    preprocessing = {
        "mean": list(student.mean),
        "std": list(student.std),
        "interpolation": student.interpolation,
        "crop_pct": CROP_PCT,
        "crop_mode": "center",
    }
    return {
        "architecture": model.architecture or OWN_ARCHITECTURE,
        "num_classes": classes,
        "num_features": model.build(0).num_features,
        **({"label_names": list(names)} if names else {}),
        "model_args": dict(model.arguments),
        "pretrained_cfg": {**model.input_layout, **preprocessing, "num_classes": classes},
    }


def _check_keys(student: Finished, model: TimmModel) -> None:
    """Compares names and shapes in the files' headers with the network that the reader will build."""
    network = model.build(student.head.classes if student.head else 0)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    names = timm_names(student, model.input_layout["classifier"])
    shapes = {path: stored_shapes(path) for path in {path for path, _ in names.values()}}
    stored = {name: shapes[path][known] for name, (path, known) in names.items()}
    problems = {
        "missing": sorted(expected.keys() - stored.keys()),
        "unexpected": sorted(stored.keys() - expected.keys()),
        "of another shape": sorted(k for k in expected.keys() & stored.keys() if expected[k] != stored[k]),
    }
    told = [f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in problems.items() if names]
    if told:
        described = student.weights.with_suffix(".json").name
        raise UserError(f"{student.weights}: its keys are not those of {described}: " + "; ".join(told))
