"""Kill a run with SIGKILL, again and again: no half file, and in the end the very scores of a run that nobody killed.

``python tests/drills/kills.py --count 50 --seed 0``
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path

from drill import PROGRAM, Report, check_files, check_words, finish, jobs, undisturbed
from processes import Script

# So often one folder's run is killed before it may end.
IN_ONE_FOLDER = 4


def drill(count: int, seed: int, names: tuple[str, ...] = ("attribute", "attribute --race", "evaluate")) -> Report:
    """Kill runs at random moments.

    Args:
        count: How many kills.
        seed: Of the moments.
        names: Of the commands, in turn.

    Returns:
        What was seen.
    """
    report, draw = Report(), random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="kills-") as place:
        folder = Path(place)
        found = {name: job for name, job in jobs(folder).items() if name in names}
        lasts = {name: undisturbed(job, folder / f"whole {name}") for name, job in found.items()}
        for number in range(count):
            name = names[number // IN_ONE_FOLDER % len(names)]
            out, where = folder / "killed", f"kill {number} of {name}"
            out.mkdir(exist_ok=True)
            with Script(PROGRAM, *found[name].words(out), folder=folder) as script:
                ended = script.wait(draw.uniform(0, lasts[name]))
                report.count("ended before" if ended is not None else "killed")
                script.kill()
                check_words(script.said(), report, where)
            check_files(out, report, where)
            if (number + 1) % IN_ONE_FOLDER == 0 or number + 1 == count:
                finish(found[name].words(out), folder, report, where)
                if not report.faults and not found[name].same(out, folder / f"whole {name}"):
                    report.faults.append(f"{where}: other numbers than those of a run that nobody killed")
                report.count("results compared")
                shutil.rmtree(out)
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.exit(drill(given.count, given.seed).end())
