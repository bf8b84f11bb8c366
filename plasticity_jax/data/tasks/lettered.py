"""Questions with lettered options, as in MedMCQA and MMLU-Pro."""

import string
from collections.abc import Sequence

LETTERS = string.ascii_uppercase


def lettered_options(options: Sequence[str]) -> str:
    """The options one per line, "A. ..." first."""
    return "\n".join(f"{letter}. {' '.join(option.split())}" for letter, option in zip(LETTERS, options))
