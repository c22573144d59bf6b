"""`fdscale`, with the keys of the samples that each step really trained on written down: SEEN/rank_K.jsonl."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from fdscale.cli import main
from fdscale.training import loop


def observe(folder: Path, rank: str) -> None:
    """Note every step's samples before it is trained on."""
    train_step = loop.train_step

    def noted(engine: Any, terms: Any, batches: Any, step: int, phase: Any) -> Any:
        with (folder / f"rank_{rank}.jsonl").open("a") as file:
            for batch in batches:
                file.write(json.dumps({"step": step, "row": batch.rows.start, "keys": batch.keys.tolist()}) + "\n")
        return train_step(engine, terms, batches, step, phase)

    loop.train_step = noted


if __name__ == "__main__":
    observe(Path(os.environ["SEEN"]), os.environ["RANK"])
    sys.exit(main())
