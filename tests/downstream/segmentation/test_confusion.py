"""mIoU is torchmetrics', digit by digit, where something is absent, ignored, or nothing is left."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_jaccard_index,
)

from fdscale.config.errors import UserError
from fdscale.downstream.segmentation.confusion import confusion_of, iou_of, metrics_of


def a_case(seed: int) -> tuple[int, Tensor, Tensor]:
    """Classes, predictions and labels: some classes absent, some pixels ignored; every tenth map wholly."""
    drawn = torch.Generator().manual_seed(seed)
    classes = int(torch.randint(2, 12, (), generator=drawn))
    present = int(torch.randint(1, classes + 1, (), generator=drawn))
    size = tuple(torch.randint(1, 9, (2,), generator=drawn).tolist())
    labels = torch.randint(present, size, generator=drawn)
    predicted = torch.where(
        torch.rand(size, generator=drawn) < 0.5, labels, torch.randint(classes, size, generator=drawn)
    )
    ignored = torch.rand(size, generator=drawn) < (2.0 if seed % 10 == 0 else 0.3)
    return classes, predicted, labels.masked_fill(ignored, 255).to(torch.uint8)


def test_it_is_torchmetrics_on_a_thousand_cases() -> None:
    for seed in range(1000):
        classes, predicted, labels = a_case(seed)
        target = labels.long()
        counts = confusion_of(predicted, labels, classes)
        assert torch.equal(counts, multiclass_confusion_matrix(predicted, target, classes, ignore_index=255))
        found = metrics_of(counts)
        if not (labels != 255).any():
            assert all(math.isnan(value) for value in found.values())
            continue
        theirs = multiclass_jaccard_index(predicted, target, classes, "none", ignore_index=255, zero_division=math.nan)
        torch.testing.assert_close(iou_of(counts).float(), theirs, rtol=1e-6, atol=1e-6, equal_nan=True)
        macro = multiclass_jaccard_index(predicted, target, classes, "macro", ignore_index=255)
        assert found["miou"] == pytest.approx(float(macro), abs=1e-6)
        pixels = multiclass_accuracy(predicted, target, classes, "micro", ignore_index=255)
        assert found["pixel_accuracy"] == pytest.approx(float(pixels), abs=1e-6)
        of_classes = multiclass_accuracy(predicted, target, classes, "none", ignore_index=255)
        labelled = counts.sum(dim=1) > 0
        assert found["mean_accuracy"] == pytest.approx(float(of_classes[labelled].mean()), abs=1e-6)


def test_labels_that_are_no_class_are_refused() -> None:
    with pytest.raises(UserError, match=r"labels up to 3: classes = 3 allows 0 to 2 and 255"):
        confusion_of(torch.tensor([0, 1]), torch.tensor([3, 255]), 3)
