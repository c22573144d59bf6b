"""The programs that train, and the settings of each."""

from __future__ import annotations

from fdscale.config.dense_settings import DetectSettings, SegmentSettings
from fdscale.config.settings import DistillSettings, FinetuneSettings

ShardSettings = DistillSettings | FinetuneSettings
DenseSettings = SegmentSettings | DetectSettings
AnySettings = ShardSettings | DenseSettings
PROGRAMS: dict[str, type[AnySettings]] = {
    "distill": DistillSettings,
    "finetune": FinetuneSettings,
    "segment": SegmentSettings,
    "detect": DetectSettings,
}
