"""How many tokens of a caption a pipeline's encoders read: what it asks of its tokenizers while it encodes one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Made = TypeVar("Made")


class _Watched:
    """A tokenizer in whose place it stands, and how long it was last told to make a text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.length: int | None = None

    def __call__(self, text: Any, *arguments: Any, **settings: Any) -> Any:
        length = settings.get("max_length")
        if settings.get("truncation") and isinstance(length, int):
            self.length = length - self._around(text)
        return self._tokenizer(text, *arguments, **settings)

    def _around(self, text: Any) -> int:
        """How many tokens a pipeline puts around a caption, such as a system's prompt."""
        first = text if isinstance(text, str) else text[0]
        whole, alone = (len(self._tokenizer(one, verbose=False)["input_ids"]) for one in (first, CAPTION))
        return max(0, whole - alone)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


CAPTION = "a caption"
"""What is to be encoded while tokenizers are watched."""


def watched(pipeline: Any, tokenizers: Mapping[str, str], encode: Callable[[], Made]) -> tuple[Made, dict[str, int]]:
    """Encode :data:`CAPTION`, and see how many tokens of a caption are read.

    Args:
        pipeline: Of diffusers.
        tokenizers: What each is called in messages, to its name in the pipeline.
        encode: Encodes it by the pipeline.

    Returns:
        What ``encode`` returns, and for each tokenizer that was told a length, or that says one, the number of tokens.
    """
    before = {name: getattr(pipeline, part) for name, part in tokenizers.items()}
    watching = {name: _Watched(tokenizer) for name, tokenizer in before.items()}
    for name, part in tokenizers.items():
        setattr(pipeline, part, watching[name])
    try:
        made = encode()
    finally:
        for name, part in tokenizers.items():
            setattr(pipeline, part, before[name])
    lengths = {name: one.length or getattr(before[name], "model_max_length", None) for name, one in watching.items()}
    # A tokenizer that knows no length says a huge one.
    return made, {name: length for name, length in lengths.items() if isinstance(length, int) and length <= 4096}
