"""Kill ``ask`` with SIGKILL at random moments, and start it again: whole files, and in the end the very same answer.

``python tests/drills/asks.py --count 20 --seed 0``
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from drill import PROGRAM, Report, check_files, check_words, finish, same_files
from lora_toys import write_sdxl
from processes import Script

from lightning_unlearn.scores.files import read_scores

# So often one folder's run is killed before it may end.
IN_ONE_FOLDER = 4
ASKED = ["--prompt", "a dog on the moon", "--seed", "7", "--steps", "2", "--passes", "2"]


def drill(count: int, seed: int) -> Report:
    """Kill runs of ``ask`` at random moments.

    Args:
        count: How many kills.
        seed: Of the moments.

    Returns:
        What was seen.
    """
    report, draw = Report(), random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="asks-") as place:
        folder = Path(place)
        named = write_sdxl(folder)

        def words(out: Path) -> list[str]:
            return ["ask", *named, *ASKED, "--output", str(out)]

        with Script(PROGRAM, *words(folder / "whole"), folder=folder) as script:
            status = script.wait(600)
            assert status == 0, script.said()
        lasts = _seconds(words(folder / "timed"), folder)
        for number in range(count):
            out, where = folder / "killed", f"kill {number} of ask"
            out.mkdir(exist_ok=True)
            with Script(PROGRAM, *words(out), folder=folder) as script:
                ended = script.wait(draw.uniform(0, lasts))
                report.count("ended before" if ended is not None else "killed")
                script.kill()
                check_words(script.said(), report, where)
            check_files(out, report, where)
            if (number + 1) % IN_ONE_FOLDER == 0 or number + 1 == count:
                finish(words(out), folder, report, where)
                if not report.faults and not _same(out, folder / "whole"):
                    report.faults.append(f"{where}: another answer than that of a run that nobody killed")
                report.count("results compared")
                shutil.rmtree(out)
    return report


def _seconds(words: list[str], folder: Path) -> float:
    """How long an undisturbed run takes, once the system has read its files."""
    started = time.monotonic()
    with Script(PROGRAM, *words, folder=folder) as script:
        assert script.wait(600) == 0, script.said()
    return time.monotonic() - started


def _same(one: Path, two: Path) -> bool:
    """Whether two folders of ``ask`` have the same pictures and the very same scores."""
    ours, theirs = ([*(folder / "answers").iterdir()] for folder in (one, two))
    if len(ours) != 1 or len(theirs) != 1 or not same_files(one / "pictures", two / "pictures"):
        return False
    first, second = read_scores(ours[0]), read_scores(theirs[0])
    same = (first.keys, first.queries) == (second.keys, second.queries) and bool((first.scores == second.scores).all())
    return same and (one / "report.html").is_file() and (one / "ask.yaml").is_file()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.exit(drill(given.count, given.seed).end())
