"""The exceptions that stand for a user's mistake, and how they word the exceptions of others."""

LONGEST = 1000  # characters of a message; of a longer one the beginning and the end are kept
_END = 300  # which say the way out


class UserError(ValueError):
    """Input that is refused: its message is one line that names the value, the rule and the way out.

    What the input holds cannot break the line: characters that do not print are written as escapes, and the middle of a long one is left out.

    The command line prints the message without a traceback and exits with status 2.
    """

    def __init__(self, message: str):
        super().__init__(_one_line(message))


def _one_line(message: str) -> str:
    printed = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in message)
    return printed if len(printed) <= LONGEST else f"{printed[: LONGEST - _END]} … {printed[-_END:]}"


class StudyRefused(UserError):
    """A refusal that concerns more than one run, such as a full disk: it ends the study, where another refusal only fails its run."""


def reason(error: BaseException) -> str:
    """What an exception of a library says, on one line of at most 200 characters; the name of its type where it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__
