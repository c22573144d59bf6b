"""The report from results that were made up: cells, verdicts, figures, one page without other files."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fdscale.config.errors import UserError
from fdscale.diagnostics.rows import Measurement, read_rows, write_rows
from fdscale.study import tables
from fdscale.study.claims import CLAIMS
from fdscale.study.conduct import RESULTS, conduct
from fdscale.study.looking import numbers
from fdscale.study.pictures import _rise
from fdscale.study.report import write_report
from fdscale.study.results import Result, append, read_results
from fdscale.study.tasks import AFTER, BEFORE, FULL, LOOKED, SCRATCH, Design, Task, tasks_of

DESIGN = Design("the/train", "the/test", "a", "b", 10, (0, 1, 2), {})
SHAPES = ("head_similarity", "attention_diagonality", "attention_offset_share", "attention_column_share")


def made_up(task: Task) -> Result:
    """Distilled students are 2, 3 and 4 points better than everything else, which has 80, 81 and 82."""
    better = 0.02 + 0.01 * task.seed if task.network == FULL else 0.0
    values = {"eval_accuracy": 0.8 + 0.01 * task.seed + better, "steps": 10, "images": 320}
    values |= {"linear_accuracy": 0.7, "knn_accuracy": 0.6}
    for name in (*SHAPES, "attention_distance_spread", "sharpness"):
        values |= {f"{BEFORE}.{name}": 0.5 + task.seed, f"{AFTER}.{name}": 0.4 + task.seed + 0.001 * task.seed}
        values |= {f"{SCRATCH}.{name}": 0.1 + task.seed + 0.01 * task.seed}
    return Result(task.name, task.kind, task.seed, task.of, task.network, values, 100.0, 7.0, 6.0, 2**29)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a folder in which there was one more seed, and another place for the shards."""
    output, before = tmp_path_factory.mktemp("study"), replace(DESIGN, seeds=(0, 1, 2, 3), shards="a/train")
    fill(output, before)
    (output / "design.json").write_text(json.dumps({**asdict(before), "commit": "abc1234"}))
    conduct(DESIGN, output, workers=1)
    return output


def asked(study: Path) -> list[Result]:
    return [row for row in read_results(study / RESULTS) if row.seed in DESIGN.seeds]


def fill(output: Path, design: Design = DESIGN) -> None:
    """Everything that a finished study leaves for its report."""
    for task in tasks_of(design, output / "runs"):
        append(made_up(task), output / RESULTS)
        if task.kind == "diagnose":
            (output / "runs" / task.name).mkdir(parents=True)
            write_rows(measurements(task.seed), output / "runs" / task.name / "measurements.jsonl")
            maps = {f"{model}/{block}": np.eye(9)[None] for model in LOOKED for block in range(3)}
            np.savez(output / "runs" / task.name / "maps.npz", **maps)


def measurements(seed: int) -> list[Measurement]:
    rows = []
    for model in LOOKED:
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
    results = asked(study)
    found = dict(row[:2] for row in tables.verdicts(results).rows)
    assert len(found) == len(CLAIMS)
    assert found["Feature distillation improves fine-tuning"] == "*reproduced*: +3.00 (+0.52 to +5.48) points"
    assert found["A linear probe loses"] == "*inconclusive*: +0.000 (+0.000 to +0.000) points"
    assert found["Averaged attention maps are more diagonal"].startswith("*not reproduced at this scale*: -0.099")
    main = {row[0]: row[1:] for row in tables.main_table(results).rows}
    assert main["contrastive teacher"] == ("81.0 ± 2.5 %", "-", "70.0 ± 0.0 %", "60.0 ± 0.0 %")
    assert main["supervised teacher"] == ("81.0 ± 2.5 %", "81.0 ± 2.5 %", "70.0 ± 0.0 %", "60.0 ± 0.0 %")
    assert main["distilled from the contrastive teacher"][0] == "84.0 ± 5.0 %"
    assert tables.ablations(results).rows[1][:3] == (
        "without whitening",
        "81.0 ± 2.5 %",
        "+3.00 (+0.52 to +5.48) points",
    )
    assert tables.budgets(results).rows[2] == ("distillation", "24", "10", "320", "6.0")


def test_every_table_is_as_wide_as_its_head(study: Path) -> None:
    results = asked(study)
    makers = (tables.verdicts, tables.main_table, tables.ablations, tables.diagnostics, tables.budgets)
    for table in (make(results) for make in makers):
        assert {len(row) for row in table.rows} == {len(table.head)}


def test_the_landscape_is_the_rise_from_the_centre() -> None:
    rows = [
        Measurement(AFTER, "landscape_loss", value, "nats", 9, direction=direction, at=(at,))
        for direction, line in enumerate([(3.0, 2.0, 2.5), (5.0, 2.0, 3.5)])
        for at, value in zip((-1.0, 0.0, 1.0), line, strict=True)
    ]
    where, rise = _rise(rows, AFTER)
    assert where.tolist() == [-1, 0, 1]
    assert rise.tolist() == [2, 0, 1]
    assert [part.size for part in _rise([row for row in rows if row.at != (0.0,)], AFTER)] == [0, 0]


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
    assert "Nothing was learned" not in text
    assert "*inconclusive*: +2.00 points" in text  # of one seed there is no interval
    assert "figures/heads.png" not in text


