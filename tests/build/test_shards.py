"""What a run reads, as its settings say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fdscale.build.shards import shards_of
from fdscale.config.recipe import load_recipe
from fdscale.data.packing.digits import pack_digits
from fdscale.training.run_directory import RunDirectory


def test_few_labels_are_few_before_a_run_counts_its_steps(tmp_path: Path) -> None:
    """The same ones for one seed: whether a run is complete is told by the steps of what it trains on."""
    folder, nobody = pack_digits(tmp_path / "digits", "test").folder, None
    given = [f"data.shards={folder}", "labelled=50"]

    def keys(*more: str) -> Any:
        settings = load_recipe("digits_finetune", [*given, *more])
        mixture, _ = shards_of(settings)(RunDirectory(tmp_path / "run"), nobody)  # type: ignore[arg-type]
        (index,) = mixture.indices
        return index.samples["key"]

    assert len(keys()) == 50
    assert np.array_equal(keys(), keys())
    assert not np.array_equal(keys(), keys("seed=1"))
