"""What the shard folders of a recipe hold, and whether batch, schedule and labels fit them; torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from fdscale.config.data_settings import FIRST
from fdscale.config.errors import UserError, attempt
from fdscale.config.programs import ShardSettings
from fdscale.config.settings import FinetuneSettings, RunSettings
from fdscale.data.index import Index, load_index
from fdscale.data.mixture import Mixture, mixed
from fdscale.data.randaugment import refuse_unknown_policy
from fdscale.data.remote.cache import Cache, cache_of
from fdscale.data.remote.shards import bytes_at_once, room_problem
from fdscale.data.scan import SAMPLE

DIGITS = "digits"  # the embedded sample, packed on first use
DIGITS_CLASSES, DIGITS_SAMPLES = 10, 1348  # those to train on
HELD_OUT = "eval.shards"


@dataclass(frozen=True)
class DataFacts:
    """Shards, samples and steps of the training data; None where they are packed on first use."""

    mixture: Mixture | None
    shards: int | None
    samples: int | None
    steps_per_epoch: int | None
    steps: int | None


def opened_indices(settings: ShardSettings, problems: list[str]) -> dict[str, Index]:
    """The indices that are there already, by the settings that name them; what is wrong with one joins the problems."""
    named = {name: where for name, (where, _) in settings.data.data_sets.items()}
    named |= {HELD_OUT: settings.eval.shards} if settings.eval.shards else {}
    cache = cache_of(settings.data)
    there: dict[str, Index] = {}
    for name, where in named.items():
        index = None if where == DIGITS else attempt(partial(_named_index, name, where, cache), problems)
        there |= {} if index is None else {name: index}
    return there


def data_facts(settings: ShardSettings, indices: Mapping[str, Index]) -> DataFacts | None:
    """What the training indices say; None where one of them could not be opened."""
    named = settings.data.data_sets
    if any(name not in indices for name, (where, _) in named.items() if where != DIGITS):
        return None
    if any(where == DIGITS for where, _ in named.values()):
        return DataFacts(None, None, None, None, None)
    mixture = _mixture(settings, indices)
    labelled = settings.labelled if isinstance(settings, FinetuneSettings) else None
    steps_per_epoch = min(len(mixture), labelled or len(mixture)) // settings.data.global_batch
    shards = sum(len(index.shards) for index in mixture.indices)
    return DataFacts(mixture, shards, len(mixture), steps_per_epoch, settings.total_steps(steps_per_epoch))


def room_problems(settings: ShardSettings, indices: Mapping[str, Index], share: float) -> Iterator[str]:
    """Whether the cache of a node that has this share of the ranks holds what they read at once.

    An evaluation's shards are read whole by each node, time and again.
    """
    cache = cache_of(settings.data)
    if cache is None:
        return
    at_once = [
        sum(shard.bytes for shard in index.shards)
        if name == HELD_OUT
        else bytes_at_once(index, settings.data.shuffle, share)
        for name, index in indices.items()
        if index.remote is not None
    ]
    problem = room_problem(cache, sum(at_once))
    yield from () if problem is None else (problem,)


def data_problems(settings: ShardSettings, facts: DataFacts | None, indices: Mapping[str, Index]) -> Iterator[str]:
    """Every disagreement between the recipe and its shards, one sentence each."""
    if settings.eval.every and settings.eval.shards is None:
        yield f"eval.every: got {settings.eval.every} without eval.shards; name a held-out folder, or set it to 0"
    yield from _size_problems(settings, facts)
    yield from _named_twice(settings, indices)
    yield from _share_problems(settings, facts, indices)
    if isinstance(settings, FinetuneSettings):
        yield from _label_problems(settings, indices)


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


def _named_twice(settings: ShardSettings, indices: Mapping[str, Index]) -> Iterator[str]:
    """Data sets that are the same one, wherever they lie: their weights would not be what is seen of them."""
    names: dict[str, str] = {}
    for name, (where, _) in settings.data.data_sets.items():
        first = names.setdefault(indices[name].fingerprint() if name in indices else where, name)
        if first != name:
            yield f"{name}: got {where}, the same shards as {first}; name them once, with the weight of both"


def _share_problems(settings: ShardSettings, facts: DataFacts | None, indices: Mapping[str, Index]) -> Iterator[str]:
    """What keeps several data sets from making batches together."""
    global_batch = settings.data.global_batch
    if facts is None or not settings.data.further_shards or (facts.samples or global_batch) < global_batch:
        return
    if isinstance(settings, FinetuneSettings) and settings.labelled is not None:
        yield "labelled: it is data.shards that few are taken of; leave it out, or data.further_shards"
    problems: list[str] = []
    attempt(partial(_mixture(settings, indices).rows, global_batch), problems)
    yield from problems


def _mixture(settings: ShardSettings, indices: Mapping[str, Index]) -> Mixture:
    """Of the training data, in which digits that are not packed yet are as many empty rows."""
    named = settings.data.data_sets
    digits = Index(Path(DIGITS), (), None, np.zeros(DIGITS_SAMPLES, SAMPLE))
    there = [indices.get(name, digits) for name in named]
    return mixed(there, list(named), [weight for _, weight in named.values()], settings.data.shuffle)


def _label_problems(settings: FinetuneSettings, indices: Mapping[str, Index]) -> Iterator[str]:
    named = (*(where for where, _ in settings.data.data_sets.values()), settings.eval.shards)
    if DIGITS in named and settings.classes < DIGITS_CLASSES:
        yield f"classes: got {settings.classes}, but the embedded digits have {DIGITS_CLASSES}"
    for where, index in indices.items():
        yield from _labels_out_of_range(where, index, settings.classes)
    trained = indices[FIRST].classes if FIRST in indices else None
    for where, index in indices.items():
        if trained is not None and index.classes is not None and trained != index.classes:
            yield _other_classes(settings, where, trained, index.classes)


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
