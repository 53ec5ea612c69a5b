"""Where things lie in the folder of ``ask``, and what it was made of: other inputs are refused by name, never mixed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_unlearn.data.files import check_folder, json_with_digest, read_json, write_atomically
from lightning_unlearn.errors import InputError

INPUTS = "inputs.json"
# Whatever is made of the inputs.
MADE = ("shards/manifest.json", "pictures", "queries", "fisher.safetensors", "answers")
# A file: its size, when it was changed, and a digest of its bytes.
Facts = list[Any]


@dataclass(frozen=True)
class AskFolder:
    """The folder that everything lies in.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """What was decided for the question that was asked last."""
        return self.path / "ask.yaml"

    @property
    def report(self) -> Path:
        """The page of the question that was asked last."""
        return self.path / "report.html"

    @property
    def shards(self) -> Path:
        """The training pictures, prepared."""
        return self.path / "shards"

    @property
    def fisher(self) -> Path:
        """Of the model."""
        return self.path / "fisher.safetensors"

    @property
    def pictures(self) -> Path:
        """Whatever was generated or given, for any question."""
        return self.path / "pictures"

    def queries(self, name: str) -> Path:
        """Pictures and shards of the queries of one question."""
        return self.path / "queries" / name

    def answer(self, name: str) -> Path:
        """A run of ``attribute``."""
        return self.path / "answers" / name

    def refuse_others(self, inputs: Mapping[str, Any]) -> None:
        """Refuse a folder that can't be written to, was made of other inputs, or is not of ``ask`` at all.

        Args:
            inputs: Names to what is known of each.

        Raises:
            InputError: If it is refused.
        """
        check_folder(self.path, "choose another --output")
        if not (self.path / INPUTS).is_file():
            if any(not path.name.startswith(".") for path in self.path.iterdir()):
                raise InputError(f"{self.path} holds files that are not of ask; choose another --output.")
            return
        differing = [*_differing(known_inputs(self.path), inputs)]
        # Where nothing has been made yet, it may still be made of something else.
        if differing and any((self.path / name).exists() for name in MADE):
            raise InputError(
                f"{self.path} was made with {'; '.join(differing)}; choose another --output, or remove that folder."
            )

    def claim(self, inputs: Mapping[str, Any]) -> None:
        """Take the folder for these inputs.

        Args:
            inputs: Names to what is known of each.
        """
        record, content = self.path / INPUTS, json_with_digest(inputs)
        if not record.is_file() or record.read_bytes() != content:
            write_atomically(record, content)


def known_inputs(folder: Path) -> dict[str, Any]:
    """What a folder was made of.

    Args:
        folder: Of ``ask``.

    Returns:
        Name to what is known of it; empty for a new folder.
    """
    record = folder / INPUTS
    found = read_json(record, "is no record of ask", "remove that folder") if record.is_file() else {}
    return {name: value for name, value in found.items() if name != "format"}


def facts_of(root: Path, names: Iterable[str], known: Mapping[str, Facts]) -> dict[str, Facts]:
    """What identifies files; of those that are as they were when they were last read, nothing is read.

    Args:
        root: Their folder.
        names: Relative to it.
        known: Of an earlier time.

    Returns:
        Name to facts.

    Raises:
        InputError: If one can't be read.
    """
    found: dict[str, Facts] = {}
    for name in names:
        path = root / name
        try:
            about = path.stat()
            before = known.get(name)
            if before is not None and before[:2] == [about.st_size, about.st_mtime_ns]:
                found[name] = before
                continue
            with path.open("rb") as stream:
                content = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        except OSError as error:
            raise InputError(f"{path} can't be read ({error.strerror}); see to its rights.") from None
        found[name] = [about.st_size, about.st_mtime_ns, content]
    return found


def contents(facts: Mapping[str, Facts]) -> str:
    """A digest of files by their names and contents alone.

    Args:
        facts: Of :func:`facts_of`.

    Returns:
        Hexadecimal.
    """
    plain = sorted([name, about[-1]] for name, about in facts.items())
    return hashlib.blake2b(json.dumps(plain).encode(), digest_size=16).hexdigest()


def _differing(known: Mapping[str, Any], now: Mapping[str, Any]) -> Iterable[str]:
    for name in [*known, *(name for name in now if name not in known)]:
        before, after = known.get(name), now.get(name)
        if isinstance(before, dict) and isinstance(after, dict) and name in ("pipeline", "adapter", "images"):
            if word := _first_change(before, after):
                yield f"another {name} ({word})"
        elif before != after:
            yield f"{name.replace('_', ' ')} {_short(before)}, and now it is {_short(after)}"


def _first_change(before: Mapping[str, Facts], after: Mapping[str, Facts]) -> str:
    gone, new = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
    changed = sorted(name for name in before.keys() & after.keys() if before[name][-1] != after[name][-1])
    parts = [("without", new), ("with", gone), ("with another", changed)]
    return ", ".join(
        f"{word} {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}" for word, names in parts if names
    )


def _short(value: Any) -> str:
    if value is None:
        return "none"
    said = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return said if len(said) <= 160 else f"{said[:160]} …"
