r"""The final answer of a worked solution: the content of its last \boxed{...}."""

import re

# Matches escaped characters as a whole, so that \{ and \} do not count as braces.
_TOKEN = re.compile(r"\\boxed(?![A-Za-z])\s*(?P<brace>\{)?|\\.|[{}]", re.DOTALL)
_BARE = re.compile(r"[^$\n]+")


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete \boxed{...}, stripped, or None.

    Handles nested braces. Accepts the older \boxed 5, up to the next dollar sign or the end of the line. Ignores a box that is never closed.
    Time is linear in the length of the text.

    Source: paper section 5.2; the form without braces is that of a few solutions of MATH (Hendrycks et al. 2021, arXiv 2103.03874).
    """
    last_start, last_end = -1, -1  # an end of -1: a box without braces
    open_braces: list[int | None] = []  # where the content of a box begins; None for a brace that is not a box's
    for token in _TOKEN.finditer(text):
        word = token.group()
        if word.startswith("\\boxed"):
            if token["brace"]:
                open_braces.append(token.end())
            elif text[token.end() : token.end() + 1] not in ("", "$", "}"):
                last_start, last_end = token.end(), -1
        elif word == "{":
            open_braces.append(None)
        elif word == "}" and open_braces:
            start = open_braces.pop()
            if start is not None and start > last_start:
                last_start, last_end = start, token.start()
    if last_start < 0:
        return None
    if last_end >= 0:
        return text[last_start:last_end].strip()
    bare = _BARE.match(text, last_start)
    return bare.group().strip() if bare else None
