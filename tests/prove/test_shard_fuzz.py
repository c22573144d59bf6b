"""Two thousand mutated shard folders: indexed, loaded, trained on and verified, in processes of bounded memory.

`python -m pytest -m prove tests/prove/test_shard_fuzz.py` writes docs/measurements/shard_fuzz.json and shard_fuzz.md.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.data.examined import MEMORY, examine_all
from tests.prove.page import Page

pytestmark = [pytest.mark.prove, pytest.mark.timeout(3000), pytest.mark.filterwarnings("ignore")]

CASES, TOGETHER = 2000, 500
MEASURED = ("fdscale/data", "tests/data", "tests/prove/test_shard_fuzz.py")
ENDED = ("read", "refused when indexed", "refused when loaded", "refused when read")
HOW = (
    "Each folder has two shards of five labelled images of twelve kinds (CMYK, 16 bits, animated, EXIF-rotated, …), to "
    "which up to four things were done by a seeded generator: names that lead out, huge, negative and duplicate "
    "members, links, other labels, headers of gigabytes, images that are none, cut off, flipped or bombs; bytes of the "
    "tar flipped, cut, zeroed, inserted, copied, appended; and after it was indexed, or under the run, its tars and "
    "its index changed. A process "
    f"has {MEMORY // 2**20} MiB beyond what it starts with. Every sample is seen with the pixels and the label that it "
    "had when it was indexed, or it is named, by training, by evaluation and by `fdscale shards verify` alike; or the "
    "folder is refused in one sentence that names the file."
)


def row_of(first: int, folder: Path) -> dict[str, Any]:
    cases = examine_all(range(first, first + TOGETHER), folder)
    wrong = [f"{case.number} {case.done}: {case.wrong}" for case in cases if case.wrong]
    return {
        **{name: Counter(case.ended for case in cases)[name] for name in ENDED},
        "samples read": sum(case.read for case in cases),
        "samples named": sum(case.bad for case in cases),
        "peak MiB of a process": max(case.mebibytes for case in cases),
        "slowest s": round(max(case.seconds for case in cases), 2),
        "wrong": len(wrong),
        "what is wrong": wrong[:5],
        "mutations": len({name for case in cases for name in case.done}),
        "held": not wrong and len(cases) == TOGETHER,
    }


def test_every_sample_of_two_thousand_mutated_folders_is_read_or_named(tmp_path: Path) -> None:
    page = Page("shard_fuzz", MEASURED)
    rows = {
        f"{first} to {first + TOGETHER - 1}": page.row(
            f"{first} to {first + TOGETHER - 1}", lambda first=first: row_of(first, tmp_path)
        )
        for first in range(0, CASES, TOGETHER)
    }
    columns = [*ENDED, "samples read", "samples named", "peak MiB of a process", "slowest s", "wrong"]
    lines = [{"cases": name, **{column: str(row[column]) for column in columns}} for name, row in rows.items()]
    page.write_table("Mutated shards", HOW, ["cases", *columns], lines)
    assert [row["what is wrong"] for row in rows.values() if not row["held"]] == []
