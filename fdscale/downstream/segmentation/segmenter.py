"""A student that segments: its maps, and UperNet's or Mask2Former's heads on them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fdscale.config.errors import UserError
from fdscale.downstream.backbone import Backbone
from fdscale.downstream.pyramid import STRIDES
from fdscale.downstream.segmentation import mask2former, upernet
from fdscale.students.geometry import OwnGeometry, geometry_to_json
from fdscale.students.student import Student

if TYPE_CHECKING:
    from fdscale.downstream.segmentation.networks import StudentMapsConfig

Head = Literal["upernet", "mask2former"]
HEADS: dict[str, Any] = {"upernet": upernet, "mask2former": mask2former}
CHANNELS: dict[str, int] = {"upernet": 512, "mask2former": 256}  # the references'


class Segmenter(nn.Module):
    """Pixels (B, 3, H, W) in [0, 1] -> losses and measurements with labels (B, H, W), class scores without.

    `model` is transformers' network, whose backbone it is robbed of: `backbone` is called in its place, so that a
    parameter has one name, `backbone.` and what `Backbone` calls it, or `model.` and what transformers does.
    """

    def __init__(self, backbone: Backbone, model: Any, head: Head) -> None:
        super().__init__()
        self.backbone, self.model, self.head = backbone, model, head
        self.config = model.config
        owner, _, name = self.parts.SLOT.rpartition(".")
        delattr(model.get_submodule(owner), name)
        self.train()

    @property
    def parts(self) -> Any:
        """The functions of the head."""
        return HEADS[self.head]

    def forward(self, pixels: Tensor, labels: Tensor | None = None, drop_path: Tensor | None = None) -> Any:
        """With labels a dict of scalars, with `loss` and `pixel_accuracy`; `drop_path` draws are (sites, B).

        Without: fp32 scores (B, K, H, W) whose largest is the prediction; windows, scales and flips may be averaged.
        """
        maps = self.backbone(pixels, drop_path)
        if labels is None:
            return self.parts.scores(self.model, maps, pixels.shape[-2:])
        return self.parts.losses(self.model, maps, labels.long())

    def sketch(self, pixels: Tensor, labels: Tensor, drop_path: Tensor | None = None) -> dict[str, Tensor]:
        """A training forward that looks at no value, for fake tensors: a real one's modules, shapes and gradients."""
        found: dict[str, Tensor] = self.parts.sketched(self.model, self.backbone(pixels, drop_path), labels.long())
        return found

    def train(self, mode: bool = True) -> Segmenter:
        super().train(mode)
        if self.head == "mask2former":
            mask2former.stop_looking_for_infinities(self.model)
        return self


def build_segmenter(
    student: Student,
    head: Head = "upernet",
    classes: int = 150,
    channels: int | None = None,
    auxiliary_weight: float = 0.4,
    dropout: float = 0.1,
    queries: int = 100,
    decoder_layers: int = 9,
    encoder_layers: int = 6,
    points: int = 12544,
    plain: Literal["pyramid", "layers"] = "pyramid",
    indices: tuple[int, ...] | None = None,
    pyramid_channels: int = 256,
    window_size: int | None = None,
) -> Segmenter:
    """A segmenter on a student that has its weights, divided ones included: they are neither read nor written.

    The heads are new, drawn from torch's global generator, on torch's default device. `channels` are the head's (None:
    512 for UperNet, 256 for Mask2Former); `auxiliary_weight` and `dropout` are UperNet's, `queries` to `points`
    Mask2Former's, the last four `Backbone`'s. Raises UserError for a student that is no backbone for them.
    """
    _refuse_what_is_missing(student)
    from fdscale.downstream.segmentation import networks

    backbone = Backbone(student, plain, pyramid_channels, indices, window_size)
    if backbone.strides != STRIDES:
        raise UserError(
            f"student.name: a {head} head needs maps of strides {STRIDES}; this network has {backbone.strides}"
        )
    maps, width = _maps_config(student, plain, pyramid_channels, indices, window_size), channels or CHANNELS[head]
    if head == "upernet":
        config: Any = networks.upernet_config(maps, classes, width, auxiliary_weight, dropout)
    else:
        config = networks.mask2former_config(maps, classes, width, queries, decoder_layers, encoder_layers, points)
    segmenter = Segmenter(backbone, networks.network_of(config), head)
    _start(segmenter.model)
    return segmenter


def _refuse_what_is_missing(student: Student) -> None:
    missing = [name for name in ("transformers", "scipy") if find_spec(name) is None]
    if missing:
        raise UserError(f"segmentation heads need {' and '.join(missing)}: pip install {' '.join(missing)}")
    if student.geometry is None or isinstance(student.geometry, OwnGeometry):
        raise UserError("student.name=own: nothing could rebuild this network when it is loaded; take one by its name")


def _maps_config(
    student: Student, plain: str, pyramid_channels: int, indices: tuple[int, ...] | None, window_size: int | None
) -> StudentMapsConfig:
    from fdscale.downstream.segmentation.networks import StudentMapsConfig

    assert student.geometry is not None
    return StudentMapsConfig(
        geometry=geometry_to_json(student.geometry),
        mean=student.mean.flatten().tolist(),
        std=student.std.flatten().tolist(),
        plain=plain,
        pyramid_channels=pyramid_channels,
        indices=None if indices is None else list(indices),
        window_size=window_size,
    )


def _start(model: Any) -> None:
    """Give the heads, so far on the meta device, a place and a start; there they stay if that is torch's default."""
    device = torch.empty(0).device
    model.to_empty(device=device)
    if device.type != "meta":
        model.initialize_weights()
