"""`fdscale models`: every row of the tables is there, readable in a terminal, and true."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise

import pytest
from rich.console import Console

from fdscale.config.errors import UserError
from fdscale.models import models_tables
from fdscale.students.geometry import STUDENTS
from fdscale.teachers.table import TEACHERS


def printed(kind: str, width: int = 100) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        for table in models_tables(kind):
            console.print(table)
    return capture.get()


def rows(text: str) -> dict[str, list[str]]:
    """The cells of both lines of each row, by name."""
    lines = [line.split() for line in text.splitlines()]
    return {line[0]: line[1:] + after for line, after in pairwise(lines) if line}


def test_every_teacher_is_listed_with_what_one_needs_to_choose() -> None:
    found = rows(printed("teachers"))
    assert found["dinov3_vit_7b16"] == [
        *("6,716.0", "4096", "16x16+5", "3,549.3", "DINOv3"),
        *("vit_7b_patch16_dinov3.lvd1689m", "at", "256", "px", "License"),
    ]
    assert found["clip_vit_b16_open_clip"][5:7] == ["ViT-B-16-quickgelu.openai", "(open_clip)"]
    assert found["esvit_swin_b"][3:7] == ["32.6", "MIT", "swin_base_patch4_window7_224", "(your"]
    for name, spec in TEACHERS.items():
        assert found[name][0] == f"{spec.parameters() / 1e6:,.1f}"
        assert spec.licence.split()[0] in found[name]


def test_every_student_is_listed() -> None:
    found = rows(printed("students"))
    assert found["swinv2_g"] == [
        *("2,997.8", "4096", "8x8", "1,330.8"),
        *("SwinTransformerV2,", "2-2-42-4", "blocks,", "window", "16", "at", "256", "px"),
    ]
    assert found["vit_b16"][4:] == ["Beit,", "12", "blocks,", "12", "heads,", "patch", "16", "at", "224", "px"]
    assert set(STUDENTS) <= set(found)


@pytest.mark.parametrize("width", [80, 100, 140])
def test_nothing_is_cut_off(width: int) -> None:
    text = printed("all", width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert "…" not in text
    assert {*TEACHERS, *STUDENTS} <= set(rows(text))


def test_names_of_timm_stand_in_one_piece_at_100_columns() -> None:
    text = printed("teachers")
    assert all(f"  {spec.model}.{spec.pretrained} " in text for spec in TEACHERS.values() if spec.pretrained)


def test_families_are_set_apart() -> None:
    vits, swins, _ = re.split(r"\n +\n", printed("students").partition("─ \n")[2])
    assert [name for name in STUDENTS if name in rows(vits)] == [name for name in STUDENTS if name.startswith("vit")]
    assert [name for name in STUDENTS if name in rows(swins)] == [name for name in STUDENTS if name.startswith("swin")]


def test_all_is_both() -> None:
    assert printed("all") == printed("teachers") + printed("students")


def test_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match=r"models: got 'teacher'; did you mean 'teachers'\?; allowed: teachers, st"):
        models_tables("teacher")


def test_no_torch_is_needed() -> None:
    code = "import sys; from fdscale.models import models_tables; models_tables('all'); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
