"""What measuring costs: the time inside metrics code, steps with it and without it in turn, and one scrape of a node.

`python -m pytest -m prove tests/prove/test_metrics_cost.py -s` writes docs/measurements/metrics_cost.json and .md.
"""

from __future__ import annotations

import io
import random
import statistics
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from fdscale.build.networks import prepare_teacher
from fdscale.cluster.ranks import StopSignals
from fdscale.config.deepspeed_json import load_deepspeed_json
from fdscale.config.settings import TeacherSettings
from fdscale.data.batches import Batch
from fdscale.distill.distiller import Distiller, Lesson
from fdscale.distill.layout import TokenLayout
from fdscale.distill.targets import TargetMaker
from fdscale.students.geometry import SwinV2Geometry
from fdscale.students.student import build_student, set_activation_checkpointing
from fdscale.training import loop
from fdscale.training.amplitudes import Amplitudes
from fdscale.training.endpoint import Endpoint
from fdscale.training.engine import Connection, set_learning_rate, start_engine
from fdscale.training.guards import Guards
from fdscale.training.live import Live
from fdscale.training.metrics import METRICS, STATES, counters
from fdscale.training.optim import Schedule, adamw, parameter_groups
from fdscale.training.phases import PHASES, Phases
from fdscale.training.progress import Progress
from fdscale.training.prometheus import application, registry_of
from fdscale.training.sinks import Sinks, open_sinks
from tests.prove.page import Page
from tests.training.first_attempt import first_attempt

pytestmark = [pytest.mark.prove, pytest.mark.timeout(1500)]

GOAL, SCRAPE_GOAL = 0.005, 0.050  # of a step; seconds
STEPS, PAIRS = 10, 40  # a row of metrics every ten steps, as the recipes have it
ROWS, SIZE = 4, 64
STUDENT = SwinV2Geometry(48, (2, 2, 4, 2), (2, 4, 8, 16), window_size=4, image_size=SIZE, extra_norm_period=2)
SMALL = {"embed_dim": 128, "depth": 4, "num_heads": 4, "patch_size": 32}
TEACHER = TeacherSettings(name="dino_vit_s16", weights="random", image_size=SIZE, geometry=SMALL)
SCHEDULE = Schedule(10_000, 10, peak=1e-3)


class Batches:
    """The same batch for ever: what is measured here is not the loader."""

    data_wait_seconds, fetched_bytes = 0.0, 0

    def steps(self, first: int, last: int) -> Iterator[list[Batch]]:
        unused = torch.zeros(ROWS)
        for _ in range(first, last):
            yield [Batch(unused, unused, unused, slice(0, ROWS), [])]


class NoSaves:
    """In the place of checkpoints, which are not what is measured."""

    def save(self, engine: Any, step: int, state: dict[str, Any]) -> None:
        pass


def distilling(connection: Connection, placement: str = "replicated") -> tuple[Any, Any, Callable[..., Any]]:
    """An engine that distils under ZeRO-3, its student, and what one batch means."""
    config = load_deepspeed_json("laptop") | {"train_micro_batch_size_per_gpu": ROWS}
    student = build_student(STUDENT, 0.2, seed=1)
    set_activation_checkpointing(student, "blocks")
    teacher = prepare_teacher(TEACHER, "random", torch.float32)
    targets = TargetMaker(TokenLayout(teacher.grid, 1), TokenLayout(student.grid, 0), prefix_tokens="drop")
    distiller = Distiller(student, student.width, [Lesson("teacher", teacher.width, targets)], beta=2.0)
    optimizer = adamw(parameter_groups(distiller, 0.05, set()), 1e-3, (0.9, 0.999), 1e-8)
    engine = start_engine(distiller, optimizer, config, 1, clip=3.0)
    pixels = torch.rand(ROWS, 3, SIZE, SIZE)

    def terms(engine: Any, batch: Batch, step: int) -> dict[str, Tensor]:
        return engine(pixels, [targets(teacher(pixels))], torch.rand(student.drop_path_sites, ROWS))

    return engine, student, terms


def in_turn(connection: Connection, folder: str) -> dict[str, list[float]]:
    """Seconds a step of rank 0 with all metrics, and without any, in pairs of ten steps each in random order."""
    engine, student, terms = distilling(connection)
    live, progress, chance = Live({"recipe": "cost"}), Progress(), random.Random(0)
    live.note(counters())
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    console = Console(file=io.StringIO())
    guards = Guards(connection, first_attempt(folder).folder, 900, 3, live)
    guards.amplitudes = Amplitudes(student.backbone)
    with served(connection, live):
        sinks = open_sinks(connection.rank, Path(folder), "distill", 10_000, None, console, live)
        for pair in range(PAIRS + 1):  # the first pair is the warm-up
            for kind in chance.sample(sorted(seconds), 2):
                run = with_metrics if kind == "with" else without
                taken = timed(connection, lambda run=run: run(engine, terms, connection, sinks, progress, guards))
                seconds[kind] += [taken / STEPS] if pair else []
        sinks.close()
    engine.destroy()
    return seconds


