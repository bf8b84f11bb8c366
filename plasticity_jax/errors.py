"""The exceptions that stand for a user's mistake, and how they word the exceptions of others."""


class UserError(ValueError):
    """Input that is refused: its message is one line that names the value, the rule and the way out.

    The command line prints the message without a traceback and exits with status 2.
    """


class StudyRefused(UserError):
    """A refusal that concerns more than one run, such as a full disk: it ends the study, where another refusal only fails its run."""


def reason(error: BaseException) -> str:
    """What an exception of a library says, on one line of at most 200 characters; the name of its type where it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__
