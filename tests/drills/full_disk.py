"""Run on disks of several sizes that fill up: one sentence, whole files, and the right scores once there is room.

``python tests/drills/full_disk.py --sizes 6 --seed 0`` (with the right to mount, on real small disks; else files have a
largest size)
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from drill import FOREIGN, Report, check_files, inside, jobs


def drill(sizes: int, seed: int, names: tuple[str, ...] = ("attribute", "attribute --race", "evaluate")) -> Report:
    """Fill disks.

    Args:
        sizes: How many sizes, from next to nothing to nearly enough.
        seed: Of their jitter.
        names: Of the commands.

    Returns:
        What was seen.
    """
    report, draw = Report(), random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="full-disk-") as place:
        folder = Path(place)
        for name in names:
            job, whole, out = jobs(folder)[name], folder / f"whole {name}", folder / "disk"
            status, said = inside(job.words(whole))
            assert status == 0, said
            needed = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
            largest = max(path.stat().st_size for path in whole.rglob("*") if path.is_file())
            for number in range(sizes):
                share, where = (number + draw.random()) / sizes, f"{name}, size {number}"
                with _disk(out, share * needed, share * largest) as grow:
                    status, said = inside(job.words(out / "run"))
                    sentences = [line for line in said.splitlines() if line.startswith("lightning-unlearn")]
                    if status not in (0, 1) or len(sentences) != status or any(word in said for word in FOREIGN):
                        report.faults.append(f"{where}: ended with {status}: {said[-1500:]}")
                    report.count("refused" if status else "had room")
                    check_files(out, report, where)
                    left = [path.name for path in out.rglob("*.tmp")]
                    if left:
                        report.faults.append(f"{where}: {left} are left")
                    grow()
                    status, said = inside(job.words(out / "run"))
                    if status or not job.same(out / "run", whole):
                        report.faults.append(
                            f"{where}: with room, it ended with {status} or other numbers: {said[-900:]}"
                        )
    return report


@contextmanager
def _disk(place: Path, size: float, file_size: float) -> Iterator[Callable[[], None]]:
    """A small disk, or none but a largest size of a file; yields what makes room."""
    place.mkdir()
    size = max(4096, int(size) // 4096 * 4096)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    mounted = not subprocess.run(mount, capture_output=True, check=False).returncode
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(1, int(file_size)), before[1]))

    def grow() -> None:
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    try:
        yield grow
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        if mounted:
            subprocess.run(["umount", str(place)], check=True)
        shutil.rmtree(place)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.exit(drill(given.sizes, given.seed).end())
