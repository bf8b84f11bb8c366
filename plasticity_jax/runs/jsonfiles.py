"""Strict JSON, and JSON lines."""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

from plasticity_jax.errors import UserError, reason
from plasticity_jax.runs.storage import AnyPath, open_file, replacing, write_bytes

LONGEST = 2**29  # bytes of a JSON file, and of a line


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON: non-finite numbers become the strings "inf", "-inf", "nan"; NumPy scalars and arrays become plain values."""
    return json.dumps(_strict(value), allow_nan=False, ensure_ascii=False, indent=indent)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(v) for v in value]
    if hasattr(value, "tolist"):
        return _strict(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, AnyPath):
        return str(value)
    return value


@contextlib.contextmanager
def damaged(path: AnyPath) -> Iterator[None]:
    """Takes what is missing, or of another type, in what was read from a file of a run for its damage. Raises UserError."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {reason(error)}"
        raise UserError(f"{path} is damaged, or of another version ({said}); put the file back, or delete {path.parent} and run again.") from error


def write_json(path: AnyPath, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the whole new one, never a part."""
    write_bytes(path, (to_json(value, indent=1) + "\n").encode())


def read_json(path: AnyPath) -> dict[str, Any]:
    """Reads a JSON object; `float(x)` turns the strings "inf", "-inf" and "nan" back into numbers. Raises UserError if it is none."""
    with open_file(path) as file:
        content = file.read(LONGEST + 1)
    if len(content) > LONGEST:
        raise UserError(f"{path} holds more than {LONGEST / 2**20:,.0f} MiB, which nothing here writes as one piece; delete it and run again.")
    try:
        found = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({reason(error)}); delete it and run again.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds {type(found).__name__} instead of an object; delete it and run again.")
    return found


def write_jsonl(path: AnyPath, rows: Iterable[dict]) -> None:
    """Writes one JSON object per line, atomically."""
    with replacing(path) as file:
        file.writelines((to_json(row) + "\n").encode() for row in rows)


def iter_jsonl(path: AnyPath) -> Iterator[dict]:
    """The objects of a file with one per line; a half-written last line (after a kill) is left out. Raises UserError at a line that holds none."""
    with open_file(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST), b""), 1):
            if not line.endswith(b"\n"):
                if len(line) == LONGEST:
                    raise UserError(f"{path}: line {number} is longer than {LONGEST / 2**20:,.0f} MiB; delete {path.parent} and run again.")
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: line {number} is not valid JSON ({reason(error)}); delete {path.parent} and run again.") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}: line {number} holds {type(row).__name__} instead of an object; delete {path.parent} and run again.")
            yield row


def read_jsonl(path: AnyPath) -> list[dict]:
    """`iter_jsonl` as a list."""
    return list(iter_jsonl(path))
