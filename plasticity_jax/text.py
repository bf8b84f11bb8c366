"""Text from outside that no file system and no tokenizer takes, and numbers as text."""

import os
from pathlib import Path

from plasticity_jax.errors import UserError

LONGEST_PART, LONGEST_PATH = 255, 3500  # bytes; file systems take 255 and Linux 4,095, of which a study's own folders need some


def valid_text(what: str, text: str) -> str:
    """The text itself. Raises UserError if it holds half a character (a lone surrogate), as JSON and command lines may, which no file and no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} holds {text[error.start]!r} at character {error.start + 1}, which is no valid text; correct its encoding to UTF-8."
        ) from None
    return text


def local_path(place: str) -> Path:
    """The path that a text names. Raises UserError for one that no file can have."""
    if not place:
        raise UserError("a path is empty, perhaps a variable that is not set; give one, or . for this folder.")
    if "\0" in place:
        raise UserError(f"{place} holds a NUL character, which no path may; correct it.")
    path = Path(valid_text("a path", place))
    absolute = os.path.abspath(place)
    longest = max(len(part.encode()) for part in path.parts) if path.parts else 0
    if longest > LONGEST_PART or len(absolute.encode()) > LONGEST_PATH:
        raise UserError(f"{place} is too long for a path: of {LONGEST_PATH} bytes a part may have {LONGEST_PART}; give a shorter one.")
    try:
        path.expanduser()
    except RuntimeError:
        raise UserError(f"{place} begins with the home of a user who is not known here; write the whole path.") from None
    return path


def three_digits(value: float) -> str:
    """A number that is not negative in three digits, whole above a thousand, and never with an exponent."""
    if 0 < value < 0.001:
        return "<0.001"
    return f"{value:,.3g}" if value < 999.5 else f"{value:,.0f}"
