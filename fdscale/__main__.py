"""`python -m fdscale`: the same as the console script, for launchers that start modules."""

from __future__ import annotations

import sys

from fdscale.cli import main

if __name__ == "__main__":
    sys.exit(main())
