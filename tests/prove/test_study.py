"""The paper in miniature, in full: `make study` in runs/study, and its report as docs/measurements/study.md.

`python -m pytest -m prove tests/prove/test_study.py`; a study that is there is gone on with, and one that is finished
is taken as it is, as long as nothing that it measures has changed since.
"""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from fdscale.study.claims import KNN
from fdscale.study.conduct import DESIGN, RESULTS, conduct, design_of
from fdscale.study.report import FIGURES, MARKDOWN
from fdscale.study.results import by_seed, read_results
from fdscale.study.tasks import FULL, SCRATCH, TEACHER, TEACHERS
from tests.prove.page import PAGES, REPOSITORY, machine

pytestmark = [pytest.mark.prove, pytest.mark.timeout(5400)]

STUDY, SEEDS, WORKERS, MINUTES = REPOSITORY / "runs" / "study", 5, 2, 30
IMAGES = REPOSITORY / "docs" / "images"
DRAWN = [f"study/{name}.py" for name in ("report", "pictures", "plots", "tables")]
DRAWN += ["diagnostics/plots.py", "diagnostics/page.py"]
ELSEWHERE = ["bench", "cluster", "commands", "export", "importing", "recipes", "cli.py", "doctor.py", "fetch.py"]
ELSEWHERE += ["models.py", "plan.py", "postmortem.py", "summary.py", "terminal.py", "data/progress.py"]
MEASURED = ["fdscale", *(f":(exclude)fdscale/{name}" for name in DRAWN + ELSEWHERE)]  # what can change a number


def test_the_study_in_full() -> None:
    conduct(design_of(None, range(SEEDS), {}, False, STUDY), STUDY, WORKERS)
    commit = json.loads((STUDY / DESIGN).read_text())["commit"]
    changed = subprocess.run(["git", "diff", "--quiet", commit, "--", *MEASURED], cwd=REPOSITORY, check=False)
    assert changed.returncode == 0, f"{STUDY} began at {commit}, and what it measures has changed: remove it"
    publish()
    results = read_results(STUDY / RESULTS)
    assert sum(row.cpu_seconds for row in results) / WORKERS < 60 * MINUTES  # by the clock, it may have been stopped
    scratch = by_seed(results, "probe", "", SCRATCH, KNN)
    for of in TEACHERS:
        for network in (TEACHER, FULL):  # all of them have learned something to look at
            learned = by_seed(results, "probe", of, network, KNN)
            assert all(learned[seed] > scratch[seed] + 0.1 for seed in range(SEEDS)), (of, network)


def publish() -> None:
    """The report among the measurements, its figures among the docs' images, its rows beside."""
    text = (STUDY / MARKDOWN).read_text().replace(f"]({FIGURES}/", "](../images/study_")
    text = text.replace(f"`{STUDY}/digits/", "`digits/")
    (PAGES / "study.md").write_text(f"{text}\nGiven by {machine()}.\n")
    shutil.copyfile(STUDY / RESULTS, PAGES / "study.jsonl")
    for figure in (STUDY / FIGURES).glob("*.png"):
        shutil.copyfile(figure, IMAGES / f"study_{figure.name}")
