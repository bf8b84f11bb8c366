"""Where a completion's text ends: at the first stop string."""

from collections.abc import Callable, Sequence

from plasticity_jax.data.tokenizer import Tokenizer


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """A completion's text up to the first stop string. Source: paper section 5.1."""
    return text[: _first(text, stop)]


def stop_check(tokenizer: Tokenizer, stop: Sequence[str]) -> Callable[[list[int]], bool] | None:
    """A function of token ids: whether no further token can change where `cut_at_stop` cuts their text. None without stop strings."""
    return (lambda tokens: has_stopped(tokenizer.decode(tokens), stop)) if stop else None


def has_stopped(text: str, stop: Sequence[str]) -> bool:
    """Whether the text contains a stop string, and further text cannot complete one that begins earlier."""
    first = _first(text, stop)
    longest = max(map(len, stop), default=0)
    unfinished = (text[start:] for start in range(max(0, len(text) - longest + 1), first))
    return first < len(text) and not any(string.startswith(end) for end in unfinished for string in stop)


def _first(text: str, stop: Sequence[str]) -> int:
    return min((position for string in stop if (position := text.find(string)) >= 0), default=len(text))
