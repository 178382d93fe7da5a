"""The one exception that is meant for the person at the keyboard."""


class UserError(ValueError):
    """A mistake in a command, a config or a file, told in one sentence.

    The message names the key (or file), the value found and what is allowed. The verbs print it
    without a traceback; every other exception keeps its traceback, because it is our mistake.
    """