def timed(connection: Connection, action: Callable[[], object]) -> float:
    connection.barrier()
    began = time.perf_counter()
    action()
    connection.barrier()
    return time.perf_counter() - began


def with_metrics(
    engine: Any, terms: Any, connection: Connection, sinks: Sinks, progress: Progress, guards: Guards
) -> None:
    """The loop itself, up to its next row."""
    last = progress.step + STEPS
    plan = loop.Plan(last, 1000, ROWS * 2, STEPS, 0, 0, 100_000, 0.1)
    everything = (engine, terms, Batches(), SCHEDULE, plan, connection, NoSaves(), sinks, progress)
    with guards:
        loop.fit(*everything, StopSignals(), None, guards)


def without(engine: Any, terms: Any, connection: Connection, sinks: Sinks, progress: Progress, guards: Guards) -> None:
    """The same steps and the same agreement on stopping; of metrics only the hooks of the blocks, which sleep."""
    for batches in Batches().steps(progress.step, progress.step + STEPS):
        set_learning_rate(engine, SCHEDULE, progress.step)
        loop.train_step(engine, terms, batches, progress.step)
        progress.step += 1
        dist.all_reduce(torch.tensor([0, 0]), group=connection.control)


@contextmanager
def served(connection: Connection, live: Live) -> Iterator[None]:
    """An endpoint on rank 0 that another process scrapes every five seconds; Prometheus would every fifteen."""
    if not connection.rank.is_main:
        yield
        return
    with closing(Endpoint(application(registry_of(live, "cost", True)), "127.0.0.1", 0)) as endpoint:
        loop = f"while sleep 5; do curl -s -o /dev/null http://127.0.0.1:{endpoint.port}/metrics; done"
        scraper = subprocess.Popen(["sh", "-c", loop], start_new_session=True)
        yield
        scraper.kill()
        scraper.wait()


def inside(connection: Connection, folder: str) -> dict[str, float]:
    """Seconds a step inside metrics code, on this rank: each call of it measured, contexts by their own cost."""
    engine, student, terms = distilling(connection)
    live, progress, spent = Live(), Progress(), {"calls": 0.0, "contexts": 0}
    live.note(counters())
    guards = Guards(connection, first_attempt(folder).folder, 900, 3, live)
    guards.amplitudes = Amplitudes(student.backbone)
    sinks = open_sinks(connection.rank, Path(folder), "distill", 10_000, None, Console(file=io.StringIO()), live)
    with_metrics(engine, terms, connection, sinks, progress, guards)  # the warm-up
    with counted(spent):
        began = time.perf_counter()
        for _ in range(5):
            with_metrics(engine, terms, connection, sinks, progress, guards)
        step = (time.perf_counter() - began) / STEPS / 5
    sinks.close()
    engine.destroy()
    context = cost_of_a_context(guards.phase)
    steps = 5 * STEPS
    return {
        "step": step,
        "calls": spent["calls"] / steps,
        "contexts": spent["contexts"] / steps,
        "context_seconds": context,
        "inside": (spent["calls"] + spent["contexts"] * context) / steps,
    }


@contextmanager
def counted(spent: dict[str, float]) -> Iterator[None]:
    """Every function that measures or tells is timed where it is called from training; contexts are counted.

    Of those that wait for other ranks (the rows' collectives) the wait is in it: an upper bound.
    """
    timed_ones = [(Live, "note"), (Sinks, "write"), (Phases, "row"), (Amplitudes, "_see"), (Amplitudes, "terms")]
    timed_ones += [(loop, "_row")]
    originals = [(owner, name, getattr(owner, name)) for owner, name in timed_ones]
    phase, depth = Phases.__call__, [0]
    for owner, name, function in originals:
        setattr(owner, name, clocked(function, spent, depth))

    def counting(self: Phases, of: str) -> Any:
        spent["contexts"] += 1
        return phase(self, of)

    Phases.__call__ = counting  # type: ignore[method-assign]
    yield
    Phases.__call__ = phase  # type: ignore[method-assign]
    for owner, name, function in originals:
        setattr(owner, name, function)


def clocked(function: Any, spent: dict[str, float], depth: list[int]) -> Any:
    @wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        depth[0] += 1
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            depth[0] -= 1
            if not depth[0]:  # one within another is counted once
                spent["calls"] += time.perf_counter() - began

    return inner


