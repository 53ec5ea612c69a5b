"""Search in the captions of the training pictures, and the caption that says what a prompt says."""

from __future__ import annotations

import re
from collections.abc import Sequence

MOST_WORDS = 32


class Captions:
    """The captions of an index's samples.

    Args:
        captions: ``N`` lists of captions.
    """

    def __init__(self, captions: Sequence[Sequence[str]]) -> None:
        self.captions = captions
        self._plain = ["\n".join(own).casefold() for own in captions]

    def search(self, words: str, most: int) -> tuple[list[int], int]:
        """The samples whose captions hold all words that are looked for.

        Args:
            words: Between spaces.
            most: How many are wanted.

        Returns:
            Rows, those first that hold the words as whole words, and shorter captions before longer ones; and how many
            there are in all.
        """
        wanted = list(dict.fromkeys(words.casefold().split()))[:MOST_WORDS]
        if not wanted:
            return [], 0
        found = [row for row, plain in enumerate(self._plain) if all(word in plain for word in wanted)]
        whole = [re.compile(rf"(?<!\w){re.escape(word)}(?!\w)") for word in wanted]

        def place(row: int) -> tuple[int, int, int]:
            plain = self._plain[row]
            return -sum(pattern.search(plain) is not None for pattern in whole), len(plain), row

        return sorted(found, key=place)[:most], len(found)
