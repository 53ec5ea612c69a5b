"""``python -m lightning_unlearn``: the command line, as Lightning's launcher starts it again for each process."""

import sys

from lightning_unlearn.command_line.cli import main

if __name__ == "__main__":
    sys.exit(main())
