"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """Input that is refused: its message is one line that names the value, the rule and the way out.

    The command line prints the message without a traceback and exits with status 2.
    """
