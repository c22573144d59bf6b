"""A JPEG of which the header says size and colours, opened for Pillow to decode down to a row; no torch."""

from __future__ import annotations

import struct
from typing import IO

from PIL.JpegImagePlugin import JpegImageFile

START, END = b"\xff\xd8", b"\xff\xd9"
BASELINE, EXTENDED, PROGRESSIVE = FRAMES = (0xFFC0, 0xFFC1, 0xFFC2)  # in Huffman's code
RESTARTS, SCAN = 0xFFDD, 0xFFDA
BESIDE = frozenset((0xFFC4, 0xFFDB, RESTARTS, 0xFFFE, *range(0xFFE0, 0xFFF0)))  # tables, comments, APPn
MODES = {1: "L", 3: "RGB"}
BLOCK = 8  # rows; as many times more in a row of blocks as the finest of the colours has
CONTEXT = 2  # rows beyond: between those of a colour stored at half the height libjpeg interpolates
_SEGMENT, _FRAME, _HEIGHT = struct.Struct(">HH"), struct.Struct(">BHHB"), struct.Struct(">H")


class PlainJpeg(JpegImageFile):
    """Grey or colour, 8 bits, one frame: all others raise SyntaxError, and are left to Pillow.

    It is decoded as by Pillow, which reads each table in Python first, although libjpeg reads them again.
    """

    _height_at: int  # where the file says its height
    _blocks = 0  # pixels in height of a row of blocks; 0 where rows do not simply follow one another in the file
    _rows = 0  # that are decoded; 0 for all

    def _open(self) -> None:
        """Pillow's hook for a format (its "Writing your own image plugin"): mode, size and what decodes it."""
        assert self.fp is not None
        if self.fp.read(2) != START:
            raise SyntaxError("no JPEG")
        place, marker, seen = 2, 0, set()
        while marker != SCAN:
            seen.add(marker)
            self.fp.seek(place)
            marker, size = _SEGMENT.unpack(self.fp.read(4))
            if marker in FRAMES and not self._mode:
                self._frame(self.fp, place)
            elif marker != SCAN and marker not in BESIDE:
                raise SyntaxError(f"marker {marker:#x}")
            place += 2 + size
        if not seen.isdisjoint((PROGRESSIVE, RESTARTS)) or MODES.get(ord(self.fp.read(1))) != self._mode:
            self._blocks = 0
        self.tile = [("jpeg", (0, 0, *self._size), 0, (self._mode, ""))]  # type: ignore[list-item]  # as in older ones

    def _frame(self, file: IO[bytes], place: int) -> None:
        bits, height, width, colours = _FRAME.unpack(file.read(6))
        if bits != 8:
            raise SyntaxError("not 8 bits")
        self._mode, self._size, self._height_at = MODES[colours], (width, height), place + 5
        self._blocks = BLOCK * max((sampling & 15 for sampling in file.read(3 * colours)[1::3]), default=0)

    def end_below(self, bottom: int) -> None:
        """Have the rows above `bottom` (counted as the file does) decoded, and few others; the image ends with these.

        They are those of the whole image, bit by bit: libjpeg is told a smaller height, and passes over the rest, whose
        damage it meets all the same. A truncated file is decoded whole, and so is one whose rows lie in several scans
        or between restarts.
        """
        assert self.fp is not None
        scale = self.decoderconfig[0] if self.decoderconfig else 1  # by `draft`
        rows = self._blocks and -(-(bottom + CONTEXT * scale) // self._blocks) * self._blocks
        if not 0 < rows // scale < self.height or self._height_at + _HEIGHT.size > self.decodermaxblock:
            return
        self.fp.seek(-len(END), 2)
        if self.fp.read() != END:
            return
        self._rows, self._size = rows, (self.width, rows // scale)
        name, _, offset, arguments = self.tile[0]
        self.tile = [(name, (0, 0, *self._size), offset, arguments)]  # type: ignore[list-item]

    def load_read(self, read_bytes: int) -> bytes:
        """Pillow's hook for the bytes to decode, of which the first have the header."""
        data = super().load_read(read_bytes)
        if self._rows:
            data = b"".join((data[: self._height_at], _HEIGHT.pack(self._rows), data[self._height_at + _HEIGHT.size :]))
            self._rows = 0
        return data
