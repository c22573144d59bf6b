"""What the shard folders of a recipe hold, and whether batch, schedule and labels fit them; torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fdscale.config.errors import UserError, attempt
from fdscale.config.programs import ShardSettings
from fdscale.config.settings import FinetuneSettings, RunSettings
from fdscale.data.index import Index, load_index
from fdscale.data.randaugment import refuse_unknown_policy

DIGITS = "digits"  # the embedded sample, packed on first use
DIGITS_CLASSES = 10
SPLITS = ("data.shards", "eval.shards")


@dataclass(frozen=True)
class DataFacts:
    """Shards, samples and steps of the training data; None where they are packed on first use."""

    index: Index | None
    shards: int | None
    samples: int | None
    steps_per_epoch: int | None
    steps: int | None


def data_facts(settings: ShardSettings) -> DataFacts:
    """Read the training index; raises UserError as `load_index` does."""
    if settings.data.shards == DIGITS:
        return DataFacts(None, None, None, None, None)
    index = _named_index("data.shards", settings.data.shards)
    labelled = settings.labelled if isinstance(settings, FinetuneSettings) else None
    used = min(len(index), labelled or len(index))
    steps_per_epoch = used // settings.data.global_batch
    return DataFacts(index, len(index.shards), len(index), steps_per_epoch, settings.total_steps(steps_per_epoch))


def data_problems(settings: ShardSettings, facts: DataFacts | None) -> Iterator[str]:
    """Every disagreement between the recipe and its shards, one sentence each."""
    yield from _held_out_problems(settings)
    yield from _size_problems(settings, facts)
    if isinstance(settings, FinetuneSettings):
        yield from _label_problems(settings, facts)


def augment_problems(settings: ShardSettings, micro_batch: int) -> list[str]:
    """What cannot be done to the images as the settings ask, one sentence each."""
    problems: list[str] = []
    if not isinstance(settings, FinetuneSettings):
        if settings.eval.normalisation != "training":
            problems.append("eval.normalisation: it is fine-tuning that may be evaluated otherwise; leave it out")
        return problems
    augment = settings.augment
    policy = augment.randaugment
    if policy is not None:
        attempt(lambda: refuse_unknown_policy(policy), problems)
    if augment.mix_probability > 0 and max(augment.mixup, augment.cutmix) > 0 and micro_batch % 2:
        problems.append(
            f"augment.mixup, augment.cutmix: images are mixed in pairs, but train_micro_batch_size_per_gpu is "
            f"{micro_batch}; allowed: even numbers, or set both to 0"
        )
    return problems


def _named_index(where: str, folder: str) -> Index:
    try:
        return load_index(folder)
    except UserError as error:
        raise UserError(f'{where}: {error} (allowed: a shard folder with its index, or "{DIGITS}")') from error


def schedule_problems(settings: RunSettings, facts: DataFacts | None) -> Iterator[str]:
    """What is wrong with rates and warm-up, one sentence each."""
    optim, length = settings.optim, facts.steps if facts is not None and facts.steps else settings.steps
    if settings.epochs is not None and optim.warmup_epochs >= settings.epochs:
        yield (
            f"optim.warmup_epochs: got {optim.warmup_epochs:g}, "
            f"allowed: less than the {settings.epochs:g} epochs of the run"
        )
    if length is not None and optim.warmup_steps >= length:
        yield f"optim.warmup_steps: got {optim.warmup_steps}, allowed: less than the {length} steps of the run"
    for name in ("warmup_lr", "min_lr"):
        if getattr(optim, name) > optim.lr:
            yield f"optim.{name}: got {getattr(optim, name):g}, allowed: at most optim.lr = {optim.lr:g}"


def _held_out_problems(settings: ShardSettings) -> Iterator[str]:
    every = settings.eval.every
    if settings.eval.shards is None:
        if every:
            yield f"eval.every: got {every} without eval.shards; name a held-out folder, or set it to 0"
    elif settings.eval.shards != DIGITS:
        try:
            _named_index("eval.shards", settings.eval.shards)
        except UserError as error:
            yield str(error)


def _size_problems(settings: ShardSettings, facts: DataFacts | None) -> Iterator[str]:
    global_batch = settings.data.global_batch
    labelled = settings.labelled if isinstance(settings, FinetuneSettings) else None
    samples = facts.samples if facts is not None else None
    if labelled is not None and labelled < global_batch:
        yield f"labelled: got {labelled}, allowed: at least one global batch of {global_batch} images"
    if samples is None:
        return
    if labelled is not None and labelled > samples:
        yield f"labelled: got {labelled}, allowed: at most the {samples} samples of data.shards"
    if samples < global_batch:
        yield f"data.global_batch: got {global_batch}, allowed: at most the {samples} samples of data.shards"


def _label_problems(settings: FinetuneSettings, facts: DataFacts | None) -> Iterator[str]:
    digits = DIGITS in (settings.data.shards, settings.eval.shards)
    if digits and settings.classes < DIGITS_CLASSES:
        yield f"classes: got {settings.classes}, but the embedded digits have {DIGITS_CLASSES}"
    held_out = settings.eval.shards
    named: dict[str, Index | None] = {"data.shards": facts.index if facts is not None else None}
    if held_out not in (None, DIGITS):
        named["eval.shards"] = attempt(lambda: load_index(str(held_out)), [])  # what is wrong with it was told
    for where, index in named.items():
        if index is not None:
            yield from _labels_out_of_range(where, index, settings.classes)
    trained, evaluated = (None if index is None else index.classes for index in (named.get(w) for w in SPLITS))
    if trained is not None and evaluated is not None and trained != evaluated:
        yield _other_classes(settings, trained, evaluated)


def _labels_out_of_range(where: str, index: Index, classes: int) -> Iterator[str]:
    labels = index.samples["label"]
    missing, highest = int((labels < 0).sum()), int(labels.max())
    if missing:
        yield f"{where}: {missing} of {len(labels)} samples have no label; fine-tuning needs one for each"
    if highest >= classes:
        yield f"classes: got {classes}, but {where} has label {highest}; allowed: at least {highest + 1}"


def _other_classes(settings: FinetuneSettings, trained: Sequence[str], evaluated: Sequence[str]) -> str:
    """Class folders that the two splits do not share move the numbers of all that follow."""
    missing, unknown = sorted(set(trained) - set(evaluated)), sorted(set(evaluated) - set(trained))
    lists = (("without", missing), ("with unknown", unknown))
    told = ", ".join(f"{how} {', '.join(names[:3])}" for how, names in lists if names) or "in another order"
    remedy = f"`fdscale shards pack FOLDER OUTPUT --classes-of {settings.data.shards}`"
    return (
        f"eval.shards: its {len(evaluated)} classes are not the {len(trained)} of data.shards ({told}), so that one "
        f"number means two classes; pack it again with {remedy}"
    )
