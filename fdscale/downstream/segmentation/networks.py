"""transformers' segmentation networks on a student's maps: what a saved folder is loaded with.

Importing this module tells transformers of them; `from_pretrained(folder)` of the Auto classes, or of those here,
then loads whatever `files.py` has saved. Pixels go in as they are, in [0, 1]: the student normalises them itself.

- `StudentMaps`: `downstream.backbone.Backbone` as a transformers backbone, rebuilt from its configuration alone.
- `UperNet`: transformers' UperNetForSemanticSegmentation with GroupNorm in place of BatchNorm (one or two images per
  GPU give no statistics, and running ones would differ between ranks), and mmseg's dropout and initialisation.
- Mask2Former is transformers' own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModelForSemanticSegmentation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    SegformerImageProcessor,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from transformers import initialization as init
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.models.upernet.modeling_upernet import UperNetConvModule
from transformers.utils import logging

from fdscale.config.errors import UserError
from fdscale.downstream.backbone import Backbone
from fdscale.downstream.pyramid import STRIDES
from fdscale.students.geometry import geometry_from_json
from fdscale.students.student import IMAGENET_MEAN, IMAGENET_STD, Student, build_student

GROUPS = 32
CHANNELS_OF_A_GROUP = 8  # at least: pooled to one pixel, a group of one channel would always be 0

SAVED_BY = "`fdscale segment` leaves whole ones"


class StudentMapsConfig(BackboneConfigMixin, PreTrainedConfig):
    """A student's `geometry`, as student.json has it, its `mean` and `std`, and the numbers of its `Backbone`."""

    model_type = "fdscale_student_maps"

    geometry: dict | None = None
    mean: list | tuple = IMAGENET_MEAN
    std: list | tuple = IMAGENET_STD
    plain: str = "pyramid"
    pyramid_channels: int = 256
    indices: list | tuple | None = None
    window_size: int | None = None

    def __post_init__(self, **others: Any) -> None:
        self.stage_names = ["stem", *(f"stage{number}" for number in range(1, len(STRIDES) + 1))]
        self.set_output_features_output_indices(
            out_features=others.pop("out_features", None) or self.stage_names[1:],
            out_indices=others.pop("out_indices", None),
        )
        super().__post_init__(**others)  # after the names of the stages, which it checks


class StudentMaps(BackboneMixin, PreTrainedModel):
    """Pixels (B, 3, H, W) in [0, 1] -> a student's four maps, from `Backbone`."""

    config_class = StudentMapsConfig
    config: Any
    main_input_name = "pixel_values"
    has_attentions = False

    def __init__(self, config: StudentMapsConfig) -> None:
        super().__init__(config)
        if config.geometry is None:
            raise UserError("a configuration without a student's geometry: take one that fdscale has saved")
        device = str(torch.empty(0).device)  # meta, while weights are about to be loaded
        student = build_student(geometry_from_json(config.geometry, Path("config.json")), device=device)
        numbers: Any = (config.plain, config.pyramid_channels, _tuple(config.indices), config.window_size)
        self.network = Backbone(student, *numbers)
        self.num_features: Any = [self.network.channels[0], *self.network.channels]
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """What no file holds; transformers leaves it undefined when it loads. Weights have their start already."""
        if isinstance(module, Student):
            module.mean.copy_(torch.tensor(self.config.mean).view_as(module.mean))
            module.std.copy_(torch.tensor(self.config.std).view_as(module.std))
        elif any(module._buffers[name] is not None for name in module._non_persistent_buffers_set):
            make_buffers: Any = getattr(module, "init_non_persistent_buffers", None)
            if make_buffers is None:
                raise UserError(f"timm's {type(module).__name__} cannot make its buffers anew: it cannot be loaded")
            make_buffers()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BackboneOutput:
        return BackboneOutput(feature_maps=self.network(pixel_values))


def _tuple(values: Any) -> Any:
    return None if values is None else tuple(values)


class FdUperNetConfig(UperNetConfig):
    """transformers' configuration, and the `dropout` of whole channels before the classifiers (mmseg: 0.1)."""

    model_type = "fdscale_upernet"

    dropout: float = 0.1