def cost_of_a_context(phase: Phases) -> float:
    """Seconds of entering and leaving one, that of the collective's wrapper included."""
    began = time.perf_counter()
    for _ in range(20_000):
        with phase("collective"):
            pass
    return (time.perf_counter() - began) / 20_000


def node_of_64_ranks() -> Live:
    """A main node with every metric of the table, for 64 ranks, 4 stages and 3 teachers."""
    live = Live({"attempt": "3", "recipe": "swinv2_g"})
    labels = {"stage": range(4), "teacher": ("clip", "dino", "mae"), "phase": PHASES, "rank": range(64)}
    values: dict[str, float] = dict(counters())
    for metric in METRICS.values():
        names = [metric.name]
        for label in metric.labels:
            names = [f"{name}/{value}" for name in names for value in labels.get(label, ("one",))]
        if metric.kind == "gauge" and metric.labels != ("state",):
            values |= {name: random.random() * 1e9 for name in names}
    live.note(values)
    live.enter(STATES[2])
    return live


def scrapes() -> dict[str, Any]:
    with closing(Endpoint(application(registry_of(node_of_64_ranks(), "cost", True)), "127.0.0.1", 0)) as endpoint:
        address = f"http://127.0.0.1:{endpoint.port}/metrics"
        taken, text = [], b""
        for _ in range(100):
            began = time.perf_counter()
            with urllib.request.urlopen(address) as answer:
                text = answer.read()
            taken.append(time.perf_counter() - began)
    series = sum(not line.startswith(b"#") for line in text.splitlines())
    return {"series": series, "bytes": len(text), "seconds": sorted(taken)}


def interval(ratios: list[float], draws: int = 10_000) -> tuple[float, float]:
    """95 % of the medians of resampled pairs."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def write(page: Page) -> None:
    lines = [{"what": key, "figure": row["told"], "goal": row["goal"]} for key, row in page.rows.items()]
    how = (
        "Distillation of a 4-stage SwinV2 with extra norms by two ZeRO-3 ranks on CPUs, activations recomputed, a row "
        "of metrics every 10 steps, amplitudes of every block, collectives timed, an endpoint scraped every 5 s. "
        f"With and without: {PAIRS} pairs of {STEPS} steps in random order within one process; without, the same steps "
        "run by hand with no metrics code but the blocks' sleeping hooks."
    )
    page.write_table("What measuring costs", how, ("what", "figure", "goal"), lines)


@pytest.fixture(scope="module")
def page() -> Page:
    return Page("metrics_cost")


def test_time_inside_metrics_code(page: Page, fresh_ranks: Any, tmp_path: Path) -> None:
    def measure() -> dict[str, Any]:
        found = fresh_ranks(2)(inside, str(tmp_path), timeout=1200)
        share = max(rank["inside"] / rank["step"] for rank in found)
        worst = max(found, key=lambda rank: rank["inside"] / rank["step"])
        told = (
            f"{share:.2%} of a step of {worst['step'] * 1e3:.0f} ms: {worst['inside'] * 1e6:.0f} µs, of which "
            f"{worst['contexts']:.0f} timed contexts at {worst['context_seconds'] * 1e6:.1f} µs"
        )
        return {"ranks": found, "share": share, "told": told, "goal": "0.5 %"}

    row = page.row("inside metrics code, slower rank", measure)
    write(page)
    assert row["share"] <= GOAL


def test_steps_with_and_without(page: Page, fresh_ranks: Any, tmp_path: Path) -> None:
    def measure() -> dict[str, Any]:
        found = fresh_ranks(2)(in_turn, str(tmp_path), timeout=1200)[0]
        ratios = [a / b for a, b in zip(found["with"], found["without"], strict=True)]
        low, high = interval(ratios)
        ratio = statistics.median(ratios)
        told = (
            f"{ratio - 1:+.2%} (95 %: {low - 1:+.2%} to {high - 1:+.2%}); medians "
            f"{statistics.median(found['with']) * 1e3:.1f} and {statistics.median(found['without']) * 1e3:.1f} ms"
        )
        return {**found, "ratio": ratio, "interval": [low, high], "told": told, "goal": "its interval"}

    row = page.row("a step with metrics over one without", measure)
    write(page)
    assert row["interval"][0] <= 1 + 2 * GOAL, "clearly slower"


def test_a_scrape_of_64_ranks(page: Page) -> None:
    def measure() -> dict[str, Any]:
        found = scrapes()
        median = statistics.median(found["seconds"])
        told = f"{median * 1e3:.1f} ms, longest of 100 {found['seconds'][-1] * 1e3:.1f} ms; {found['series']} series"
        return {**found, "median": median, "told": told, "goal": "50 ms"}

    row = page.row("a scrape of a node of 64 ranks", measure)
    write(page)
    assert row["median"] < SCRAPE_GOAL
