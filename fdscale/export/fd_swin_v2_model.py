"""SwinV2 with extra norms as a transformers model; an export has it in one file with the network's own source."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from fdscale.students.swin_v2 import SwinV2


class FdSwinV2Config(PreTrainedConfig):
    """`network` are the keywords of SwinV2 beside `img_size`, which is `image_size`: a number or (height, width)."""

    model_type = "fd_swin_v2"

    def __init__(self, network: dict[str, Any] | None = None, image_size: Any = 256, **others: Any) -> None:
        self.network, self.image_size = network or {}, image_size
        super().__init__(**others)


class FdSwinV2PreTrainedModel(PreTrainedModel):
    """SwinV2 under `network`; its windows are fitted to `config.image_size`."""

    config_class = FdSwinV2Config
    base_model_prefix = "network"
    main_input_name = "pixel_values"
    network: Any

    def __init__(self, config: FdSwinV2Config) -> None:
        super().__init__(config)
        device = torch.empty(0).device  # meta, while weights are about to be loaded
        self.network = SwinV2(img_size=config.image_size, **config.network, device=device)

    def _init_weights(self, module: nn.Module) -> None:
        """What no file holds: coordinates, indices and masks."""
        make_buffers: Any = getattr(module, "init_non_persistent_buffers", None)
        if make_buffers is not None:
            make_buffers()

    def tokens(self, pixel_values: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> (B, h*w, C)."""
        return self.network(pixel_values).flatten(1, 2)


class FdSwinV2Model(FdSwinV2PreTrainedModel):
    """The student: tokens after the final norm, and their mean."""

    def __init__(self, config: FdSwinV2Config) -> None:
        super().__init__(config)
        self.post_init()

    def forward(self, pixel_values: Tensor, **others: Any) -> BaseModelOutputWithPooling:
        tokens = self.tokens(pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens.mean(dim=1))


class FdSwinV2ForImageClassification(FdSwinV2PreTrainedModel):
    """The student with its classifier: the mean of the tokens, a linear head."""

    def __init__(self, config: FdSwinV2Config) -> None:
        super().__init__(config)
        classes: Any = config.num_labels
        self.classifier = nn.Linear(self.network.num_features, classes)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **others: Any) -> ImageClassifierOutput:
        logits = self.classifier(self.tokens(pixel_values).mean(dim=1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
