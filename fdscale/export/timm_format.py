"""A finished student as a folder in timm's hub format, which loads where fdscale is not installed."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from fdscale.config.errors import UserError
from fdscale.export.model_card import OWN_ARCHITECTURE, model_card
from fdscale.students import swin_v2
from fdscale.students.files import new_folder, refuse_taken
from fdscale.students.from_timm import timm_arguments
from fdscale.students.geometry import (
    Geometry,
    SwinV2Geometry,
    TimmGeometry,
    ViTGeometry,
    file_description,
    file_geometry,
    file_source,
)
from fdscale.students.swin_v2 import SwinV2
from fdscale.training.run_directory import RunDirectory

CROP_PCT = 0.875  # evaluation resizes the shorter side to size * 256 / 224
MODEL_FILE = f"{OWN_ARCHITECTURE}.py"


@dataclass(frozen=True)
class TimmModel:
    """How timm builds the student: `timm.create_model(architecture, **arguments)`, and what fits its input.

    `architecture` None: stock timm has no such network, the folder brings `MODEL_FILE` along.
    """

    architecture: str | None
    arguments: Mapping[str, Any]
    input_layout: Mapping[str, Any]  # the pretrained_cfg's keys that name layers and sizes

    def build(self) -> nn.Module:
        """The network on the meta device: its keys and shapes, no memory."""
        if self.architecture is None:
            return SwinV2(**self.arguments, device="meta")
        with torch.device("meta"):
            return timm.create_model(self.architecture, num_classes=0, **self.arguments)


def export_timm(source: Path, output: Path) -> Path:
    """Writes `model.safetensors`, `config.json` and a model card into `output`; returns its full path.

    `source` is the run directory of a finished run, or a student file. `output` is made whole or not at all.
    Stock timm loads it: `timm.create_model("local-dir:OUTPUT", pretrained=True)`. A student with extra norms,
    which timm does not have, gets its model file beside the weights. Raises UserError for a run that is not
    complete, for weights whose keys or shapes are not the network's, and for an `output` that is not empty.
    """
    weights = _weights_file(source)
    refuse_taken(output)
    model = timm_model(file_geometry(weights))
    network = model.build()
    _check_keys(weights, network)
    config = _config(model, network, weights)
    with new_folder(output) as folder:
        _write(folder, weights, config, model_card(config, _recipe(weights), file_source(weights), folder.name))
    return output.resolve()


def timm_model(geometry: Geometry) -> TimmModel:
    """How timm builds a student of this geometry."""
    match geometry:
        case ViTGeometry():
            return _vit(geometry)
        case SwinV2Geometry():
            return _swin_v2(geometry)
        case TimmGeometry():
            return _timm(geometry)
    raise AssertionError("no student file stores another geometry")


def _vit(geometry: ViTGeometry) -> TimmModel:
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
        "global_pool": "token",  # timm moves the final norm behind the pooling when it averages
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
    if 0 < geometry.extra_norm_period <= max(geometry.depths):
        return TimmModel(None, arguments | {"extra_norm_period": geometry.extra_norm_period}, layout)
    return TimmModel("swinv2_base_window8_256", arguments | {"global_pool": "avg"}, layout)


def _timm(geometry: TimmGeometry) -> TimmModel:
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
    return TimmModel(geometry.name.partition(".")[0], timm_arguments(geometry), layout)


def _layout(geometry: ViTGeometry | SwinV2Geometry, classifier: str) -> dict[str, Any]:
    return {
        "input_size": [3, geometry.image_size, geometry.image_size],
        "fixed_input_size": True,
        "pool_size": list(geometry.grid),
        "first_conv": "patch_embed.proj",
        "classifier": classifier,
    }


def _config(model: TimmModel, network: nn.Module, weights: Path) -> dict[str, Any]:
    """timm's `config.json`; an architecture that timm does not know makes it refuse instead of guess."""
    student = file_description(weights)
    preprocessing = {
        "mean": [_shortest(value) for value in student["mean"]],
        "std": [_shortest(value) for value in student["std"]],
        "interpolation": _recipe(weights).get("data", {}).get("interpolation", "bilinear"),
        "crop_pct": CROP_PCT,
        "crop_mode": "center",
    }
    return {
        "architecture": model.architecture or OWN_ARCHITECTURE,
        "num_classes": 0,
        "num_features": network.num_features,
        "model_args": dict(model.arguments),
        "pretrained_cfg": {**model.input_layout, **preprocessing, "num_classes": 0},
    }


def _shortest(value: float) -> float:
    """The shortest decimal of an fp32 number, which the student file widened (0.485 is 0.4850000143)."""
    return float(str(np.float32(value)))


def _write(folder: Path, weights: Path, config: Mapping[str, Any], card: str) -> None:
    shutil.copyfile(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "README.md").write_text(card)
    if config["architecture"] == OWN_ARCHITECTURE:
        shutil.copyfile(swin_v2.__file__, folder / MODEL_FILE)


def _weights_file(source: Path) -> Path:
    if source.is_file():
        return source
    if not source.exists():
        raise UserError(f"{source}: no such run directory or student file")
    run = RunDirectory(source)
    if not run.recipe.is_file() and run.student.is_file():
        return run.student  # an imported student's folder
    if run.completed_steps() is None or not run.student.is_file():
        raise UserError(
            f"{source}: not a completed run: its student.safetensors is written and marked when the last "
            "step is done; start the same command again to finish it, or name a student file"
        )
    return run.student


def _check_keys(weights: Path, network: nn.Module) -> None:
    """Compares names and shapes in the file's header with the network that the reader will build."""
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    stored = _stored_shapes(weights)
    problems = {
        "missing": sorted(expected.keys() - stored.keys()),
        "unexpected": sorted(stored.keys() - expected.keys()),
        "of another shape": sorted(k for k in expected.keys() & stored.keys() if expected[k] != stored[k]),
    }
    told = [f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in problems.items() if names]
    if told:
        raise UserError(f"{weights}: its keys are not those of {weights.with_suffix('.json').name}: " + "; ".join(told))


def _stored_shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(weights, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights}: not a readable student file: {error}") from error


def _recipe(weights: Path) -> dict[str, Any]:
    """The recipe that the run kept beside its student; empty for a student file on its own."""
    path = weights.with_name("recipe.toml")
    return tomllib.loads(path.read_text()) if path.is_file() else {}
