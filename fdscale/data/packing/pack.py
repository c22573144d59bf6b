"""Any source to shards: what `fdscale shards pack` does; no torch before it writes."""

from __future__ import annotations

import logging
from pathlib import Path

from fdscale.data.index import Index
from fdscale.data.packing.classes import numbered_as
from fdscale.data.packing.imagenet import Split
from fdscale.data.packing.layouts import open_source
from fdscale.data.packing.plan import refuse_taken
from fdscale.data.packing.shards import MAX_BAD_RATIO, write_shards
from fdscale.data.processes import import_once

LOG = logging.getLogger(__name__)


def pack(
    source: str | Path,
    output: str | Path,
    samples_per_shard: int = 1000,
    seed: int = 0,
    split: Split | None = None,
    classes_of: str | Path | None = None,
    workers: int = 1,
    max_bad_ratio: float = MAX_BAD_RATIO,
) -> Index:
    """Pack a folder of images, one of ImageNet's layouts or existing tars into `output` (new or empty).

    `split` chooses between train and val where the source has both; classes are numbered by name, or as in the shards
    `classes_of`. `workers` processes list and write. Raises UserError as `open_source` and `write_shards` do.
    """
    refuse_taken(Path(output))
    import_once("webdataset", "fdscale.data.packing.shards")
    files = open_source(Path(source), split, workers)
    if classes_of is not None:
        files = numbered_as(files, Path(classes_of), str(source))
    LOG.info("%s", files.about)
    return write_shards(files, Path(output), samples_per_shard, seed, workers, max_bad_ratio)
