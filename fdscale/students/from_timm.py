"""Any network of timm's without its head, by name and keywords."""

from __future__ import annotations

import inspect
from typing import Any

import timm
import torch
from torch import nn

from fdscale.config.errors import UserError, nearest
from fdscale.students.geometry import TimmGeometry

# what timm and broken keywords raise while a network is built and run once
TIMM_ERRORS = (RuntimeError, TypeError, ValueError, AssertionError, IndexError, KeyError, ZeroDivisionError)
OURS = ("self", "args", "kwargs", "device", "dtype", "num_classes", "global_pool", "img_size", "drop_path_rate")


def timm_arguments(geometry: TimmGeometry) -> dict[str, Any]:
    """Keywords of `timm.create_model` for this student, beside `num_classes=0`."""
    known = timm.get_pretrained_cfg(geometry.name)
    # networks of any size (ConvNets) take no img_size
    sized = geometry.image_size is not None and known is not None and known.fixed_input_size
    size: dict[str, Any] = {"img_size": geometry.image_size} if sized else {}
    return {**geometry.arguments, **size, "global_pool": ""}


def build_timm(geometry: TimmGeometry, drop_path: float) -> nn.Module:
    """timm's network with its start, on torch's current device; raises UserError for keywords that it has not."""
    if geometry.arguments:
        _refuse_unknown_keywords(geometry)
    return timm.create_model(geometry.name, num_classes=0, drop_path_rate=drop_path, **timm_arguments(geometry))


def build_on_meta(geometry: TimmGeometry) -> nn.Module:
    """The same network in shapes alone."""
    with torch.device("meta"):
        return build_timm(geometry, drop_path=0.0)


def _refuse_unknown_keywords(geometry: TimmGeometry) -> None:
    """timm itself takes some keywords in silence, and would download weights for others."""
    with torch.device("meta"):
        network = type(timm.create_model(geometry.name))
    known = _keywords(network)
    unknown = [key for key in geometry.arguments if key not in known]
    if unknown:
        raise UserError(
            f"student.geometry: {network.__name__}, timm's {geometry.name}, has no {', '.join(unknown)}"
            f"{nearest(unknown[0], known)}; it has {', '.join(known)}"
        )


def _keywords(network: type[nn.Module]) -> list[str]:
    """Keywords of a class and of those that it hands the rest to."""
    own = [kind for kind in network.__mro__ if "__init__" in vars(kind) and issubclass(kind, nn.Module)]
    names = [name for kind in own if kind is not nn.Module for name in inspect.signature(kind).parameters]
    return [name for name in dict.fromkeys(names) if name not in OURS]
