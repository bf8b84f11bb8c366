"""A file that rows are appended to: one file on a disk, numbered parts on a store, where nothing can be appended.

Parts are `metrics.00001.jsonl`, `metrics.00002.jsonl` ... beside where `metrics.jsonl` would lie. Each is one object, written when it is closed. Rows come in the
order of their steps, so whatever is cut off, by a kill or on purpose, is cut off at the end.
"""

import io
import json
from collections.abc import Callable

from plasticity_jax.runs.storage import AnyPath, is_local, replacing, write_bytes


class AppendLog:
    """Rows of JSON, appended.

    Args:
      path: of the file as it is called on a disk.
      keep: of a row that is there already; the first that is not kept goes with all that follow.
    """

    def __init__(self, path: AnyPath, *, keep: Callable[[dict], bool]):
        self._path = path
        self._file = None
        if is_local(path):
            if path.exists():
                _write(path, [line for line in _lines(path.read_bytes()) if keep(json.loads(line))])
            self._file = open(path, "a", encoding="utf-8")
        else:
            self._part = io.StringIO()
            self._number = _cut(path, keep)

    def append(self, row: str) -> None:
        """Appends one row, a line of JSON without its end. On a disk it is there at once, on a store once its part is closed."""
        if self._file is not None:
            self._file.write(row + "\n")
            self._file.flush()
        else:
            self._part.write(row + "\n")

    def close_part(self) -> None:
        """Brings what was appended to the store; on a disk it is there already."""
        if self._file is None and self._part.tell():
            write_bytes(_part_path(self._path, self._number + 1), self._part.getvalue().encode())
            self._number += 1
            self._part = io.StringIO()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        else:
            self.close_part()


def read_log(path: AnyPath) -> list[dict]:
    """The rows of a log, in order; none where there is no log. A half-written last line (after a kill) is left out."""
    if is_local(path):
        contents = [path.read_bytes()] if path.is_file() else []
    else:
        contents = [part.read_bytes() for _, part in _parts(path)]
    return [json.loads(line) for content in contents for line in _lines(content)]


def remove_log(path: AnyPath) -> None:
    """Removes a log, whichever form it has."""
    for part in [path] if is_local(path) else [part for _, part in _parts(path)]:
        part.unlink(missing_ok=True)


def _cut(path: AnyPath, keep: Callable[[dict], bool]) -> int:
    """Drops the rows from the first that is not kept on; returns the number of the last part that is left.

    From the end, so that a kill in between leaves no gap.
    """
    parts = _parts(path)
    kept = []
    for number, part in parts:
        lines = _lines(part.read_bytes())
        good = next((i for i, line in enumerate(lines) if not keep(json.loads(line))), len(lines))
        kept.append((number, part, lines, good))
        if good < len(lines):
            break
    for _, part in reversed(parts[len(kept) :]):
        part.unlink()
    if not kept:
        return 0
    number, part, lines, good = kept[-1]
    if good == 0:
        part.unlink()
        return number - 1
    if good < len(lines):
        _write(part, lines[:good])
    return number


def _parts(path: AnyPath) -> list[tuple[int, AnyPath]]:
    """(number, path) of the parts, in order."""
    head, tail = f"{path.stem}.", path.suffix
    numbered = {}
    for part in path.parent.glob(f"{head}*{tail}"):
        digits = part.name.removeprefix(head).removesuffix(tail)
        if digits.isdigit():
            numbered[int(digits)] = part
    return sorted(numbered.items())


def _part_path(path: AnyPath, number: int) -> AnyPath:
    return path.with_name(f"{path.stem}.{number:05d}{path.suffix}")


def _lines(content: bytes) -> list[bytes]:
    """The whole lines. Not splitlines(): text holds characters that it takes for a line's end."""
    return [line + b"\n" for line in content.split(b"\n")[:-1]]


def _write(path: AnyPath, lines: list[bytes]) -> None:
    with replacing(path) as file:
        file.writelines(lines)
