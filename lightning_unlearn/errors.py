"""The one exception that bad input gets: a sentence that names the thing, the place and the remedy.

And how a sentence names many things.
"""

from collections.abc import Sequence

NAMED = 5


class InputError(ValueError):
    r"""Something a user gave can't be used; the message is one sentence and says what to do.

    The command line prints the message alone, without a stack trace. Names and reasons in it come from anywhere, so
    what a terminal would obey instead of showing it is written as an escape.

    Args:
        message: The sentence.

    Example:
        >>> print(InputError("There is no shard at \x1b[2J.tar."))
        There is no shard at \x1b[2J.tar.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """A text that can be printed and written anywhere: control characters and half surrogates as escapes.

    Args:
        text: Any text.

    Returns:
        One line.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def some_of(said: Sequence[str]) -> str:
    """What a message says of many things, the first of them where there are more than five.

    Args:
        said: Of each thing.

    Returns:
        One line.
    """
    return ", ".join([*said[:NAMED], *(["…"] if len(said) > NAMED else [])])
