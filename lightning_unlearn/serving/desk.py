"""The desk that all askers come to: one model behind a lock, the answers that were given, and what they say."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock

import numpy as np

from lightning_unlearn.data.samples import Sample
from lightning_unlearn.errors import InputError
from lightning_unlearn.serving.captions import Captions
from lightning_unlearn.serving.contract import Answer, Answerer, GroupRow, QueryMaker, Scores
from lightning_unlearn.serving.pictures import Pictures

LONGEST_PROMPT = 4_000
LARGEST_PICTURE = 32 * 2**20
# Scores of so many questions are kept, of all askers together; of a million pictures each has 8 MB.
ANSWERS_KEPT = 200


@dataclass(frozen=True)
class Provenance:
    """How answers are made, for people and for files.

    Attributes:
        method: Name of the method.
        meaning: One sentence on what a score means.
        line: One line with the fingerprints of model and data, the method and the version.
        facts: The same by name.
    """

    method: str
    meaning: str
    line: str
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """A question with its answer.

    Attributes:
        token: Its name, which nobody can guess: whoever has it may read the answer.
        query: The sample.
        prompt: As it was asked.
        answer: The scores.
        order: ``(N,)`` rows from the most to the least influential.
        notes: Sentences for whoever asked.
        seconds: What the query took to be made.
    """

    token: str
    query: Sample
    prompt: str
    answer: Answer
    order: np.ndarray[tuple[int], np.dtype[np.intp]]
    notes: Sequence[str] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Helped:
    """What a training picture was to a picture that was asked about.

    Attributes:
        asked: The question.
        rank: Of the training picture, 1 for the most influential.
        score: Its score.
    """

    asked: Asked
    rank: int
    score: float


class Desk:
    """Answers questions, one at a time.

    Args:
        maker: Makes queries.
        answerer: Answers them.
        captions: Of the training pictures.
        pictures: The training pictures.
        fields: Names of fields by which pictures may be put into groups.
        provenance: How answers are made.
    """

    def __init__(
        self,
        maker: QueryMaker,
        answerer: Answerer,
        captions: Captions,
        pictures: Pictures,
        fields: Sequence[str],
        provenance: Provenance,
    ) -> None:
        self.maker, self.answerer = maker, answerer
        self.captions, self.pictures = captions, pictures
        self.fields, self.provenance = fields, provenance
        self.rows = {key: row for row, key in enumerate(pictures.keys)}
        self._answers = OrderedDict[str, Asked]()
        self._model = Lock()
        self._kept = Lock()

    def ask(self, prompt: str, seed: int = 0, picture: bytes | None = None) -> Asked:
        """Answer a question.

        Args:
            prompt: What the picture was, or will be, generated with.
            seed: Of the generation.
            picture: An encoded picture, if it is there already.

        Returns:
            The answer, which is kept for a while.

        Raises:
            InputError: If nothing can be made of the question.
        """
        prompt = _checked_prompt(prompt, picture)
        if not 0 <= seed < 2**63:
            raise InputError(f"A seed is a whole number from 0 on, below 2⁶³, but this is {seed}; choose another.")
        token = secrets.token_urlsafe(12)
        with self._model:
            started = time.monotonic()
            if picture is None:
                made = self.maker.from_prompt(f"asked-{token}", prompt, seed)
            else:
                made = self.maker.from_picture(f"asked-{token}", prompt, picture)
            seconds = time.monotonic() - started
            answer = self.answerer.answer(made.sample)
        if not np.isfinite(answer.scores).all():
            raise InputError("The scores of this picture are not finite; ask about another one.")
        order = np.lexsort((np.arange(len(answer.scores)), -answer.scores))
        asked = Asked(token, made.sample, prompt, answer, order, made.notes, seconds)
        with self._kept:
            self._answers[token] = asked
            while len(self._answers) > ANSWERS_KEPT:
                self._answers.popitem(last=False)
        return asked

    def asked(self, token: str) -> Asked | None:
        """An answer that was given.

        Args:
            token: Its name.

        Returns:
            The answer; ``None`` if it is not kept any more, or there was none.
        """
        with self._kept:
            if token in self._answers:
                self._answers.move_to_end(token)
            return self._answers.get(token)

    def groups(self, asked: Asked, name: str) -> Sequence[GroupRow]:
        """The groups that a field makes, for an answer.

        Args:
            asked: The answer.
            name: Of the field.

        Returns:
            Highest first.
        """
        return self.answerer.groups(name, asked.answer) if name in self.fields else []

    def helped(self, row: int, tokens: Sequence[str]) -> list[Helped]:
        """Which of the pictures that were asked about a training picture helped most.

        Args:
            row: Of the training picture.
            tokens: Of the questions that may be told.

        Returns:
            By its rank.
        """
        known = [asked for token in tokens if (asked := self.asked(token)) is not None]
        found = [Helped(asked, rank_of(asked.answer.scores, row), float(asked.answer.scores[row])) for asked in known]
        return sorted(found, key=lambda one: one.rank)


def rank_of(scores: Scores, row: int) -> int:
    """A sample's rank.

    Args:
        scores: ``(N,)``.
        row: Of the sample.

    Returns:
        1 for the highest.
    """
    return 1 + int((scores > scores[row]).sum())


def _checked_prompt(prompt: str, picture: bytes | None) -> str:
    if len(prompt) > LONGEST_PROMPT:
        raise InputError(
            f"This prompt has {len(prompt):,} letters, and no more than {LONGEST_PROMPT:,} are taken; shorten it."
        )
    # Half a surrogate pair is no text, and a tokenizer may fail on what is no letter.
    plain = " ".join(prompt.encode("utf-8", "replace").decode().replace("\x00", " ").split())
    if not plain:
        what = "the prompt that this picture was generated with" if picture is not None else "a prompt"
        raise InputError(f"Nothing is asked yet: write {what}.")
    if picture is not None and len(picture) > LARGEST_PICTURE:
        raise InputError(f"This picture has more than {LARGEST_PICTURE // 2**20} MB; give a smaller one.")
    return plain
