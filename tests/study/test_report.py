"""The report from results that were made up: cells, verdicts, figures, one page without other files."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fdscale.diagnostics.rows import Measurement, write_rows
from fdscale.study import tables
from fdscale.study.claims import CLAIMS
from fdscale.study.conduct import RESULTS
from fdscale.study.report import write_report
from fdscale.study.results import Result, append, read_results
from fdscale.study.tasks import AFTER, BEFORE, FULL, Design, Task, tasks_of

DESIGN = Design("the/train", "the/test", 10, (0, 1, 2), {})
SHAPES = ("head_similarity", "attention_diagonality", "attention_offset_share", "attention_column_share")


def made_up(task: Task) -> Result:
    """Distilled students are 2, 3 and 4 points better than everything else, which has 80, 81 and 82."""
    better = 0.02 + 0.01 * task.seed if task.network == FULL else 0.0
    values = {"eval_accuracy": 0.8 + 0.01 * task.seed + better, "steps": 10, "images": 320}
    values |= {"linear_accuracy": 0.7, "knn_accuracy": 0.6}
    for name in (*SHAPES, "attention_distance_spread", "sharpness"):
        values |= {f"{BEFORE}.{name}": 0.5 + task.seed, f"{AFTER}.{name}": 0.4 + task.seed + 0.001 * task.seed}
    return Result(task.name, task.kind, task.seed, task.of, task.network, values, 100.0, 7.0, 6.0, 2**29)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("study")
    for task in tasks_of(DESIGN, output / "runs"):
        append(made_up(task), output / RESULTS)
        if task.kind == "diagnose":
            (output / "runs" / task.name).mkdir(parents=True)
            write_rows(measurements(task.seed), output / "runs" / task.name / "measurements.jsonl")
            maps = {f"{model}/{block}": np.eye(9)[None] for model in (BEFORE, AFTER) for block in range(3)}
            np.savez(output / "runs" / task.name / "maps.npz", **maps)
    write_report(DESIGN, "abc1234", read_results(output / RESULTS), output)
    return output


def measurements(seed: int) -> list[Measurement]:
    rows = []
    for model in (BEFORE, AFTER):
        for layer in range(3):
            rows += [
                Measurement(model, "attention_distance", 5.0 + head + seed, "px", 9, layer=layer, head=head)
                for head in range(2)
            ]
            rows += [Measurement(model, name, 0.1 * layer, "", 9, layer=layer) for name in SHAPES]
        for direction in range(2):
            rows += [
                Measurement(model, "landscape_loss", at * at, "nats", 9, direction=direction, at=(at,))
                for at in (-1.0, 0.0, 1.0)
            ]
    return rows


def test_the_tables_have_means_intervals_and_verdicts(study: Path) -> None:
    results = read_results(study / RESULTS)
    found = dict(row[:2] for row in tables.verdicts(results).rows)
    assert len(found) == len(CLAIMS)
    assert found["Feature distillation improves fine-tuning"] == "*reproduced*: +3.00 (+0.52 to +5.48) points"
    assert found["A linear probe does not gain: it loses"] == "*inconclusive*: +0.000 (+0.000 to +0.000) points"
    assert found["Averaged attention maps are more diagonal"].startswith("*not reproduced at this scale*: -0.099")
    main = {row[0]: row[1:] for row in tables.main_table(results).rows}
    assert main["contrastive teacher"] == ("81.0 ± 2.5 %", "70.0 ± 0.0 %", "60.0 ± 0.0 %")
    assert main["distilled from the contrastive teacher"][0] == "84.0 ± 5.0 %"
    assert tables.ablations(results).rows[1][:3] == (
        "without whitening",
        "81.0 ± 2.5 %",
        "+3.00 (+0.52 to +5.48) points",
    )
    assert tables.budgets(results).rows[2] == ("distillation", "24", "10", "320", "7.0")


def test_every_table_is_as_wide_as_its_head(study: Path) -> None:
    results = read_results(study / RESULTS)
    makers = (tables.verdicts, tables.main_table, tables.ablations, tables.diagnostics, tables.budgets)
    for table in (make(results) for make in makers):
        assert {len(row) for row in table.rows} == {len(table.head)}


class Page(HTMLParser):
    """Which tags are open, which files are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.asked: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.asked += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_holds_its_figures_and_closes_what_it_opens(study: Path) -> None:
    page = Page()
    page.feed((study / "report.html").read_text())
    assert page.open == []
    assert len(page.asked) == 6
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in page.asked)


def test_the_markdown_leads_to_figures_that_exist(study: Path) -> None:
    text = (study / "report.md").read_text()
    linked = re.findall(r"\]\(([^)]+)\)", text)
    assert len(linked) == 6
    assert "Begun at commit abc1234" in text
    assert all((study / link).is_file() and (study / link).with_suffix(".svg").is_file() for link in linked)


def test_a_study_that_is_half_done_has_a_report(tmp_path: Path) -> None:
    some = [made_up(task) for task in tasks_of(DESIGN, tmp_path) if task.kind != "diagnose" and task.seed == 0]
    write_report(DESIGN, "", some, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "*inconclusive*: +2.00 points" in text  # of one seed there is no interval
    assert "figures/heads.png" not in text


def test_a_torn_row_is_left_out_and_the_last_of_a_task_counts(tmp_path: Path) -> None:
    task = tasks_of(DESIGN, tmp_path)[0]
    append(made_up(task), tmp_path / RESULTS)
    append(Result(*(made_up(task).__dict__ | {"values": {"loss": 1.0}}).values()), tmp_path / RESULTS)
    with (tmp_path / RESULTS).open("a") as rows:
        rows.write('{"task": "seed_0/')
    assert [row.values for row in read_results(tmp_path / RESULTS)] == [{"loss": 1.0}]