def test_a_torn_row_is_left_out_and_the_last_of_a_task_counts(tmp_path: Path) -> None:
    task = tasks_of(DESIGN, tmp_path)[0]
    append(made_up(task), tmp_path / RESULTS)
    append(Result(*(made_up(task).__dict__ | {"values": {"loss": 1.0}}).values()), tmp_path / RESULTS)
    with (tmp_path / RESULTS).open("a") as rows:
        rows.write('{"task": "seed_0/')
    assert [row.values for row in read_results(tmp_path / RESULTS)] == [{"loss": 1.0}]


def test_random_weights_are_beside_every_diagnostic(study: Path) -> None:
    results = asked(study)
    fewer = dict(row[:2] for row in tables.verdicts(results).rows)["Averaged maps have fewer columns"]
    assert fewer.startswith("*reproduced, but random weights do as well*: -0.099")
    (row,) = (
        row
        for row in tables.diagnostics(results).rows
        if row[:2] == ("sharpness (nats per squared distance)", "contrastive")
    )
    assert row[2:5] == ("1.5", "1.4", "1.11")
    assert row[6].startswith("-0.39 (")


def test_what_is_not_finite_leaves_a_report(tmp_path: Path) -> None:
    """Of the first seed: no number at all of the student, no value of its landscape, maps of NaN."""
    fill(tmp_path)
    results = []
    for row in read_results(tmp_path / RESULTS):
        folder = tmp_path / "runs" / row.task
        if row.seed == 0 and row.kind == "diagnose":
            rows = [
                replace(one, value=None, reason="NaN") if one.model == AFTER and one.measure != SHAPES[0] else one
                for one in read_rows(folder / "measurements.jsonl")
            ]
            write_rows(rows, folder / "measurements.jsonl")
            np.savez(folder / "maps.npz", **{f"{BEFORE}/0": np.full((1, 9, 9), np.nan)})
            row = replace(row, values=dict.fromkeys(row.values, np.nan))
        results.append(row)
    write_report(DESIGN, "", results, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "nan" not in text
    assert "figures/landscape.png" in text
    assert "figures/maps.png" not in text


def test_numbers_that_are_not_there_are_left_out() -> None:
    rows = measurements(0)
    rows.append(Measurement(AFTER, "sharpness", None, "", 9, reason="the loss is NaN"))
    rows.append(Measurement(BEFORE, "sharpness", 2.5, "", 9))
    assert set(numbers(rows, AFTER)) == {"attention_distance_spread", *SHAPES}
    assert numbers(rows, BEFORE)["sharpness"] == 2.5
    broken = [replace(row, value=np.nan) if row.measure == SHAPES[1] else row for row in rows]
    assert set(numbers(broken, AFTER)) == {"attention_distance_spread", *SHAPES} - {SHAPES[1]}


def test_only_the_seeds_that_are_asked_for_are_reported_wherever_their_shards_lie(study: Path) -> None:
    text = (study / "report.md").read_text()
    assert f"{len(tasks_of(DESIGN, study / 'runs'))} runs and measurements on `the/train`" in text
    assert "| contrastive teacher | 3 |" in text
    assert json.loads((study / "design.json").read_text())["seeds"] == [0, 1, 2]


@pytest.mark.parametrize("which", ["shards_fingerprint", "held_out_fingerprint"])
def test_other_shards_are_another_study(which: str, tmp_path: Path) -> None:
    (tmp_path / "design.json").write_text(json.dumps({**asdict(DESIGN), "commit": "abc1234"}))
    other = Design(**{**DESIGN.__dict__, which: "other"})
    with pytest.raises(UserError, match=rf"holds another study:\n  {which}: '[ab]' there, 'other' now"):
        conduct(other, tmp_path, workers=1)


def test_a_quick_study_says_that_nothing_was_learned(tmp_path: Path) -> None:
    some = [made_up(task) for task in tasks_of(DESIGN, tmp_path) if task.kind != "diagnose"]
    write_report(replace(DESIGN, quick=True), "", some, tmp_path)
    assert (tmp_path / "report.md").read_text().splitlines()[2].startswith("*Nothing was learned here*")


@pytest.mark.parametrize("taken", ["design.json.new", "figures"])
def test_what_cannot_be_written_is_told(taken: str, tmp_path: Path) -> None:
    fill(tmp_path)
    if taken == "figures":
        (tmp_path / taken).touch()
    else:
        (tmp_path / taken).mkdir()
    with pytest.raises(UserError, match=rf"{taken}: cannot be written: .*make room or name another --output"):
        conduct(DESIGN, tmp_path, workers=1)
