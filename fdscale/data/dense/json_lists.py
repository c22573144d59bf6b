"""The lists of one large JSON object, read piece by piece: gigabytes of annotations never lie in memory as a whole."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from fdscale.config.errors import UserError

PIECE = 2**24  # bytes read at a time; every item must be smaller
ITEMS = 10_000  # handed out at a time
SPACE = " \t\n\r"
CUT = 2  # characters by which a number may go on that ends before them: the piece may end within "0.5" or "1e+6"


class JsonLists:
    """`{"images": [...], "annotations": [...], ...}` as a stream of (key, items), and the SHA-256 of the file.

    Raises UserError with line and column where the file is no such JSON, is cut off, or is not UTF-8.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error}; give the JSON file of the annotations") from error
        self._digest = hashlib.sha256()
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._scan = json.JSONDecoder().raw_decode
        self._text, self._at, self._ended = "", 0, False
        self._line, self._column = 1, 1  # of the first character of the text

    def __enter__(self) -> JsonLists:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    @property
    def sha256(self) -> str:
        """Of the whole file, once everything was read."""
        assert self._ended
        return self._digest.hexdigest()

    def read(self, wanted: Collection[str]) -> Iterator[tuple[str, list[Any]]]:
        """(key, up to 10,000 items) of each wanted key's list, in the order of the file; the rest is passed over."""
        self._take("{")
        if self._next() != "}":
            while True:
                key = self._value()
                if not isinstance(key, str):
                    self._damaged("expected the name of an entry")
                self._take(":")
                if self._next() == "[":
                    yield from ((key, items) for items in self._items(keep=key in wanted))
                elif key in wanted:
                    self._damaged(f"expected a list under '{key}'")
                else:
                    self._value()
                if self._next() != ",":
                    break
                self._at += 1
        self._take("}")
        if self._next():
            self._damaged("expected the end of the file")

    def _items(self, keep: bool) -> Iterator[list[Any]]:
        """The list that starts here, in pieces: at least one, which may be empty; none of one that is not kept."""
        self._take("[")
        items: list[Any] = []
        if self._next() != "]":
            while True:
                items.append(self._value())
                if len(items) == ITEMS:
                    if keep:
                        yield items
                    items = []
                if self._next() != ",":
                    break
                self._at += 1
        self._take("]")
        if keep:
            yield items

    def _value(self) -> Any:
        """The JSON value that starts here, white space before it left out."""
        failed = None
        while True:
            self._next()
            try:
                value, end = self._scan(self._text, self._at)
            except json.JSONDecodeError as error:
                # Cut off by the piece's end, or damaged: then more text leaves it as it is.
                if self._ended or failed == (error.msg, error.pos - self._at):
                    self._at = error.pos
                    self._damaged(error.msg)
                failed = error.msg, error.pos - self._at
            else:
                if len(self._text) - end > CUT or self._ended:
                    self._at = end
                    return value
            self._refill()

    def _next(self) -> str:
        """The next character that is no white space, not taken yet; empty at the end of the file."""
        while True:
            character = self._text[self._at : self._at + 1]
            if not character and not self._ended:
                self._refill()
            elif character and character in SPACE:
                self._at += 1
            else:
                return character

    def _take(self, character: str) -> None:
        if self._next() != character:
            self._damaged(f"expected '{character}'")
        self._at += 1

    def _refill(self) -> None:
        """Forget what was taken and read another piece."""
        taken, rest = self._text[: self._at], self._text[self._at :]
        self._move_on(taken)
        try:
            piece = self._file.read(PIECE)
            self._digest.update(piece)
            self._ended = not piece
            self._text, self._at = rest + self._decode(piece, self._ended), 0
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self._path} cannot be read as UTF-8 ({error}); copy or unpack it again") from error

    def _move_on(self, taken: str) -> None:
        lines = taken.count("\n")
        self._line += lines
        self._column = len(taken) - taken.rfind("\n") if lines else self._column + len(taken)

    def _damaged(self, why: str) -> NoReturn:
        self._move_on(self._text[: self._at])
        cut = "; the file ends here: it was cut off" if self._ended and self._at >= len(self._text) else ""
        raise UserError(
            f"{self._path} is damaged at line {self._line}, column {self._column}: {why}{cut}; "
            "copy or unpack it again, or have it written anew"
        )
