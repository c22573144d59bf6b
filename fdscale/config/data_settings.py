"""Settings of what is read and how: the batch of every program, and the shards of those that read shards."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from fdscale.config.kinds import Count, Fraction, Fractions, Label, Name, Positive, Ratios, Settings

Weight = Annotated[float, Field(gt=0)] | None
FIRST = "data.shards"


class BatchSettings(Settings):
    """The images of one step over all ranks, and how they are read; what every program's data has."""

    global_batch: Positive
    flip: Fraction = 0.5
    workers: Count = 2
    max_bad_ratio: Fraction = 0.01


class FurtherShardSettings(Settings):
    """Shards beside the first ones; `weight` is their share of each global batch, relative to the others'."""

    shards: Name
    weight: Weight = None


class DataSettings(BatchSettings):
    """Training shards, how they are mixed and kept, and the augmentation.

    `shards` is a folder, or a URL of one that webdataset opens, whose shards are fetched into `cache`, a folder of the
    node's own, of at most `cache_gib`; `pipe:` runs a shell, which `allow_pipe` allows. Without any `weight`, data
    sets are read in proportion to what they hold. `shuffle` samples are mixed at a time; fewer are shuffled as one.
    Augmentation draws a new view of a sample each epoch, or one of so many `views`.
    """

    shards: Name
    weight: Weight = None
    further_shards: dict[Label, FurtherShardSettings] = {}
    shuffle: Positive = 2**18
    views: Positive | None = None
    cache: Name | None = None
    cache_gib: Annotated[float, Field(gt=0)] = 100.0
    allow_pipe: bool = False
    crop_scale: Fractions = (0.08, 1.0)
    crop_ratio: Ratios = (3 / 4, 4 / 3)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    @field_validator("further_shards")
    @classmethod
    def _weighed_together(
        cls, further: dict[str, FurtherShardSettings], others: ValidationInfo
    ) -> dict[str, FurtherShardSettings]:
        weights = {"data.weight": others.data.get("weight")}
        weights |= {f"data.further_shards.{name}.weight": one.weight for name, one in further.items()}
        missing = [name for name, weight in weights.items() if weight is None]
        if 0 < len(missing) < len(weights):
            raise ValueError(f"a weight of each data set (not set: {', '.join(missing)}), or of none")
        return further

    @property
    def data_sets(self) -> dict[str, tuple[str, float | None]]:
        """Where each data set lies, and its weight, by the setting that names it; the first one first."""
        further = {f"data.further_shards.{name}.shards": one for name, one in sorted(self.further_shards.items())}
        return {FIRST: (self.shards, self.weight), **{name: (one.shards, one.weight) for name, one in further.items()}}
