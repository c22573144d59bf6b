"""A JPEG of which the header says size and colours, opened for Pillow to decode; no torch."""

from __future__ import annotations

import struct

from PIL.JpegImagePlugin import JpegImageFile

START = b"\xff\xd8"
SCAN = 0xFFDA
FRAMES = (0xFFC0, 0xFFC1, 0xFFC2)  # baseline, extended and progressive, in Huffman's code
BESIDE = frozenset((0xFFC4, 0xFFDB, 0xFFDD, 0xFFFE, *range(0xFFE0, 0xFFF0)))  # tables, restarts, comments, APPn
MODES = {1: "L", 3: "RGB"}
_SEGMENT, _FRAME = struct.Struct(">HH"), struct.Struct(">BHHB")


class PlainJpeg(JpegImageFile):
    """Grey or colour, 8 bits, one frame: all others raise SyntaxError, and are left to Pillow.

    It is decoded as by Pillow, which reads each table in Python first, although libjpeg reads them again.
    """

    def _open(self) -> None:
        """Pillow's hook for a format (its "Writing your own image plugin"): mode, size and what decodes it."""
        assert self.fp is not None
        if self.fp.read(2) != START:
            raise SyntaxError("no JPEG")
        place = 2
        while True:
            self.fp.seek(place)
            marker, size = _SEGMENT.unpack(self.fp.read(4))
            if marker in FRAMES and not self._mode:
                bits, height, width, colours = _FRAME.unpack(self.fp.read(6))
                if bits != 8:
                    raise SyntaxError("not 8 bits")
                self._mode, self._size = MODES[colours], (width, height)
            elif marker == SCAN:
                break
            elif marker not in BESIDE:
                raise SyntaxError(f"marker {marker:#x}")
            place += 2 + size
        self.tile = [("jpeg", (0, 0, *self._size), 0, (self._mode, ""))]  # type: ignore[list-item]  # as in older ones
