"""Hostile and damaged shard folders, each a function of its number: what is met in the wild, and worse."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

Draw = np.random.Generator
SHARDS, IMAGES = 2, 5


@dataclass
class Member:
    """One member of a tar; `header` is written as it is where there is one."""

    name: str
    data: bytes
    fields: dict[str, object] = field(default_factory=dict)
    header: bytes | None = None

    def tobuf(self) -> bytes:
        if self.header is not None:
            head = self.header
        else:
            info = tarfile.TarInfo(self.name)
            info.size = len(self.data)
            for name, value in self.fields.items():
                setattr(info, name, value)
            head = info.tobuf(tarfile.PAX_FORMAT, errors="surrogateescape")
        return head + self.data + b"\0" * (-len(self.data) % 512)


Shards = list[list[Member]]


@dataclass(frozen=True)
class Mutated:
    """What was done to a folder before it is indexed, and whether to bytes of its tars.

    And what is done to it afterwards: before it is loaded, or under the run.
    """

    done: list[str]
    members: Shards
    bytes_changed: bool
    afterwards: Callable[[Path], str] | None
    under_the_run: bool


def mutated(folder: Path, number: int) -> Mutated:
    """Write the tars of case `number` into `folder`."""
    draw = np.random.default_rng([9, number])
    shards = pristine()
    done = []
    refused = draw.random() < 0.3
    for _ in range(draw.integers(0, 4)):
        changes = REFUSED if refused else READ
        change = changes[draw.integers(len(changes))]
        change(shards[draw.integers(SHARDS)], draw)
        done.append(change.__name__)
    tars = [b"".join(member.tobuf() for member in shard) + b"\0" * 1024 for shard in shards]
    of_bytes = draw.random() < 0.25
    if of_bytes:
        change, which = BYTE_CHANGES[draw.integers(len(BYTE_CHANGES))], draw.integers(SHARDS)
        tars[which] = change(tars[which], draw)
        done.append(change.__name__)
    folder.mkdir()
    for place, data in enumerate(tars):
        (folder / f"s{place}.tar").write_bytes(data)
    later = AFTERWARDS[draw.integers(len(AFTERWARDS))] if draw.random() < 0.5 else None
    afterwards = None if later is None else partial_of(later, draw)
    # fdscale replaces its index files, and never writes into one that is mapped
    under_the_run = later in (shard_changed, image_swapped, shard_gone) and draw.random() < 0.5
    return Mutated(done, shards, of_bytes, afterwards, under_the_run)


def partial_of(change: Callable[[Path, Draw], None], draw: Draw) -> Callable[[Path], str]:
    def apply(folder: Path) -> str:
        change(folder, draw)
        return change.__name__

    return apply


def pristine() -> Shards:
    """Two shards of labelled images of several formats and modes."""
    kinds = list(good_images().items())
    shards: Shards = []
    for shard in range(SHARDS):
        members = []
        for place in range(IMAGES):
            suffix, data = kinds[(shard * IMAGES + place) % len(kinds)][1]
            key = f"c{place}/i{shard}{place}"
            members += [Member(f"{key}.cls", b"%d" % place), Member(f"{key}.{suffix}", data)]
        shards.append(members)
    return shards


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@cache
def good_images() -> dict[str, tuple[str, bytes]]:
    """Images that decode, by what is special about them: suffix and bytes."""
    draw = np.random.default_rng(1)
    rgb = Image.fromarray(draw.integers(0, 256, (22, 26, 3), dtype=np.uint8))
    deep = Image.fromarray(draw.integers(0, 65536, (20, 24), dtype=np.uint16))
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = {"save_all": True, "append_images": [rgb.rotate(90)], "duration": 40}
    palette = rgb.quantize(16)
    return {
        "jpeg": ("jpg", encoded(rgb, "jpeg")),
        "png": ("png", encoded(rgb, "png")),
        "webp": ("webp", encoded(rgb, "webp")),
        "cmyk": ("jpeg", encoded(rgb.convert("CMYK"), "jpeg")),
        "sixteen bits": ("png", encoded(deep, "png")),
        "animated png": ("png", encoded(rgb, "png", **frames)),
        "animated webp": ("webp", encoded(rgb, "webp", lossless=True, **frames)),
        "exif": ("jpg", encoded(rgb, "jpeg", exif=turned)),
        "palette": ("png", encoded(palette, "png", transparency=bytes(range(16)))),
        "alpha": ("png", encoded(rgb.convert("LA"), "png")),
        "one bit": ("png", encoded(rgb.convert("1"), "png")),
        "progressive": ("jpg", encoded(rgb, "jpeg", progressive=True)),
    }


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_claiming(width: int, height: int, bits: int = 8, colour: int = 2) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 10**6)) + chunk(b"IEND", b"")


@cache
def bad_images() -> list[bytes]:
    """Bytes that are no image to train on, some of which ask for much memory."""
    jpeg, webp = good_images()["jpeg"][1], good_images()["webp"][1]
    size = jpeg.index(b"\xff\xc0") + 5
    vast_jpeg = jpeg[:size] + struct.pack(">HH", 65500, 65500) + jpeg[size + 4 :]
    vast_webp = b"RIFF" + struct.pack("<I", 400) + b"WEBPVP8X" + struct.pack("<IBBH", 10, 2, 0, 0)
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(b"\0" * 10**7))
    png = good_images()["png"][1]
    return [
        b"",
        b"no image",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n",
        encoded(Image.new("RGB", (9, 9)), "gif"),
        encoded(Image.new("RGB", (9, 9)), "tiff"),
        png_claiming(2**31 - 1, 2**31 - 1),
        png_claiming(20_000, 20_000, 1, 0),
        png_claiming(9_400, 9_500),  # just below the limit, and cut off
        png_claiming(0, 5),
        vast_jpeg,
        vast_webp + b"\xff\xff\xff" * 2 + webp[12:],
        png[:33] + text * 3 + png[33:],
        jpeg[: len(jpeg) // 2],
        png[: len(png) // 2],
        webp[: len(webp) // 2],
    ]


# ---- members


def place_of(members: Shards[0], draw: Draw) -> int:
    """Which of the members that is an image."""
    places = [place for place, member in enumerate(members) if not member.name.endswith(".cls")]
    return int(places[draw.integers(len(places))])


def leads_out(members: list[Member], draw: Draw) -> None:
    name = ["../{}.png", "/tmp/fdscale-{}.png", "a/../../{}.png", "..", "../../{}.cls"][draw.integers(5)]
    members.insert(int(draw.integers(len(members))), Member(name.format("escaped"), good_images()["png"][1]))


def leads_out_by_pax(members: list[Member], draw: Draw) -> None:
    members.append(Member("plain.png", good_images()["png"][1], {"pax_headers": {"path": "../" * 9 + "escaped.png"}}))


def huge(members: list[Member], draw: Draw) -> None:
    info = tarfile.TarInfo("huge.png")
    info.size = int([300 * 2**20, 8 * 2**30, 2**62][draw.integers(3)])
    members.append(Member("huge.png", b"", header=info.tobuf(tarfile.GNU_FORMAT)))


def negative(members: list[Member], draw: Draw) -> None:
    block = bytearray(tarfile.TarInfo("negative.png").tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 11 + bytes([int(draw.integers(256))])
    block[148:156] = b"%06o\0 " % (256 + sum(block[:148]) + sum(block[156:]))
    members.insert(int(draw.integers(len(members))), Member("negative.png", b"", header=bytes(block)))


def duplicate(members: list[Member], draw: Draw) -> None:
    other = members[place_of(members, draw)]
    stem = other.name.partition(".")[0]
    members.append(Member([other.name, f"{stem}.webp"][draw.integers(2)], good_images()["webp"][1]))


def duplicate_label(members: list[Member], draw: Draw) -> None:
    members.append(Member("c0/i00.cls", b"%d" % draw.integers(9)))


def other_image(members: list[Member], draw: Draw) -> None:
    bad = bad_images()
    members[place_of(members, draw)].data = bad[draw.integers(len(bad))]


def other_good_image(members: list[Member], draw: Draw) -> None:
    kinds = list(good_images().values())
    members[place_of(members, draw)].data = kinds[draw.integers(len(kinds))][1]


def flipped_image(members: list[Member], draw: Draw) -> None:
    member = members[place_of(members, draw)]
    member.data = flipped(member.data, draw)


def link(members: list[Member], draw: Draw) -> None:
    kind = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE][draw.integers(4)]
    suffix = ["png", "cls", "txt"][draw.integers(3)]
    members.append(Member(f"link.{suffix}", b"", {"type": kind, "linkname": "../../etc/passwd"}))


def directory(members: list[Member], draw: Draw) -> None:
    members.append(Member("folder.png", b"", {"type": tarfile.DIRTYPE}))


def wrong_label(members: list[Member], draw: Draw) -> None:
    text = [b"cat", b"-1", b"9" * 64, b"", b"\xff\xfe", b"2147483648", b"1" * 10**6][draw.integers(7)]
    next(member for member in members if member.name.endswith(".cls")).data = text


def odd_name(members: list[Member], draw: Draw) -> None:
    names = ["\udcff\udc80", "\x1b[31m", "new\nline", "x" * 300, ".hidden", "a.b.c", "emoji \U0001f600", "%s{0}", " "]
    members.append(Member(f"{names[draw.integers(len(names))]}.png", good_images()["png"][1]))


def long_header(members: list[Member], draw: Draw) -> None:
    kind = [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE][draw.integers(4)]
    info = tarfile.TarInfo("long")
    info.type, info.size = kind, int([2**33, 3 * 2**20, 100][draw.integers(3)])
    members.insert(int(draw.integers(len(members))), Member("long", b"", header=info.tobuf(tarfile.GNU_FORMAT)))


def many_headers(members: list[Member], draw: Draw) -> None:
    info = tarfile.TarInfo("long")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 10
    block = info.tobuf(tarfile.GNU_FORMAT) + b"some name\0" + b"\0" * 502
    members.insert(int(draw.integers(len(members))), Member("long", b"", header=block * 3000))


def odd_records(members: list[Member], draw: Draw) -> None:
    records = [
        {"size": "-512"},
        {"size": "99999999999999999999"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9" * 12},
        {"GNU.sparse.map": "0,x,1"},
        {"mtime": "nan"},
        {"path": ""},
    ]
    chosen = records[draw.integers(len(records))]
    members.append(Member("odd.png", good_images()["png"][1], {"pax_headers": chosen}))


# What an index refuses, and what it takes: the reader is to find what is wrong with it
REFUSED = [
    leads_out, leads_out_by_pax, huge, negative, duplicate, duplicate_label, link, wrong_label, long_header,
    many_headers, odd_records,
]  # fmt: skip
READ = [other_image, other_image, other_good_image, flipped_image, directory, odd_name]


# ---- bytes of a tar


def flipped(data: bytes, draw: Draw) -> bytes:
    changed = bytearray(data)
    for place in draw.integers(len(data), size=draw.integers(1, 9)) if data else ():
        changed[place] ^= 1 << int(draw.integers(8))
    return bytes(changed)


def truncated(data: bytes, draw: Draw) -> bytes:
    return data[: draw.integers(len(data))]


def zeroed(data: bytes, draw: Draw) -> bytes:
    place = 512 * int(draw.integers(len(data) // 512))
    return data[:place] + b"\0" * 512 + data[place + 512 :]


def inserted(data: bytes, draw: Draw) -> bytes:
    place = int(draw.integers(len(data)))
    return data[:place] + draw.bytes(int(draw.integers(1, 2000))) + data[place:]


def copied(data: bytes, draw: Draw) -> bytes:
    source, target = (512 * int(place) for place in draw.integers(len(data) // 512, size=2))
    return data[:target] + data[source : source + 512] + data[target + 512 :]


def appended(data: bytes, draw: Draw) -> bytes:
    return data + [data, draw.bytes(700), b"\0" * 9000][draw.integers(3)]


def emptied(data: bytes, draw: Draw) -> bytes:
    return b"" if draw.random() < 0.5 else b"\0" * len(data)


def noise(data: bytes, draw: Draw) -> bytes:
    return draw.bytes(len(data))


BYTE_CHANGES = [flipped, flipped, truncated, zeroed, inserted, copied, appended, emptied, noise]


# ---- after it was indexed


def shard_changed(folder: Path, draw: Draw) -> None:
    path = folder / f"s{draw.integers(SHARDS)}.tar"
    change = BYTE_CHANGES[draw.integers(len(BYTE_CHANGES))]
    changed = change(path.read_bytes(), draw)
    times = path.stat()
    path.write_bytes(changed)
    if draw.random() < 0.5:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def image_swapped(folder: Path, draw: Draw) -> None:
    """Two images of one size change places: every header still holds."""
    path = folder / "s0.tar"
    data = bytearray(path.read_bytes())
    rows = np.load(folder / "samples.npy")
    first, second = rows[rows["shard"] == 0][:2]
    size = min(first["size"], second["size"])
    one, two = (slice(int(row["offset"]), int(row["offset"]) + int(size)) for row in (first, second))
    data[one], data[two] = data[two], data[one]
    path.write_bytes(data)


def shard_gone(folder: Path, draw: Draw) -> None:
    (folder / f"s{draw.integers(SHARDS)}.tar").unlink()


def shard_added(folder: Path, draw: Draw) -> None:
    (folder / "s9.tar").write_bytes((folder / "s0.tar").read_bytes())


def rows_changed(folder: Path, draw: Draw) -> None:
    path = folder / "samples.npy"
    path.write_bytes([flipped, truncated][draw.integers(2)](path.read_bytes(), draw))


def manifest_changed(folder: Path, draw: Draw) -> None:
    path = folder / "index.json"
    path.write_bytes([flipped, truncated][draw.integers(2)](path.read_bytes(), draw))


HOSTILE = ["../outside.tar", "/dev/zero", "/etc/passwd", "s0.tar\0", 0, -1, 2**70, None, 1.5, "", [], {}]


def manifest_rewritten(folder: Path, draw: Draw) -> None:
    path = folder / "index.json"
    manifest = json.loads(path.read_text())
    shard = manifest["shards"][draw.integers(SHARDS)]
    name = ["name", "bytes", "samples", "rows_crc", "sha256"][draw.integers(5)]
    shard[name] = HOSTILE[draw.integers(len(HOSTILE))]
    path.write_text(json.dumps(manifest))


AFTERWARDS = [shard_changed] * 6 + [
    image_swapped, shard_gone, shard_added, rows_changed, rows_changed, manifest_changed, manifest_rewritten,
]  # fmt: skip
