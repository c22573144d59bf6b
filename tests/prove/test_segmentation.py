"""Three ranks, which divide nothing evenly, evaluate a divided segmenter as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.downstream.segmentation.test_evaluation import SLIDING, as_by_one_process

pytestmark = pytest.mark.prove


@pytest.mark.parametrize(("head", "kind"), [("upernet", "vit"), ("mask2former", "swin_v2")])
def test_three_ranks_evaluate_as_one(head: str, kind: str, fresh_ranks: Any, tmp_path: Path) -> None:
    as_by_one_process(head, kind, SLIDING, fresh_ranks(3), tmp_path)
