"""Colors, where a terminal shows them."""

import os
from typing import IO

_CODES = {"red": 31, "green": 32, "yellow": 33, "blue": 34, "dim": 2}


def colored(text: str, color: str, stream: IO[str]) -> str:
    """The text in a color for a stream that is a terminal; as it is elsewhere, and where NO_COLOR (no-color.org) is set.

    Args:
      color: red, green, yellow, blue or dim.
    """
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{_CODES[color]}m{text}\x1b[0m"
