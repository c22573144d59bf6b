"""The design of the study: which networks are trained, on what, and what each needs before it can begin. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fdscale.config.programs import AnySettings
from fdscale.config.recipe import load_recipe
from fdscale.config.settings import StudentSettings

RECIPES = Path(__file__).parent / "recipes"
TRAINED: tuple[str, ...] = ("supervised", "contrastive", "distill", "finetune")  # kinds with a recipe
TEACHERS: tuple[str, ...] = ("contrastive", "supervised")
TEACHER, FULL, SCRATCH = "teacher", "distilled", "random"
ABLATIONS: dict[str, tuple[str, ...]] = {  # what takes an ingredient out of a distillation
    "without whitening": ("target.whiten=false",),
    "without shared bias": ("student.position_bias=per_block",),
    "without drop path": ("student.drop_path=0.0",),
}
VARIANTS = {FULL: (), **ABLATIONS}
WEIGHTS = "student.safetensors"
BEFORE, AFTER = "before", "after"  # teacher, and what was distilled from it
LOOKED = (BEFORE, AFTER, SCRATCH)  # what a diagnosis looks at; the last is the control
QUICK = {  # the two-minute cut: everything is done, nothing is learned
    "supervised": ("steps=12", "optim.warmup_steps=2"),
    "contrastive": ("steps=12", "optim.warmup_steps=2"),
    "distill": ("steps=8", "optim.warmup_steps=2"),
    "finetune": ("steps=8", "optim.warmup_steps=2"),
}
LOOK, QUICK_LOOK = (256, 5), (16, 2)  # images and directions


@dataclass(frozen=True)
class Task:
    """One thing that a worker does: a run through `fit()` (`kind` in TRAINED), a `probe`, or to `diagnose`.

    `name` is its folder below the study's runs; `network` says which of a seed's networks it is about: the `teacher`
    of the kind `of`, what was `distilled` from it, with or without an ingredient, or `random` weights (`of` is "").
    `overrides` go on top of its kind's recipe; `files` are weights that it looks at. A probe of random weights has the
    overrides of their fine-tuning, from which it makes its file.
    """

    name: str
    kind: str
    seed: int
    of: str
    network: str
    needs: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Design:
    """Everything that decides the numbers: shards, how many classes they have, seeds, settings by kind of run.

    Fingerprints are those of the indices (`Index.fingerprint`), wherever the shards lie. The diagnostics look at so
    many held-out `images`, and along so many `directions` of the loss landscape. In a `quick` study nothing is learned.
    """

    shards: str
    held_out: str
    shards_fingerprint: str
    held_out_fingerprint: str
    classes: int
    seeds: tuple[int, ...]
    overrides: Mapping[str, tuple[str, ...]]
    images: int = LOOK[0]
    directions: int = LOOK[1]
    quick: bool = False

    def own(self, kind: str) -> tuple[str, ...]:
        """What the user sets for every run of a kind."""
        return self.overrides.get(kind, ())


def tasks_of(design: Design, runs: Path) -> list[Task]:
    """Every task, seed by seed, each after those that it needs."""
    return [task for seed in design.seeds for task in _of_seed(design, runs, seed)]


def _of_seed(design: Design, runs: Path, seed: int) -> Iterator[Task]:
    trained = list(_trained(design, runs, seed))
    yield from trained
    yield from _scratch(design, runs, seed)
    for task in trained:
        yield _finetuned(design, runs, task)
    for task in trained:
        if task.network in (TEACHER, FULL):
            yield _probe(runs, task)
    for kind in TEACHERS:
        yield _look(runs, seed, kind)


def _trained(design: Design, runs: Path, seed: int) -> Iterator[Task]:
    """Teachers, and what is distilled from each."""
    for kind in TEACHERS:
        classes = (f"classes={design.classes}",) if kind == "supervised" else ()
        yield _run(design, runs, _name(seed, kind, TEACHER), kind, seed, kind, TEACHER, (), classes)
    for kind in TEACHERS:
        teacher = _name(seed, kind, TEACHER)
        for variant, changes in VARIANTS.items():
            weights = f"teacher.weights={runs / teacher / WEIGHTS}"
            name = _name(seed, kind, variant)
            yield _run(design, runs, name, "distill", seed, kind, variant, (teacher,), (weights, *changes))


def _finetuned(design: Design, runs: Path, start: Task) -> Task:
    """The fine-tuning of what a run has trained; a student's shared position biases are untied, as officially."""
    given = [f"classes={design.classes}", f"student.weights={runs / start.name / WEIGHTS}"]
    if start.kind == "distill":
        given.append("student.position_bias=per_block")
    name = f"{start.name}_finetuned"
    return _run(design, runs, name, "finetune", start.seed, start.of, start.network, (start.name,), given)


def _scratch(design: Design, runs: Path, seed: int) -> Iterator[Task]:
    """The student's network with the very weights with which the seed's distillations begin: fine-tuned, and probed."""
    shape = [*_of_student(load_settings(design, "distill").student), f"classes={design.classes}"]
    tuned = _run(design, runs, _name(seed, SCRATCH, "finetuned"), "finetune", seed, "", SCRATCH, (), shape)
    yield tuned
    file = runs / _name(seed, SCRATCH, "probed") / WEIGHTS
    yield Task(_name(seed, SCRATCH, "probed"), "probe", seed, "", SCRATCH, (), tuned.overrides, (str(file),))


def _of_student(student: StudentSettings) -> Iterator[str]:
    yield from (f"student.name={student.name}", "student.position_bias=per_block")
    if student.image_size is not None:
        yield f"student.image_size={student.image_size}"
    yield from (f"student.geometry.{name}={value}" for name, value in student.geometry.items())


def _run(
    design: Design,
    runs: Path,
    name: str,
    kind: str,
    seed: int,
    of: str,
    network: str,
    needs: tuple[str, ...],
    given: Sequence[str],
) -> Task:
    data = (f"data.shards={design.shards}", f"eval.shards={design.held_out}")
    where = (f"run_dir={runs / name}", f"seed={seed}", f"deepspeed={RECIPES / 'one_rank.json'}")
    return Task(name, kind, seed, of, network, needs, (*data, *design.own(kind), *given, *where))


def _probe(runs: Path, task: Task) -> Task:
    """A look at frozen features, before anything was fine-tuned."""
    files = (str(runs / task.name / WEIGHTS),)
    return Task(f"{task.name}_probed", "probe", task.seed, task.of, task.network, (task.name,), (), files)


def _look(runs: Path, seed: int, kind: str) -> Task:
    """Diagnostics of a teacher, of what was distilled from it with every ingredient, and of random weights."""
    trained = [_name(seed, kind, network) for network in (TEACHER, FULL)]
    tuned = (*(f"{name}_finetuned" for name in trained), _name(seed, SCRATCH, "finetuned"))
    needs = (*trained, _name(seed, SCRATCH, "probed"), *tuned)
    files = tuple(str(runs / name) for name in needs)
    return Task(f"{_name(seed, kind, 'diagnosed')}", "diagnose", seed, kind, FULL, needs, (), files)


def load_settings(design: Design, kind: str) -> AnySettings:
    """The settings of a kind of run, as far as they do not differ from run to run."""
    deepspeed = f"deepspeed={RECIPES / 'one_rank.json'}"
    return load_recipe(str(RECIPES / f"{kind}.toml"), [deepspeed, *design.own(kind)])


def _name(seed: int, kind: str, network: str) -> str:
    return f"seed_{seed}/{kind}_{network.replace(' ', '_')}"
