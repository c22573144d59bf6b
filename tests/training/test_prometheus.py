"""What a scrape reads: the latest values under their run, whatever its name, and soon."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Metric, generate_latest
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from fdscale.training.live import Live
from fdscale.training.metrics import INFO, METRICS, STATES
from fdscale.training.prometheus import registry_of

ODD = ['q"uo"te', "new\nline", "back\\slash", "ends in \\", 'a="b",{c}', "ünï ☃ 火", "# HELP x", "\r\x85\t", "x" * 4000]
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def families(live: Live, run: str = "swinv2_g [1]", whole: bool = True) -> list[Metric]:
    return list(text_string_to_metric_families(generate_latest(registry_of(live, run, whole)).decode()))


def scrape(live: Live, run: str = "swinv2_g [1]", whole: bool = True) -> dict[str, tuple[str, float, dict[str, str]]]:
    found = families(live, run, whole)
    return {s.name: (family.type, s.value, s.labels) for family in found for s in family.samples}


def everything(ranks: int = 2) -> dict[str, float]:
    """A value of every metric that is handed over, per rank where it is a rank's."""
    values = {}
    for metric in METRICS.values():
        if metric.kind == "info" or metric.name == "run_state":
            continue
        names = [metric.name]
        for label in metric.labels:
            members = [str(rank) for rank in range(ranks)] if label == "rank" else [f"{label}{n}" for n in range(6)]
            names = [f"{name}/{member}" for name in names for member in members]
        values |= dict.fromkeys(names, 1 / 3)
    return values


def test_a_scrape_shows_the_latest_values_under_their_run():
    live = Live()
    live.note({"step": 10, "loss": 0.25, "bad_samples_total": 2})
    live.note({"step": 20, "loss": 0.125})
    run = {"run": "swinv2_g [1]"}
    served = scrape(live)
    assert served.pop("fdscale_run_info")[2].items() >= run.items()
    assert served.pop("fdscale_run_state")[2].items() >= run.items()
    assert served == {
        "fdscale_step": ("gauge", 20.0, run),
        "fdscale_loss": ("gauge", 0.125, run),
        "fdscale_bad_samples_total": ("counter", 2.0, run),
    }


def test_every_metric_is_served_under_its_own_name_with_its_labels():
    live = Live()
    live.note(everything())
    served = scrape(live)
    assert set(served) == {metric.prometheus_name for metric in METRICS.values()}
    for metric in METRICS.values():
        kind, _, labels = served[metric.prometheus_name]
        assert (kind == "counter") == (metric.kind == "counter")
        assert set(labels) == {"run", *metric.labels}
    for family in families(live):
        assert family.documentation, family.name


def test_a_node_without_the_main_rank_serves_its_own_ranks_alone():
    live = Live()
    live.note(everything())
    assert set(scrape(live, whole=False)) == {m.prometheus_name for m in METRICS.values() if m.scope == "node"}


def test_one_state_is_on_and_what_runs_is_in_the_labels_of_info():
    live = Live({"commit": "abc", "recipe": "broken \udcff name"})
    live.enter("saving")
    found = {family.name: family.samples for family in families(live)}
    states = {sample.labels["state"]: sample.value for sample in found["fdscale_run_state"]}
    assert states == {state: float(state == "saving") for state in STATES}
    (info,) = found["fdscale_run_info"]
    assert (info.value, info.labels["commit"], info.labels["recipe"]) == (1, "abc", "broken ? name")
    assert set(info.labels) == {"run", *INFO}


def test_what_is_measured_of_several_things_is_one_metric_with_a_label():
    live = Live()
    live.note({"teacher_loss/clip": 0.25, "teacher_loss/dino": 0.125, "loss": 0.5})
    (family,) = [family for family in families(live) if family.name == "fdscale_teacher_loss"]
    assert {sample.labels["teacher"]: sample.value for sample in family.samples} == {"clip": 0.25, "dino": 0.125}


@pytest.mark.parametrize("run", ODD)
def test_odd_names_come_out_as_they_are(run):
    assert scrape(Live(), run)["fdscale_run_state"][2]["run"] == run


@given(run=TEXT, commit=TEXT, value=st.floats())
def test_any_name_and_any_value_come_out_as_they_are(run, commit, value):
    live = Live({"commit": commit})
    live.note({"loss": value})
    openmetrics, _ = choose_encoder("application/openmetrics-text;version=1.0.0")
    registry = registry_of(live, run, True)
    for parse, text in (
        (text_string_to_metric_families, generate_latest(registry)),
        (parse_openmetrics, openmetrics(registry)),
    ):
        found = {sample.name: sample for family in parse(text.decode()) for sample in family.samples}
        assert found["fdscale_loss"].labels == {"run": run}
        assert repr(found["fdscale_loss"].value) == repr(value)
        assert found["fdscale_run_info"].labels["commit"] == commit


def test_a_large_node_is_rendered_within_a_twentieth_of_a_second():
    live = Live()
    live.note(everything(ranks=64))
    registry, seconds = registry_of(live, "run", True), []
    for _ in range(10):
        began = time.perf_counter()
        text = generate_latest(registry)
        seconds.append(time.perf_counter() - began)
    assert text.count(b"\n") > 64 * 9
    assert min(seconds) < 0.05
