"""One file through WebDataset's `gopen`, checked while it comes, tried again where it breaks off; no torch of our own.

`gopen` starts curl, gsutil and the like and gives their output. It waits for ever for one that says nothing, and tells
of a failure only by its arguments, a token among them; so what it opened is read here, and looked at when it ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import logging
import os
import random
import select
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from typing import IO, Any, BinaryIO, TypeVar

from fdscale.config.errors import UserError
from fdscale.data.remote.urls import refuse_pipe

PIECE = 2**20  # bytes read at once, and what a pipe holds where the system allows it
SILENCE_SECONDS = 60.0  # without a byte; then a try has failed
WAITS = (1.0, 3.0, 10.0, 30.0)  # seconds before each further try, more or less
REFUSED = ("curl", 22)  # an HTTP error that stays: those that pass, curl has tried again itself

Found = TypeVar("Found")
log = logging.getLogger(__name__)


class Broken(Exception):
    """One try that did not give the file: how it ended; `final` where a further one would end likewise."""

    def __init__(self, told: str, final: bool = False) -> None:
        super().__init__(told)
        self.final = final


def fetch_file(url: str, file: BinaryIO, size: int, sha256: str, allow_pipe: bool) -> None:
    """Fill a file with what a URL gives, which must have this size and SHA-256; UserError after some tries."""
    _tried(url, lambda: _fetch_once(url, file, size, sha256, allow_pipe))


def fetch_bytes(url: str, most: int, allow_pipe: bool) -> bytes:
    """What a URL gives, which may be so many bytes; UserError after some tries."""

    def once() -> bytes:
        content = io.BytesIO()
        with closing(_pieces(url, most, allow_pipe)) as pieces:
            content.writelines(pieces)
        return content.getvalue()

    return _tried(url, once)


def _fetch_once(url: str, file: BinaryIO, size: int, sha256: str, allow_pipe: bool) -> None:
    digest = hashlib.sha256()
    file.seek(0)
    with closing(_pieces(url, size, allow_pipe)) as pieces:
        for piece in pieces:
            digest.update(piece)
            file.write(piece)
    if file.tell() < size:
        raise Broken(f"{file.tell()} of {size} bytes came")
    if digest.hexdigest() != sha256:
        raise Broken(f"{size} bytes came, but not those that were indexed (their SHA-256 is {digest.hexdigest()})")


def _tried(url: str, once: Callable[[], Found]) -> Found:
    for number, wait in enumerate((*WAITS, None), 1):
        try:
            return once()
        except Broken as error:
            if error.final or wait is None:
                tries = "" if error.final else f" (try {number} of {1 + len(WAITS)})"
                raise UserError(
                    f"cannot fetch {url}: {error}{tries}; check that it is there and that "
                    "this node may read it, and that index.json and samples.npy beside the shards are theirs"
                ) from None
            pause = wait * random.SystemRandom().uniform(0.5, 1.5)  # all nodes would come back at once
            log.warning("fetching %s again in %.0f s: %s", url, pause, error)
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _pieces(url: str, most: int, allow_pipe: bool) -> Generator[memoryview, None, None]:
    """What a URL gives as it comes, each piece in the place of the last; Broken where it is too much or breaks off."""
    came, place = 0, memoryview(bytearray(PIECE))
    with _opened(url, allow_pipe) as (stream, process):
        while size := _next(stream, place, came, process):
            came += size
            if came > most:
                raise Broken(f"more than {most} bytes came")
            yield place[:size]
        if process is not None:
            _refuse_failure(process, came)


def _next(stream: IO[bytes], place: memoryview, came: int, process: subprocess.Popen[bytes] | None) -> int:
    """How many bytes come next, 0 at the end; past the stream's own buffer, so that nothing waits in there unseen."""
    waiting = select.poll()
    waiting.register(stream.fileno(), select.POLLIN)
    if not waiting.poll(SILENCE_SECONDS * 1000):
        raise Broken(f"nothing came for {SILENCE_SECONDS:.0f} s, after {came} bytes{_http_error(process)}")
    return os.readv(stream.fileno(), [place])


def _refuse_failure(process: subprocess.Popen[bytes], came: int) -> None:
    program = _program(process)
    try:
        status = process.wait(SILENCE_SECONDS)
    except subprocess.TimeoutExpired:
        raise Broken(f"{program} does not end, after {came} bytes") from None
    if status:
        told = f"{program} ended with {status} after {came} bytes{_http_error(process)}"
        raise Broken(told, final=(program, status) == REFUSED)


def _http_error(process: subprocess.Popen[bytes] | None) -> str:
    """With which status a server refuses curl: asked once more, as `gopen`'s curl keeps it to itself."""
    if process is None or not isinstance(process.args, list) or _program(process) != "curl":
        return ""
    told = ("--retry", "0", "--max-time", "5", "--output", os.devnull, "--write-out", "%{http_code}")
    asked = subprocess.run([*process.args, *told], stdout=subprocess.PIPE, text=True, check=False)
    return f" (the server answers {asked.stdout})" if asked.stdout >= "400" else ""


def _program(process: subprocess.Popen[bytes]) -> str:
    """Its name alone: among its arguments there may be a token."""
    command = process.args
    return os.path.basename(str(command[0])) if isinstance(command, list) else "the command"


@contextmanager
def _opened(url: str, allow_pipe: bool) -> Iterator[tuple[IO[bytes], subprocess.Popen[bytes] | None]]:
    """The stream of a URL, and the process that it comes from."""
    opened = _open(url, allow_pipe)
    process: subprocess.Popen[bytes] | None = getattr(opened, "proc", None)
    try:
        if process is not None:
            with suppress(OSError):  # a user's pipes may hold so much together
                fcntl.fcntl(opened.stream, fcntl.F_SETPIPE_SZ, PIECE)
        yield (opened if process is None else opened.stream), process
    finally:
        if process is not None:
            process.kill()  # one that says nothing would not notice that nobody listens
        with suppress(OSError):  # how it ended is known
            opened.close()


def _open(url: str, allow_pipe: bool) -> Any:
    """WebDataset's stream, or its pipe from a program; s3 is opened as it opens gs, by the vendor's own program."""
    from webdataset.gopen import Pipe, gopen, gopen_schemes, rewrite_url

    try:
        actual = rewrite_url(url)
        refuse_pipe(actual, allow_pipe)
        if actual.startswith("s3://") and "s3" not in gopen_schemes:
            return Pipe(["aws", "s3", "cp", "--only-show-errors", actual, "-"], mode="rb", bufsize=0)
        return gopen(url, bufsize=0)
    except FileNotFoundError as error:
        if os.path.isabs(str(error.filename)):
            raise Broken(f"{error.filename} is not there", final=True) from None
        raise UserError(f"{url} is fetched by {error.filename}, which is not on the PATH: install it") from None
    except UserError:
        raise
    except Exception as error:  # each scheme's library raises its own
        raise Broken(f"{type(error).__name__}: {error}") from None
