"""What the shard folders of a recipe hold, and whether batch, schedule and labels fit them; torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from fdscale.config.errors import SettingsError, UserError, attempt
from fdscale.config.programs import ShardSettings
from fdscale.config.settings import FinetuneSettings, RunSettings
from fdscale.data.index import Index, load_index
from fdscale.data.mixture import Mixture, mixed
from fdscale.data.randaugment import refuse_unknown_policy
from fdscale.data.remote.cache import Cache, cache_of
from fdscale.data.remote.shards import bytes_at_once, room_problem

DIGITS = "digits"  # the embedded sample, packed on first use
DIGITS_CLASSES = 10


@dataclass(frozen=True)
class DataFacts:
    """Shards, samples and steps of the training data; None where they are packed on first use."""

    mixture: Mixture | None
    shards: int | None
    samples: int | None
    steps_per_epoch: int | None
    steps: int | None


def data_facts(settings: ShardSettings) -> DataFacts:
    """Read the training indices; raises SettingsError with what is wrong with each, as `load_index` tells it."""
    named = settings.data.data_sets
    if any(where == DIGITS for where, _ in named.values()):
        return DataFacts(None, None, None, None, None)
    problems: list[str] = []
    cache = cache_of(settings.data)
    indices = [attempt(partial(_named_index, name, where, cache), problems) for name, (where, _) in named.items()]
    if problems:
        raise SettingsError(problems)
    there = [index for index in indices if index is not None]
    mixture = mixed(there, list(named), [weight for _, weight in named.values()], settings.data.shuffle)
    labelled = settings.labelled if isinstance(settings, FinetuneSettings) else None
    steps_per_epoch = min(len(mixture), labelled or len(mixture)) // settings.data.global_batch
    shards = sum(len(index.shards) for index in there)
    return DataFacts(mixture, shards, len(mixture), steps_per_epoch, settings.total_steps(steps_per_epoch))


def room_problems(settings: ShardSettings, facts: DataFacts | None, share: float) -> Iterator[str]:
    """Whether the cache of a node that has this share of the ranks holds what they read at once."""
    cache = cache_of(settings.data)
    if cache is None or facts is None or facts.mixture is None:
        return
    fetched = [index for index in facts.mixture.indices if index.remote is not None]
    problem = room_problem(cache, sum(bytes_at_once(index, settings.data.shuffle, share) for index in fetched))
    yield from () if problem is None else (problem,)


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


def _named_index(where: str, folder: str, cache: Cache | None) -> Index:
    try:
        return load_index(folder, cache)
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
            _named_index("eval.shards", settings.eval.shards, cache_of(settings.data))
        except UserError as error:
            yield str(error)


def _size_problems(settings: ShardSettings, facts: DataFacts | None) -> Iterator[str]:
    global_batch = settings.data.global_batch
    labelled = settings.labelled if isinstance(settings, FinetuneSettings) else None
    samples = facts.samples if facts is not None else None
    if labelled is not None and labelled < global_batch:
        yield f"labelled: got {labelled}, allowed: at least one global batch of {global_batch} images"
    if samples is None or facts is None:
        return
    if labelled is not None and labelled > samples:
        yield f"labelled: got {labelled}, allowed: at most the {samples} samples of data.shards"
    if samples < global_batch:
        yield f"data.global_batch: got {global_batch}, allowed: at most the {samples} samples of data.shards"
    elif facts.mixture is not None and settings.data.further_shards:
        if labelled is not None:
            yield "labelled: it is data.shards that few are taken of; leave it out, or data.further_shards"
        problems: list[str] = []
        attempt(partial(facts.mixture.order, global_batch, settings.seed), problems)
        yield from problems


def _label_problems(settings: FinetuneSettings, facts: DataFacts | None) -> Iterator[str]:
    digits = DIGITS in (settings.data.shards, settings.eval.shards)
    if digits and settings.classes < DIGITS_CLASSES:
        yield f"classes: got {settings.classes}, but the embedded digits have {DIGITS_CLASSES}"
    held_out = settings.eval.shards
    mixture = facts.mixture if facts is not None else None
    named: dict[str, Index | None] = {}
    if mixture is not None:
        named |= zip(mixture.names, mixture.indices, strict=True)
    if held_out not in (None, DIGITS):
        cache = cache_of(settings.data)
        named["eval.shards"] = attempt(lambda: load_index(str(held_out), cache), [])  # what is wrong was told
    for where, index in named.items():
        if index is not None:
            yield from _labels_out_of_range(where, index, settings.classes)
    trained, *others = [(where, index.classes) for where, index in named.items() if index is not None] or [("", None)]
    for where, classes in others:
        if trained[1] is not None and classes is not None and trained[1] != classes:
            yield _other_classes(settings, where, trained[1], classes)


def _labels_out_of_range(where: str, index: Index, classes: int) -> Iterator[str]:
    labels = index.samples["label"]
    missing, highest = int((labels < 0).sum()), int(labels.max())
    if missing:
        yield f"{where}: {missing} of {len(labels)} samples have no label; fine-tuning needs one for each"
    if highest >= classes:
        yield f"classes: got {classes}, but {where} has label {highest}; allowed: at least {highest + 1}"


def _other_classes(settings: FinetuneSettings, where: str, trained: Sequence[str], others: Sequence[str]) -> str:
    """Class folders that two data sets do not share move the numbers of all that follow."""
    missing, unknown = sorted(set(trained) - set(others)), sorted(set(others) - set(trained))
    lists = (("without", missing), ("with unknown", unknown))
    told = ", ".join(f"{how} {', '.join(names[:3])}" for how, names in lists if names) or "in another order"
    remedy = f"`fdscale shards pack FOLDER OUTPUT --classes-of {settings.data.shards}`"
    return (
        f"{where}: its {len(others)} classes are not the {len(trained)} of data.shards ({told}), so that one "
        f"number means two classes; pack it again with {remedy}"
    )