class UperNet(UperNetForSemanticSegmentation):
    """transformers' UperNet with GroupNorm, dropout before its classifiers, and mmseg's initialisation of the heads."""

    config_class = FdUperNetConfig
    config: Any

    def __init__(self, config: FdUperNetConfig) -> None:
        super().__init__(config)
        classes: Any = config.num_labels
        for module in self.modules():
            if isinstance(module, UperNetConvModule):
                channels = module.batch_norm.num_features
                module.batch_norm = nn.GroupNorm(groups_of(channels), channels)  # type: ignore[assignment]
        for head in (self.decode_head, self.auxiliary_head):
            if head is not None:
                head.classifier = DroppedConv(head.channels, classes, config.dropout)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """mmseg's: convolutions Kaiming normal by their outputs (`ConvModule`), classifiers normal 0.01."""
        if isinstance(module, DroppedConv):
            init.normal_(module.weight, std=0.01)
            assert module.bias is not None
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class DroppedConv(nn.Conv2d):
    """A 1x1 convolution of maps (B, C, h, w) of which, in training, whole channels are dropped first."""

    def __init__(self, channels: int, classes: int, dropout: float) -> None:
        super().__init__(channels, classes, kernel_size=1)
        self.dropout = dropout

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.dropout2d(input, self.dropout, self.training))


def groups_of(channels: int) -> int:
    """The groups of a GroupNorm: 32, or fewer for few channels."""
    return math.gcd(GROUPS, max(channels // CHANNELS_OF_A_GROUP, 1))


def upernet_config(
    maps: StudentMapsConfig, classes: int, channels: int, auxiliary_weight: float, dropout: float
) -> FdUperNetConfig:
    """An UperNet of `channels` with an auxiliary head on the map of stride 16, mmseg's numbers elsewhere."""
    config = FdUperNetConfig(
        backbone_config=maps,
        hidden_size=channels,
        auxiliary_loss_weight=auxiliary_weight,
        auxiliary_channels=min(channels, 256),
        dropout=dropout,
    )
    config.num_labels = classes
    return config


def mask2former_config(
    maps: StudentMapsConfig,
    classes: int,
    channels: int,
    queries: int,
    decoder_layers: int,
    encoder_layers: int,
    points: int,
) -> Mask2FormerConfig:
    """A Mask2Former of `channels`, the reference's numbers elsewhere.

    transformers counts the prediction before the first layer as a layer.
    """
    config = Mask2FormerConfig(
        backbone_config=maps,
        feature_size=channels,
        mask_feature_size=channels,
        hidden_dim=channels,
        encoder_feedforward_dim=4 * channels,
        dim_feedforward=8 * channels,
        num_queries=queries,
        decoder_layers=decoder_layers + 1,
        encoder_layers=encoder_layers,
        train_num_points=points,
    )
    config.num_labels = classes
    return config


def network_of(config: PreTrainedConfig) -> Any:
    """The network of a configuration, on the meta device: shapes alone."""
    with torch.device("meta"):
        return _class_of(config)(config)


def save_network(
    config: PreTrainedConfig, state: Mapping[str, Tensor], folder: Path, short_side: int, long_side: int
) -> None:
    """Write configuration, weights (by the network's own names) and image processor."""
    logging.disable_progress_bar()
    model = network_of(config)
    model.load_state_dict(state, strict=True, assign=True)
    model.save_pretrained(folder)
    _image_processor(config, short_side, long_side).save_pretrained(folder)


def load_network(folder: Path, device: str = "cpu") -> PreTrainedModel:
    """The network of a folder that `save_network` has written; on the meta device shapes alone.

    Raises UserError where that is not what the folder holds.
    """
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if device == "meta":
            shapes: PreTrainedModel = network_of(config)
            return shapes
        loaded, info = _class_of(config).from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: no segmenter that can be read: {_first_line(error)}; {SAVED_BY}") from error
    if wrong := [*info["missing_keys"], *info["unexpected_keys"]]:
        raise UserError(f"{folder}: weights are missing, or left over: {', '.join(sorted(wrong)[:3])}; {SAVED_BY}")
    found: PreTrainedModel = loaded
    return found


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]


def _image_processor(config: PreTrainedConfig, short_side: int, long_side: int) -> Any:
    """Images resized so that the short side is this, the long one at most that; pixels in [0, 1], not normalised."""
    kind: Any = SegformerImageProcessor if isinstance(config, FdUperNetConfig) else Mask2FormerImageProcessor
    return kind(
        size={"shortest_edge": short_side, "longest_edge": long_side},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=False,
        do_reduce_labels=True,
    )


def _class_of(config: PreTrainedConfig) -> Any:
    return UperNet if isinstance(config, FdUperNetConfig) else Mask2FormerForUniversalSegmentation


AutoConfig.register(StudentMapsConfig.model_type, StudentMapsConfig)
AutoBackbone.register(StudentMapsConfig, StudentMaps)
AutoConfig.register(FdUperNetConfig.model_type, FdUperNetConfig)
AutoModelForSemanticSegmentation.register(FdUperNetConfig, UperNet)
