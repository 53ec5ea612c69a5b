"""Reads malformed shards, and shards from servers that go wrong; nothing but samples and sentences may come of it.

    python tests/drills/malformed_tars.py --shards 250 --servers 50 --seed 0

It ends with 1 if there was a foreign exception, a sample that nobody wrote, a mixture of two files, samples that are
gone without a word, or too much memory taken.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from http_manners import serving
from malformed import SAMPLES, malformed
from toys import toy_fields

from lightning_unlearn.data.samples import Sample
from lightning_unlearn.data.shards import ShardInfo, write_shards
from lightning_unlearn.datamodules import http_reply, remote, source
from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.errors import InputError

# More than the samples, the interpreter and what is unpacked of one file take together.
MOST_MEMORY = 1.5 * 2**30
KEYS = [f"sample-{number:05d}" for number in range(SAMPLES)]


def fault_of(info: ShardInfo, first: int = 0, samples: int = SAMPLES) -> tuple[str, str]:
    """What came of reading a shard, and what is wrong with it, if anything is."""
    found: list[Sample] = []
    try:
        found.extend(read_samples(info, pictures=True, masks=True))
    except InputError as error:
        message = str(error)
        if not message.isprintable() or not message.endswith("."):
            return "refused", f"no sentence: {message!r}"
        return "refused", wrong_sample(found, first, samples)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return "foreign", f"{type(error).__name__}: {error}"
    fault = wrong_sample(found, first, samples)
    if not fault and len(found) < samples:
        fault = f"{samples - len(found)} samples are gone without a word"
    return "read", fault


def wrong_sample(found: list[Sample], first: int, samples: int) -> str:
    """Which sample is not what was written, if one is."""
    written = {f"sample-{number:05d}": number for number in range(first, first + samples)}
    for sample in found:
        if sample.key not in written:
            return f"a sample {sample.key!r} that nobody wrote"
        expected = np.load(io.BytesIO(toy_fields(written[sample.key])["latent.npy"]))
        if not np.array_equal(sample.latent.numpy(), expected):
            return f"another latent of {sample.key}"
    return ""


# Changes that make another shard, which is as right as the one before: a name is what it is called, and arrays and
# texts are what they say.
# What is packed has its checksum at its end: its shard is refused, after some of it was read.
UNPACKED = ("a damaged packing", "refused")
RENAMES = frozenset({"names", "a json", "an array's header", "a pax header", "bits of a header"})


def drill_shards(count: int, seed: int, folder: Path) -> list[str]:
    """Read so many malformed shards."""
    faults, tally = [], Counter[tuple[str, str]]()
    for number in range(count):
        kind, content = malformed(number, seed)
        path = folder / "x.tar"
        path.write_bytes(content)
        # Only a count tells zeros over the last samples from the padding that ends an archive.
        info = ShardInfo(str(path), SAMPLES if kind == "a hole" else None)
        outcome, fault = fault_of(info)
        if fault.startswith(("a sample", "another latent")) and (kind in RENAMES or (kind, outcome) == UNPACKED):
            fault = ""
        tally[kind, outcome] += 1
        if fault:
            faults.append(f"shard {number} ({kind}): {fault}")
    for (kind, outcome), times in sorted(tally.items()):
        print(f"{times:4} × {kind}: {outcome}")
    return faults


def manners(seed: int) -> list[dict[str, Any]]:
    """Ways in which a server goes wrong."""
    rng = random.Random(seed)
    ways: list[dict[str, Any]] = [
        {"etag": etag, "ranges": ranges, "length": length, "breaks": breaks}
        for etag, ranges, length in itertools.product([True, False, 'W/"x"'], [True, False], [True, False])
        for breaks in ([], [rng.randrange(2_000_000)])
    ]
    ways += [{"etag": e, "ranges": r, "breaks": [1_500_000], "later": 1} for e in (True, False) for r in (True, False)]
    ways += [{"failures": [status]} for status in (400, 401, 403, 404, 408, 410, 416, 429, 500, 502, 503, 504)]
    ways += [{"failures": [503] * 9}, {"hang": "headers"}, {"hang": "body", "breaks": [5000] + [0] * 9}]
    ways += [{"endless": tail} for tail in (bytes(2**16), b"x" * 2**16)]
    ways += [{"wrong_part": 512, "breaks": [1_500_000]}, {"unnamed_part": True, "breaks": [1_500_000]}]
    ways += [{"drip": True}, {"redirect": "file:///etc/passwd"}, {"reason": "\x1b[2J", "failures": [404]}]
    ways += [{"breaks": [rng.randrange(100_000)] * 9}]
    return ways


def drill_servers(count: int, seed: int, folder: Path) -> list[str]:
    """Read from so many servers."""
    large = 600
    contents = [
        Path(write_shards([toy_fields(first + n) for n in range(large)], folder / str(first))[0].url).read_bytes()
        for first in (0, 2000)
    ]
    faults, tally = [], Counter[str]()
    remote.WAITS, remote.PATIENCE = (0.01, 0.01, 0.01), 5.0
    http_reply.TIMEOUT, source.LONGEST_UNSAID = 0.5, 2**24
    for number, manner in enumerate(manners(seed)[:count]):
        with serving(contents[0]) as server:
            for name, value in manner.items():
                setattr(server, name, [contents[1]] if name == "later" else value)
            address = server.address.replace("shard", "moved") if "redirect" in manner else server.address
            started = time.monotonic()
            outcome, fault = fault_of(ShardInfo(address), samples=large)
            if time.monotonic() - started > 60:
                fault = fault or "it took more than a minute"
            tally[outcome] += 1
            if fault:
                faults.append(f"server {number} ({manner}): {fault}")
    for outcome, times in sorted(tally.items()):
        print(f"{times:4} × servers: {outcome}")
    return faults


def main() -> int:
    """Run both drills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=250)
    parser.add_argument("--servers", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["no_proxy"] = "127.0.0.1"
    with tempfile.TemporaryDirectory() as name:
        faults = drill_shards(arguments.shards, arguments.seed, Path(name))
        faults += drill_servers(arguments.servers, arguments.seed, Path(name))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"At most {memory / 2**20:.0f} MiB of memory were taken.")
    if memory > MOST_MEMORY:
        faults.append(f"{memory / 2**20:.0f} MiB of memory were taken")
    for fault in faults:
        print(f"FAULT {fault}")
    print(f"{arguments.shards} shards and {arguments.servers} servers: {len(faults)} faults.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
