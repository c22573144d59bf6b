"""A folder of shards behind a URL: its index, and its shards as files of the node's cache; no torch of our own.

What comes from a URL is not trusted: an index may name plain files only, says which bytes they hold, and is read as
data. A changed index is another data set, in another folder of the cache.
"""

from __future__ import annotations

import hashlib
import logging
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, ValidationError

from fdscale.config.errors import UserError
from fdscale.config.kinds import Settings
from fdscale.data.index import INDEX_FILE, SAMPLES_FILE, VERSION, Index, Shard, read_index
from fdscale.data.order import LANES, lanes_of
from fdscale.data.remote.cache import GIB, RENEWED_SECONDS, Cache, Fill
from fdscale.data.remote.transfer import fetch_bytes, fetch_file
from fdscale.data.remote.urls import SHARD_NAME, readable_name, refuse_url, url_of

log = logging.getLogger(__name__)

LARGEST_INDEX = 2**28  # bytes of index.json: more than a million shards
Count = Annotated[int, Field(gt=0, lt=2**48)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _File(Settings):
    bytes: Count
    sha256: Sha256


class _Shard(_File):
    name: Annotated[str, Field(pattern=f"^{SHARD_NAME}$")]
    samples: Count
    rows_crc: Annotated[int, Field(ge=0, lt=2**32)]


class _Manifest(Settings):
    """What index.json must be for anything else to be opened by it."""

    version: Annotated[int, Field(ge=VERSION, le=VERSION)]
    samples: Count
    classes: tuple[str, ...] | None
    samples_file: _File
    shards: Annotated[tuple[_Shard, ...], Field(min_length=1)]


@dataclass(frozen=True)
class RemoteShards:
    """The shards of a data set whose home is `url`, as files of its `folder` in the cache.

    Who reads on from one asks for it again after `renewed_seconds`, which tells the cache that it is in use.
    """

    renewed_seconds: ClassVar[float] = RENEWED_SECONDS

    url: str
    folder: Path
    shards: tuple[Shard, ...]
    cache: Cache
    _mended: set[int] = field(default_factory=set, init=False, repr=False, compare=False)

    def ready(self, shard: int) -> Path:
        """The path of a shard, fetched first where it is not there; to be opened at once, as it may be removed again.

        Raises UserError where it cannot be fetched, is not what was indexed, or finds no room.
        """
        return self.cache.keep(*self._wanted(shard))

    def ahead(self, shard: int) -> bool:
        """Fetch a shard that will be needed; False where only shards in use would make room. Raises as `ready`."""
        return self.cache.keep_ahead(*self._wanted(shard))

    def mend(self, shard: int) -> None:
        """Have a shard fetched again on its next use, where its file in the cache is no longer the one indexed.

        Each process looks at a shard once: one that is as indexed does not fit its rows, and never will.
        """
        path = self.folder / self.shards[shard].name
        if shard in self._mended:
            return
        self._mended.add(shard)
        with suppress(FileNotFoundError), path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != self.shards[shard].sha256:
                log.warning("%s is damaged in the cache and is fetched again; check the disk of data.cache", path)
                path.unlink()

    def _wanted(self, shard: int) -> tuple[Path, int, Fill]:
        expected = self.shards[shard]
        fill = _filling(self.url, expected.name, expected.bytes, expected.sha256, self.cache)
        return self.folder / expected.name, expected.bytes, fill


def open_remote(url: str, cache: Cache | None) -> Index:
    """The index of the shards in the folder behind a URL, kept in the cache, into which its shards are fetched on use.

    The URL is asked at each start: it alone says which data set this is. Raises UserError for a URL that may not be
    opened or does not answer, without a cache, and for an index that is damaged or names anything but shards.
    """
    if cache is None:
        raise UserError(
            f"the shards of {url} are fetched to the nodes that read them: set data.cache to a folder on a disk of the "
            "node's own, such as /local/shards"
        )
    refuse_url(url, cache.allow_pipe)
    content = fetch_bytes(url_of(url, INDEX_FILE), LARGEST_INDEX, cache.allow_pipe)
    rows = _checked(url_of(url, INDEX_FILE), content).samples_file
    folder = cache.made(f"{readable_name(url)}-{hashlib.sha256(content).hexdigest()[:16]}", url)
    cache.keep(folder / SAMPLES_FILE, rows.bytes, _filling(url, SAMPLES_FILE, rows.bytes, rows.sha256, cache))
    cache.keep(folder / INDEX_FILE, len(content), lambda file: file.write(content))
    index = read_index(folder)
    return replace(index, remote=RemoteShards(url, folder, index.shards, cache))


def room_problem(cache: Cache, needed: int) -> str | None:
    """What to tell where the shards that a node reads at once, of `needed` bytes, do not fit into the cache."""
    if needed <= cache.limit:
        return None
    least = f"{needed / GIB:.3g}"
    return (
        f"data.cache_gib: got {cache.limit / GIB:.3g}, allowed: at least {least}, what a node reads at once and would "
        "fetch again and again; or lower data.shuffle, or make the shards smaller"
    )


def bytes_at_once(index: Index, shuffle: int, share: float) -> int:
    """Bytes of the shards that a node reads at once which has this share of the ranks; all of them, at most.

    One window of each of its lanes (`order.WindowedOrder`), which begins and ends within a shard, and a quarter more:
    lanes do not move on together, and the next windows' shards come early. A cache below that fetches everything many
    times over.
    """
    total, shards = sum(shard.bytes for shard in index.shards), len(index.shards)
    if len(index) <= shuffle:
        return total
    at_once = share * (shuffle * shards / len(index) + lanes_of(shards, LANES))
    return ceil(min(1.0, 1.25 * at_once / shards) * total)


def _checked(url: str, content: bytes) -> _Manifest:
    again = "make it again where the shards lie ('fdscale shards index'), and leave it and samples.npy beside them"
    try:
        manifest = _Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where, got = ".".join(map(str, first["loc"])) or "as a whole", repr(first["input"])[:80]
        raise UserError(f"{url} is no index of shards ({where}: {first['msg']}, got {got}); {again}") from error
    if len({shard.name for shard in manifest.shards}) < len(manifest.shards):
        raise UserError(f"{url} is no index of shards (it names one twice); {again}")
    return manifest


def _filling(url: str, name: str, size: int, sha256: str, cache: Cache) -> Fill:
    """Fills a file of the cache with the one of this name."""
    return lambda file: fetch_file(url_of(url, name), file, size, sha256, cache.allow_pipe)
