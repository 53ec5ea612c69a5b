"""The one exception that bad input gets: a sentence that names the thing, the place and the remedy."""


class InputError(ValueError):
    """Something a user gave can't be used; the message is one sentence and says what to do.

    The command line prints the message alone, without a stack trace.
    """
