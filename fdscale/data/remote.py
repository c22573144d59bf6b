"""A folder of shards behind a URL: its index, and its shards as files of the node's cache; no torch of our own.

What comes from a URL is not trusted: an index may name plain files only, says which bytes they hold, and is read as
data. A changed index is another data set, in another folder of the cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from fdscale.config.errors import UserError
from fdscale.config.kinds import Settings
from fdscale.data.cache import GIB, Cache, Fill
from fdscale.data.index import INDEX_FILE, SAMPLES_FILE, VERSION, Index, Shard, read_index
from fdscale.data.transfer import fetch_bytes, fetch_file
from fdscale.data.urls import SHARD_NAME, is_remote, readable_name, refuse_url, url_of

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
    """The shards of a data set whose home is `url`, as files of its `folder` in the cache."""

    url: str
    folder: Path
    shards: tuple[Shard, ...]
    cache: Cache

    def ready(self, shard: int) -> Path:
        """The path of a shard, fetched first where it is not there; to be opened at once, as it may be removed again.

        Raises UserError where it cannot be fetched, is not what was indexed, or finds no room.
        """
        return self.cache.keep(*self._wanted(shard))

    def ahead(self, shard: int) -> bool:
        """Fetch a shard that will be needed; False where only shards in use would make room. Raises as `ready`."""
        return self.cache.keep_ahead(*self._wanted(shard))

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
        raise UserError(_without_cache(url))
    refuse_url(url, cache.allow_pipe)
    content = fetch_bytes(url_of(url, INDEX_FILE), LARGEST_INDEX, cache.allow_pipe)
    rows = _checked(url_of(url, INDEX_FILE), content).samples_file
    folder = cache.made(f"{readable_name(url)}-{hashlib.sha256(content).hexdigest()[:16]}", url)
    cache.keep(folder / SAMPLES_FILE, rows.bytes, _filling(url, SAMPLES_FILE, rows.bytes, rows.sha256, cache))
    cache.keep(folder / INDEX_FILE, len(content), lambda file: file.write(content))
    index = read_index(folder)
    return replace(index, remote=RemoteShards(url, folder, index.shards, cache))


def cache_problems(urls: Mapping[str, str], cache: Cache | None) -> Iterator[str]:
    """Why URLs, by the settings that name them, may not be opened, one sentence each; folders pass. Opens nothing."""
    remote = {setting: url for setting, url in urls.items() if is_remote(url)}
    for setting, url in remote.items():
        try:
            refuse_url(url, cache is not None and cache.allow_pipe)
        except UserError as error:
            yield f"{setting}: {error}"
    if remote and cache is None:
        yield _without_cache(next(iter(remote)))


def room_problem(cache: Cache, needed: int) -> str | None:
    """What to tell where the shards that a node reads at once, of `needed` bytes, do not fit into the cache."""
    if needed <= cache.limit:
        return None
    least = f"{needed / GIB:.3g}"
    return (
        f"data.cache_gib: got {cache.limit / GIB:.3g}, allowed: at least {least}, what a node reads at once and would "
        "fetch again and again (twice that is room to fetch ahead); or lower data.shuffle"
    )


def bytes_at_once(index: Index, samples: float, lanes: float) -> int:
    """Bytes of the shards of which a node reads `samples` samples in one window, `lanes` stretches of the data.

    Each stretch begins and ends within a shard. All shards, at most.
    """
    shards = len(index.shards)
    at_once = min(float(shards), samples * shards / len(index) + lanes)
    return ceil(at_once * sum(shard.bytes for shard in index.shards) / shards)


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


def _without_cache(where: str) -> str:
    return f"data.cache: name a folder on the node's own disk, into which the shards of {where} are fetched"
