"""How fast the loader is beside plain webdataset with torchvision, and beside what decoding alone costs.

Each way reads the same images with the same number of processes, in turns, again and again; medians are told.
"""

from __future__ import annotations

import io
import multiprocessing
import statistics
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader

from fdscale.bench.parts import Row
from fdscale.data.augment import Augmentation, crop_box
from fdscale.data.batches import TrainBatches
from fdscale.data.draws import Draws, Purpose
from fdscale.data.images import ImageReader
from fdscale.data.index import Index
from fdscale.data.loader import TrainLoader
from fdscale.data.mixture import Mixture

SIZE, BATCH = 224, 64
SCALE, RATIO, FLIP = (0.08, 1.0), (3 / 4, 4 / 3), 0.5
WARM_UP = 4  # batches

WAYS = {
    "fdscale": "fdscale's loader",
    "webdataset": "webdataset and torchvision",
    "bare": "decode, crop and flip alone",
    "decode": "decode alone",
}

Rate = Callable[[], float]


def loader_rates(index: Index, workers: int, images: int, repeats: int) -> Row:
    """Images/s of each way, medians of `repeats` turns of about `images` images, and what they are to one another."""
    ways: dict[str, Rate] = {
        "fdscale": lambda: _rate(_ours(index, workers, images // BATCH), images // BATCH),
        "webdataset": lambda: _rate(_webdataset(index, workers, images // BATCH), images // BATCH),
        "bare": lambda: _bare_rate(_crop_and_flip, index, workers, images),
        "decode": lambda: _bare_rate(_decode, index, workers, images),
    }
    turns: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, rate in ways.items():
            turns[name].append(rate())
    medians = {name: statistics.median(rates) for name, rates in turns.items()}
    ratios = {f"to {name}": _paired(turns["fdscale"], turns[name]) for name in ("webdataset", "bare", "decode")}
    size = sum(shard.bytes for shard in index.shards) / len(index)
    return {"workers": workers, "images": len(index), "bytes_per_image": size, "turns": turns, **medians, **ratios}


def _paired(ours: list[float], other: list[float]) -> float:
    """The median ratio of two ways in the same turn: what disturbs a machine disturbs both."""
    return statistics.median(a / b for a, b in zip(ours, other, strict=True))


def _rate(batches: Generator[Any, None, None], number: int) -> float:
    """Images/s of so many batches, once the workers are under way and before they end."""
    with closing(batches):
        for _ in range(WARM_UP):
            next(batches)
        began = time.perf_counter()
        images = sum(len(next(batches)) for _ in range(number))
        return images / (time.perf_counter() - began)


def _ours(index: Index, workers: int, batches: int) -> Generator[torch.Tensor, None, None]:
    mixture = Mixture((index,))
    views = TrainBatches(mixture, SIZE, Augmentation(SCALE, RATIO, "bilinear", FLIP), 0)
    order = mixture.order(BATCH, 0)
    loader = TrainLoader(views, order, 0, 1, BATCH, workers, torch.device("cpu"))
    return (batch.images for step in loader.steps(0, batches + WARM_UP) for batch in step)


def _webdataset(index: Index, workers: int, batches: int) -> Generator[torch.Tensor, None, None]:
    """As in webdataset's documentation: shards shuffled, samples from a buffer, decoded by PIL, batched in workers."""
    import webdataset as wds
    from torchvision.transforms import Compose, PILToTensor, RandomHorizontalFlip, RandomResizedCrop

    view = Compose([RandomResizedCrop(SIZE, SCALE, RATIO), RandomHorizontalFlip(FLIP), PILToTensor()])
    urls = [str(index.shard_path(shard)) for shard in range(len(index.shards))]
    stream = wds.WebDataset(urls, shardshuffle=len(urls), seed=0, nodesplitter=None).repeat().shuffle(1000)
    samples = stream.decode("pil").to_tuple("jpg", "cls").map_tuple(view, int).batched(BATCH)
    loader = DataLoader(samples, batch_size=None, num_workers=workers)
    return (images for images, _ in _first(loader, batches + WARM_UP))


def _first(loader: Iterable[Any], number: int) -> Iterator[Any]:
    iterator = iter(loader)
    for _ in range(number):
        yield next(iterator)


def _crop_and_flip(data: bytes, draw: Draws) -> None:
    """What has to be done for a view, with Pillow and nothing else."""
    with Image.open(io.BytesIO(data)) as image:
        box = crop_box(image.width, image.height, SCALE, RATIO, draw)
        view = image.crop(box).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        if draw.random() < FLIP:
            view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _decode(data: bytes, draw: Draws) -> None:
    with Image.open(io.BytesIO(data)) as image:
        image.load()


def _bare_rate(work: Callable[[bytes, Draws], None], index: Index, workers: int, images: int) -> float:
    """Images/s of so many processes that do `work` on images that they hold in memory, and give nothing back."""
    context = multiprocessing.get_context("fork")
    pairs = [context.Pipe() for _ in range(workers)]
    each = images // workers
    processes = [
        context.Process(target=_bare, args=(work, index, number, each, theirs))
        for number, (_, theirs) in enumerate(pairs)
    ]
    for process, (_, theirs) in zip(processes, pairs, strict=True):
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
    for ours, _ in pairs:
        ours.recv()  # its images are read
    began = time.perf_counter()
    for ours, _ in pairs:
        ours.send("begin")
    for ours, _ in pairs:
        ours.recv()
    seconds = time.perf_counter() - began
    for process in processes:
        process.join()
    return workers * each / seconds


def _bare(work: Callable[[bytes, Draws], None], index: Index, number: int, images: int, rank: Connection) -> None:
    reader, draw = ImageReader(index), Draws(0, number, 0, Purpose.VIEW)
    held = [reader.read(place % len(index)) for place in range(number * images, (number + 1) * images)]
    for data in held[:WARM_UP]:
        work(data, draw)
    rank.send("ready")
    rank.recv()
    for place in range(images):
        work(held[place], draw)
    rank.send("done")
