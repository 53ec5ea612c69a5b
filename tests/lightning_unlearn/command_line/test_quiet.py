from __future__ import annotations

import subprocess
import sys

CODE = """
import warnings
from lightning.pytorch.utilities import rank_zero_warn
from lightning_unlearn.command_line.quiet import quiet

with quiet():
    warnings.warn("a word")
    rank_zero_warn("another word")
warnings.warn("outside")
"""


def test_warnings_are_said_without_lines_of_code() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stderr.startswith("Warning: a word\nWarning: another word\n")
    assert "<string>" in done.stderr.partition("another word")[2]
