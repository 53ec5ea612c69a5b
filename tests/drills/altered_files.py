"""Alter files of ours, by chance and on purpose: each gets one sentence, or is read as what was written.

``python tests/drills/altered_files.py --count 100 --seed 0``
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.torch
import torch
from drill import FOREIGN, Report, inside, jobs, same_scores

from lightning_unlearn.evaluation import Run, Study
from lightning_unlearn.evaluation.measuring import Outcome
from lightning_unlearn.evaluation.study import MODELS
from lightning_unlearn.fisher import load_fisher

Change = Callable[[Path, random.Random], None]


def flipped(path: Path, draw: random.Random) -> None:
    """Some bits of a file are other ones."""
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 2, 30))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path: Path, draw: random.Random) -> None:
    """A file ends too soon."""
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def longer(path: Path, draw: random.Random) -> None:
    """Something follows a file."""
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 100)))


def zeroed(path: Path, draw: random.Random) -> None:
    """A block of a file is zero, as after a crash of the machine."""
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content))
    content[start : start + 512] = bytes(len(content[start : start + 512]))
    path.write_bytes(content)


def of_table(path: Path, draw: random.Random) -> None:
    """A table has other rows, columns, types, numbers or metadata, and is a good Parquet file."""
    table, metadata = pq.read_table(path), pq.read_schema(path).metadata
    names = table.column_names
    # A stage of a race may have no row of a shard.
    number = draw.choice(range(8) if len(table) else (1, 2, 4, 7))
    if number == 0:
        table = table.slice(1)
    elif number == 1:
        table = table.drop_columns([draw.choice([name for name in names if name.startswith("score:")])])
    elif number == 2:
        table = table.set_column(0, "key", pa.array(range(len(table))))
    elif number == 3:
        table = pa.concat_tables([table, table.slice(0, 1)])
    elif number == 4:
        place = draw.choice([place for place, name in enumerate(names) if name.startswith("score:")])
        table = table.set_column(place, names[place], table.column(place).cast(pa.float64()))
    elif number == 5:
        place = draw.choice([place for place, name in enumerate(names) if name.startswith(("score:", "error:"))])
        values = table.column(place).to_numpy().copy()
        values[draw.randrange(len(values))] *= np.float32(1.5)
        table = table.set_column(place, names[place], pa.array(values))
    elif number == 6:
        keys = table.column("key").to_pylist()
        table = table.set_column(0, "key", pa.array([*keys[1:], keys[0]]))
    else:
        metadata = {name: value for name, value in metadata.items() if name != draw.choice(sorted(metadata))}
    pq.write_table(table.replace_schema_metadata(metadata), path)


def of_json(path: Path, draw: random.Random) -> None:
    """A JSON file says something else somewhere, and is good JSON."""
    content = json.loads(path.read_bytes())
    place: Any = content
    while True:
        key = draw.choice(sorted(place)) if isinstance(place, dict) else draw.randrange(len(place))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or draw.random() < 0.3:
            break
        place = inner
    if draw.random() < 0.3:
        del place[key]
    else:
        place[key] = draw.choice([None, 3, -1.5, "other", [], {}, True, [inner], {"inner": inner}])
    path.write_text(json.dumps(content))


def of_deltas(path: Path, draw: random.Random) -> None:
    """A checkpoint lacks something, or holds something else, and loads without pickle."""
    checkpoint = torch.load(path, weights_only=True)
    number = draw.randrange(5)
    if number == 0:
        del checkpoint[draw.choice(sorted(set(checkpoint) & {"unlearning", "state_dict", "pytorch-lightning_version"}))]
    elif number == 1:
        del checkpoint["unlearning"][draw.choice(sorted(checkpoint["unlearning"]))]
    elif number == 2:
        checkpoint["unlearning"][draw.choice(sorted(checkpoint["unlearning"]))] = draw.choice([None, 3, "x", [], {}])
    elif number == 3:
        name = draw.choice(sorted(checkpoint["state_dict"]))
        checkpoint["state_dict"][name] = checkpoint["state_dict"][name] * 2
    else:
        del checkpoint["state_dict"][draw.choice(sorted(checkpoint["state_dict"]))]
    torch.save(checkpoint, path)


def of_fisher(path: Path, draw: random.Random) -> None:
    """A Fisher says something else of itself, or has other sums, and is good safetensors."""
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["lightning_unlearn"])
    number, name = draw.randrange(4), draw.choice(sorted(tensors))
    if number == 0:
        tensors[name] = tensors[name] * 2
    elif number == 1:
        del tensors[name]
    elif number == 2:
        del about[draw.choice(sorted(about))]
    else:
        about[draw.choice(sorted(about))] = draw.choice([None, 3, -1, "x", [], {}, [3], {"a": 1}])
    safetensors.torch.save_file(tensors, path, {"lightning_unlearn": json.dumps(about)})


ANY: list[Change] = [flipped, flipped, cut, longer, zeroed]


def drill(count: int, seed: int) -> Report:
    """Alter one file of a finished run after the other, and use what was altered.

    Args:
        count: How many are altered.
        seed: Of which, and how.

    Returns:
        What was seen.
    """
    report, draw = Report(), random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="altered-") as place:
        folder = Path(place)
        whole, out = folder / "whole", folder / "altered"
        words = jobs(folder)["attribute"].words
        words_of_race = jobs(folder)["attribute --race"].words
        assert inside(words(whole))[0] == 0
        assert inside(words_of_race(folder / "whole race"))[0] == 0
        shutil.copy(Path(_toys()) / "fisher.safetensors", whole)
        study = Study(whole / "study", {"recipe": 1})
        study.write(Run(("a",), 1), {"q": Outcome(1.0, [0.5] * 10)}, 2.0, {"torch": "2"})
        for number in range(count):
            shutil.copytree(whole, out)
            kind = KINDS[number % len(KINDS)]
            path, change, status, said = kind(out, whole, words, folder, draw)
            where = f"alteration {number}: {change.__name__} of {path.name}"
            _judge(status, said, where, report)
            shutil.rmtree(out)
            shutil.rmtree(folder / "race", ignore_errors=True)
    return report


def _toys() -> str:
    import command_toys

    return str(command_toys.toy_folder())


def _judge(status: int, said: str, where: str, report: Report) -> None:
    lines = [line for line in said.splitlines() if line.startswith("lightning-unlearn")]
    if any(word in said for word in FOREIGN) or status not in (0, 1):
        report.faults.append(f"{where}: {said[-1000:]}")
    elif status == 1 and len(lines) != 1:
        report.faults.append(f"{where}: {len(lines)} sentences: {said[-1000:]}")
    elif status == 0 and said.startswith("WRONG"):
        report.faults.append(f"{where}: {said}")
    else:
        report.count("refused" if status else "read as it was written")


Found = tuple[Path, Change, int, str]


def _wrong(same: Callable[[], bool]) -> str:
    try:
        return "" if same() else "WRONG numbers were read without a word"
    except Exception as error:
        return f"WRONG: it ended well, but leaves {type(error).__name__}: {error}"


def _table(out: Path, whole: Path, words: Any, folder: Path, draw: random.Random) -> Found:
    path, change = draw.choice(sorted((out / "scores").iterdir())), draw.choice([*ANY, of_table, of_table, of_table])
    change(path, draw)
    status, said = inside(["report", "--folder", str(out)])
    return path, change, status, said if status else _wrong(lambda: same_scores(out, whole))


def _record(out: Path, whole: Path, words: Any, folder: Path, draw: random.Random) -> Found:
    path, change = out / "run.json", draw.choice([*ANY, of_json, of_json, of_json])
    change(path, draw)
    status, said = inside(["report", "--folder", str(out)])
    same = lambda: json.loads(path.read_bytes()) == json.loads((whole / "run.json").read_bytes())  # noqa: E731
    return path, change, status, said if status else _wrong(lambda: same_scores(out, whole) and same())


def _deltas(out: Path, whole: Path, words: Any, folder: Path, draw: random.Random) -> Found:
    path, change = out / "deltas.ckpt", draw.choice([*ANY, of_deltas, of_deltas, of_deltas])
    change(path, draw)
    for file in (out / "scores").iterdir():
        file.unlink()
    status, said = inside(words(out))
    return path, change, status, said if status else _wrong(lambda: same_scores(out, whole))


def _fisher(out: Path, whole: Path, words: Any, folder: Path, draw: random.Random) -> Found:
    path, change = out / "fisher.safetensors", draw.choice([*ANY, of_fisher, of_fisher, of_fisher])
    before = load_fisher(path)
    change(path, draw)
    status, said = inside([*words(out), "--model.init_args.fisher", str(path)])

    def same() -> bool:
        after = load_fisher(path)
        sums = after.tensors()
        return after.count == before.count and all(torch.equal(sums[name], t) for name, t in before.tensors().items())

    return path, change, status, said if status else _wrong(same)


def _race(out: Path, whole: Path, words: Any, folder: Path, draw: random.Random) -> Found:
    shutil.copytree(folder / "whole race", folder / "race")
    files = sorted([*(folder / "race").rglob("*.parquet"), *(folder / "race").rglob("run.json")])
    path = draw.choice(files)
    change = draw.choice([*ANY, *([of_table] * 3 if path.suffix == ".parquet" else [of_json] * 3)])
    change(path, draw)
    status, said = inside(["race", "--output", str(folder / "race"), "--top", "2", "--share", "0.4"])
    return path, change, status, said if status else _wrong(lambda: _same_race(folder))


def _same_race(folder: Path) -> bool:
    return inside(["report", "--folder", str(folder / "race")])[0] == 1 or same_scores(
        folder / "race", folder / "whole race"
    )


def _study(out: Path, whole: Path, words: Any, folder: Path, draw: random.Random) -> Found:
    run = Run(("a",), 1)
    before = Study(out / "study", {"recipe": 1}).read(run)
    path = draw.choice([out / "study" / "study.json", out / "study" / MODELS / f"{run.name}.json"])
    change = draw.choice([*ANY, of_json, of_json, of_json])
    change(path, draw)
    try:
        found = Study(out / "study", {"recipe": 1}).read(run)
    except ValueError as error:
        return path, change, 1, f"lightning-unlearn: {error}"
    except Exception as error:
        return path, change, -1, f"Traceback of {type(error).__name__}: {error}"
    return path, change, 0, _wrong(lambda: found == before)


KINDS = (_table, _record, _deltas, _fisher, _race, _study)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.exit(drill(given.count, given.seed).end())
