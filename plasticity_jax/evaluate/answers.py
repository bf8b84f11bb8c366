"""Which answer a completion gives, whether it is right, and which answer is the majority's."""

import re
import string
from collections.abc import Sequence
from decimal import Decimal

from plasticity_jax.data.tasks.boxed import last_boxed

MARKER = "answer is"
MAJORITY_WINDOW = 128  # characters at the end of a completion that the majority reads; paper section 5.4
GRADERS = ("exact", "number", "letter")  # "math" is `grading.Grading`'s

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)", re.ASCII)
# What may precede a letter: "(B)", "**B**", "\\text{(B)}". Possessive quantifiers keep the time linear on hostile texts.
_OPENING = r"[\s(\[{\"'`*$]*+(?:\\(?:text|textbf|textrm|mathrm|mathbf)\s*+\{)?+[\s(\[{\"'`*]*+"
# A letter is an answer by itself, or if more than a space separates it from what follows: "A dog" begins with an article, "A and B" names two.
_SET_OFF = r"(?:[\s)\]}\"'`*$.:;,!?]*+$|[)\]}\"'`*$]*[.:)\]}](?!\w)|[)\]}\"'`*$.:;,]*+[ \t]*+\n|\s++[-–—]++\s)"
_LETTER = re.compile(_OPENING + "([A-Ja-j])" + _SET_OFF)
_TWO_LETTERS = re.compile(_OPENING + r"[A-J]\W*+(?:and|or)\W++[A-J](?!\w)", re.IGNORECASE)
_AROUND_NUMBERS = string.punctuation.replace("-", "").replace("+", "").replace(".", "") + string.whitespace


def extract_answer(text: str) -> str | None:
    """The answer that a completion states.

    The content of the last `\\boxed{...}` with balanced braces; without one, the text after the last "answer is", or after its last colon if it has
    one. Time is linear in the text's length.

    Returns:
      The answer, stripped of surrounding white space; None if there is none or it is empty.
    Source: paper section 5.2.
    """
    answer = last_boxed(text)
    if answer is None:
        _, marker, answer = text.rpartition(MARKER)
        if not marker:
            return None
        answer = answer.rpartition(":")[2]
    return answer.strip() or None


def judge(answer: str | None, gold: str, grader: str, *, faithful: bool = False) -> bool:
    """Whether an answer is right.

    Args:
      answer: what `extract_answer` found; None is wrong.
      gold: the right answer.
      grader: "exact" compares the first words without surrounding punctuation, ignoring case; "number" compares exact decimal values after
        stripping punctuation around them and commas inside, and a text that is not a number is wrong; "letter" compares the options' letters, A to J in
        either case, with which the texts begin ("B", "(c)", "D. Paris", but neither "A dog" nor "A and B"), and otherwise the texts, stripped of
        punctuation around them.
      faithful: "letter" knows A to D only, as in the original, so that only "E" itself equals the gold "E".
    Raises:
      ValueError: an unknown grader.
    Source: paper section 5.3.
    """
    _check_grader(grader)
    if answer is None:
        return False
    if grader == "letter":
        return _option(answer, faithful) == _option(gold, faithful)
    read = _number if grader == "number" else _first_word
    found = read(answer)
    return found is not None and found == read(gold)


def majority_index(completions: Sequence[str], grader: str | None = None, *, faithful: bool = False) -> int:
    """Position of the first completion of the largest cluster of equivalent answers.

    Answers are read from the last 128 characters of each completion. A completion without an answer is a cluster of its own. Ties go to the
    cluster that comes first.

    Args:
      completions: at least one.
      grader: defines which answers are equivalent. None compares numbers by value and other texts up to case, white space and surrounding
        punctuation. For "math", see `grading.Grading.majority`.
      faithful: see `judge`.
    Raises:
      ValueError: no completions, or an unknown grader.
    Source: paper section 5.4.
    """
    if not completions:
        raise ValueError("completions is empty; a majority needs at least one completion.")
    if grader is not None:
        _check_grader(grader)
    sizes: dict[tuple, int] = {}
    first: dict[tuple, int] = {}
    for index, completion in enumerate(completions):
        answer = extract_answer(completion[-MAJORITY_WINDOW:])
        cluster = ("none", index) if answer is None else _cluster(answer, grader, faithful)
        sizes[cluster] = sizes.get(cluster, 0) + 1
        first.setdefault(cluster, index)
    return first[max(sizes, key=sizes.__getitem__)]


def majority_answer(completions: Sequence[str], grader: str | None = None, *, faithful: bool = False) -> str | None:
    """The answer of the completion at `majority_index`; None if it has none."""
    return extract_answer(completions[majority_index(completions, grader, faithful=faithful)][-MAJORITY_WINDOW:])


def _cluster(answer: str, grader: str | None, faithful: bool) -> tuple:
    if grader == "letter":
        return _option(answer, faithful)
    if grader == "exact":
        word = _first_word(answer)
        if word is not None:
            return ("word", word)
    else:
        number = _number(answer)
        if number is not None:
            return ("number", number)
    text = " ".join(answer.casefold().split())
    return ("text", text.strip(string.punctuation + " ") or text)


def _first_word(text: str) -> str | None:
    """The first word that is not only punctuation, case-folded."""
    stripped = (word.strip(string.punctuation) for word in text.split())
    return next((word.casefold() for word in stripped if word), None)


def _option(text: str, faithful: bool) -> tuple[str, str]:
    """("letter", the option's letter), or ("text", the text without surrounding punctuation)."""
    match = _LETTER.match(text)
    letter = match[1].upper() if match and not _TWO_LETTERS.match(text) else None
    if letter is not None and not (faithful and letter > "D"):
        return "letter", letter
    return "text", text.strip(string.punctuation + string.whitespace)


def _number(text: str) -> Decimal | None:
    """The value of a text that is one number, such as "1,234.", "$5" or "(-0.5)", but not "3 apples"."""
    bare = text.strip(_AROUND_NUMBERS).rstrip(string.punctuation + string.whitespace).replace(",", "")
    return Decimal(bare) if _NUMBER.fullmatch(bare) else None


def _check_grader(grader: str) -> None:
    if grader not in GRADERS:
        raise ValueError(f"grader {grader!r} is unknown; use one of {', '.join(GRADERS)}.")
