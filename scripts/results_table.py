"""The tables of results, of README and site, from the numbers in benchmarks/RESULTS.md.

python scripts/results_table.py    # writes it into README.md
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS, README = ROOT / "benchmarks" / "RESULTS.md", ROOT / "README.md"
START, END = "<!-- made by scripts/results_table.py -->\n", "<!-- end of what it made -->"
# Removals that the table has: a bench, and the share of the images that is left out.
REMOVED = (("Digits", "1%"), ("Digits", "3%"), ("Digits", "10%"), ("Emoji", "3%"))
# Under which name random removals stand beside the scores without meaning.
FLOOR, RANDOM = "floor: random removal", "random"
MINUS = r"(?<![\w)])-(?=\d)"
HEAD = (
    "| method | loss (× 10⁻³) without 1 %, digits | 3 %, digits | 10 %, digits | 3 %, emoji | exemplars, mAP |\n"
    "|---|---|---|---|---|---|"
)
# Under which heading the first table stands, and the head of the last of its columns that README and site show.
FIRST, LAST = "On a bench that nobody tuned for", "worst regret"


def table_under(text: str, bench: str, heading: str) -> list[list[str]]:
    """The first table under a heading of a bench.

    Args:
        text: The results page.
        bench: How the bench's own heading begins.
        heading: The heading below that.

    Returns:
        Its cells by rows, its head first.

    Raises:
        LookupError: If there is no such table.
    """
    part = re.search(rf"^## {bench}.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    below = part and re.search(rf"^### {heading}\n.*?((?:^\|[^\n]*\n)+)", part[0], re.MULTILINE | re.DOTALL)
    if below is None:
        raise LookupError(f"{RESULTS} has no table under {heading!r} of {bench!r}.")
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in below[1].splitlines()]
    return [rows[0], *rows[2:]]


def column(table: list[list[str]], name: str) -> dict[str, str]:
    """A column's cells by the method in their row.

    Args:
        table: By rows, its head first.
        name: What the column's head has in it.

    Returns:
        The cells.
    """
    (place,) = [place for place, head in enumerate(table[0]) if name in head]
    return {RANDOM if row[0].startswith(FLOOR) else row[0]: row[place] for row in table[1:]}


def results_table(results: Path = RESULTS) -> str:
    """Every method with settings that were chosen on the other benches, in the order of their worst regrets.

    Args:
        results: The results page.

    Returns:
        A Markdown table.

    Raises:
        LookupError: If the page has no such table.
    """
    text = results.read_text("utf-8")
    found = re.search(rf"^## {FIRST}\n.*?((?:^\|[^\n]*\n)+)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise LookupError(f"{results} has no table under {FIRST!r}.")
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in found[1].splitlines()]
    shown = rows[0].index(LAST) + 1
    lines = [" | ".join(row[:shown]) for row in (rows[0], *rows[2:])]
    lines.insert(1, "|".join(["---"] * shown))
    return "\n".join(
        f"| {re.sub(MINUS, '−', line)} |" if number != 1 else f"|{line}|" for number, line in enumerate(lines)
    )


def removals_table(results: Path = RESULTS) -> str:
    """What removing what each method names changed, and how well it finds exemplars, in the order of the digits' LDS.

    Args:
        results: The results page.

    Returns:
        A Markdown table.
    """
    text = results.read_text("utf-8")
    columns = [
        *(column(table_under(text, bench, "Leave-K-out"), f"({share})") for bench, share in REMOVED),
        column(table_under(text, "Digits", "Customised models"), "mAP"),
    ]
    lines = [HEAD]
    for method in column(table_under(text, "Digits", "Linear datamodelling score"), "LDS"):
        cells = [cells.get(method, "–") for cells in columns]
        if any(cell != "–" and "missing" not in cell for cell in cells):
            lines.append(f"| {method} | {re.sub(MINUS, '−', ' | '.join(cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Write the table into the README."""
    before, start, rest = README.read_text("utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise SystemExit(f"{README} lacks the lines {START.strip()!r} and {END!r}.")
    README.write_text(f"{before}{start}\n{results_table()}\n\n{end}{after}", "utf-8")


if __name__ == "__main__":
    main()
