"""Imports without a search for garbage, which takes a quarter of their time and finds nothing. No torch in here."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """For the import of what brings torch, DeepSpeed and timm: half a million objects, which all stay.

    They are not looked through later on either, as ZeRO-3 has Python do at each start of an engine.
    """
    known = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        if len(sys.modules) > known:
            gc.freeze()
            atexit.register(gc.unfreeze)  # else triton finds that its objects outlive Python, and says so
