"""The one exception that bad input gets: a sentence that names the thing, the place and the remedy.

And how a sentence names many things.
"""

from collections.abc import Sequence

NAMED = 5


class InputError(ValueError):
    """Something a user gave can't be used; the message is one sentence and says what to do.

    The command line prints the message alone, without a stack trace.
    """


def some_of(said: Sequence[str]) -> str:
    """What a message says of many things, the first of them where there are more than five.

    Args:
        said: Of each thing.

    Returns:
        One line.
    """
    return ", ".join([*said[:NAMED], *(["…"] if len(said) > NAMED else [])])
