"""Send SIGINT and SIGTERM at many moments of each command: it ends soon, with 130 or 143, and loses nothing finished.

``python tests/drills/signals.py --moments 20 --seed 0``
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from drill import PROGRAM, Job, Report, check_files, check_words, finish, jobs, undisturbed
from processes import Script

STOPPED = "lightning-unlearn: stopped."
# Longer than this nobody should wait, however busy the machine is; the grace is two seconds.
SOON = 15.0
# A signal that comes when all is done may find nobody.
AT_ONCE = 1.0


def drill(moments: int, seed: int, names: tuple[str, ...] | None = None) -> Report:
    """Send signals at moments that are spread over the undisturbed length of each command.

    Args:
        moments: How many for each command; signals take turns.
        seed: Of the moments.
        names: Of the commands; all by default.

    Returns:
        What was seen.
    """
    # Whoever starts a drill in the background has it ignore SIGINT, which the commands would respect.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    report, draw = Report(), random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="signals-") as place:
        folder = Path(place)
        for name, job in jobs(folder).items():
            if names is not None and name not in names:
                continue
            whole, out = folder / f"whole {name}", folder / "stopped"
            lasts = undisturbed(job, whole)
            out.mkdir()
            for number in range(moments):
                _stop(job, out, (number + draw.random()) / moments * lasts, number, report, f"{name}, moment {number}")
                if _is_done(job, out, whole):  # the signal came after the last file: another run has nothing to do
                    shutil.rmtree(out)
                    out.mkdir()
            finish(job.words(out), folder, report, name)
            if not report.faults and not job.same(out, whole):
                report.faults.append(f"{name}: other numbers than those of a run that nobody stopped")
            shutil.rmtree(out)
    return report


def _is_done(job: Job, out: Path, whole: Path) -> bool:
    try:
        return job.same(out, whole)
    except (OSError, ValueError):  # a file is missing, or what there is is part of a table
        return False


def _stop(job: Job, out: Path, moment: float, number: int, report: Report, where: str) -> None:
    sent = (signal.SIGTERM, signal.SIGINT)[number % 2]
    with Script(PROGRAM, *job.words(out), folder=out.parent) as script:
        was_sent = script.wait(moment) is None
        if was_sent:
            os.kill(script.pid, sent)
        started = time.monotonic()
        status = script.wait(SOON)
        report.slowest = max(report.slowest, time.monotonic() - started)
        said = script.said()
    check_words(said, report, where)
    check_files(out, report, where)
    if status == 128 + sent and said.count(STOPPED) == 1:
        report.count("stopped")
    elif status == 0 and STOPPED not in said and (not was_sent or time.monotonic() - started < AT_ONCE):
        report.count("ended before")
    elif status in (-sent, 1) and not said.strip():
        report.count("not begun")  # before the interpreter had come to the program
    else:
        report.faults.append(f"{where}: {sent.name} ended it with {status}: {said[-1500:]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.exit(drill(given.moments, given.seed).end())
