"""`python -m solostep` is the command `solostep`."""

import sys

from .engine.interfaces.cli import main

if __name__ == "__main__":
    sys.exit(main())
