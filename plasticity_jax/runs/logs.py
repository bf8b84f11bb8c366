"""Files that rows are appended to: one file on a disk, numbered parts on a store, where nothing can be appended.

Parts are `metrics.00001.jsonl`, `metrics.00002.jsonl` ... beside where `metrics.jsonl` would lie. Each is one object, written when it is closed. Rows come
in the order of their steps, so whatever is cut off, by a kill or on purpose, is cut off at the end.
"""

import io
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from plasticity_jax.runs.jsonfiles import iter_jsonl, to_json
from plasticity_jax.runs.storage import AnyPath, is_local, read_bytes, replacing, upload, write_bytes
from plasticity_jax.runs.tracker import Tracker

METRICS = "metrics.jsonl"


class AppendLog:
    """Rows of JSON, appended.

    Args:
      path: of the file as it is called on a disk.
      keep: of a row that is there already; the first that is not kept, or is damaged, goes with all that follow.
    """

    def __init__(self, path: AnyPath, *, keep: Callable[[dict], bool]):
        self._path = path
        self._file = None
        if is_local(path):
            if path.exists():
                _write(path, _kept(_lines(read_bytes(path)), keep))
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
    """The rows of a log, in order; none if there is no log. A half-written last line (after a kill) is left out. Raises UserError at a line that holds none."""
    rows = []
    for part in [path] if is_local(path) else [part for _, part in _parts(path)]:
        if part.is_file():
            rows += iter_jsonl(part)
    return rows


def read_whole_rows(path: AnyPath) -> list[dict]:
    """The rows of a log before the first line that holds none."""
    lines = [
        line for part in ([path] if is_local(path) else [part for _, part in _parts(path)]) if part.is_file() for line in _lines(read_bytes(part))
    ]
    return [row for line in _kept(lines, lambda row: True) if (row := _row(line)) is not None]


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
        lines = _lines(read_bytes(part))
        good = len(_kept(lines, keep))
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


def _kept(lines: list[bytes], keep: Callable[[dict], bool]) -> list[bytes]:
    """The lines before the first that holds no row, or one that is not kept."""
    return list(itertools.takewhile(lambda line: (row := _row(line)) is not None and keep(row), lines))


def _row(line: bytes) -> dict | None:
    """The row that a line holds; None if it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _lines(content: bytes) -> list[bytes]:
    """The whole lines. Not splitlines(): text holds characters that it takes for a line's end."""
    return [line + b"\n" for line in content.split(b"\n")[:-1]]


def _write(path: AnyPath, lines: list[bytes]) -> None:
    with replacing(path) as file:
        file.writelines(lines)


class LiveView(Protocol):
    """Where the numbers of a run can be watched while it trains."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Shows finite numbers of a step, by name."""

    def flush(self) -> None:
        """Makes what was written outlive this process."""

    def close(self, *, hurry: bool) -> None:
        """The same, and ends; in a hurry without waiting for others."""


class MetricsLog:
    """`metrics.jsonl` and the live views of a run: one row of numbers per logged step. On a store the log is brought there by `close_part`.

    Args:
      directory: the run's directory.
      step: rows after this step are dropped first, so that a resumed run repeats none.
      tracker: `launch.tracker`: a live view beside TensorBoard's events.
    """

    def __init__(self, directory: AnyPath, *, step: int, tracker: str = "none"):
        self._rows = AppendLog(directory / METRICS, keep=lambda row: row["step"] <= step)
        self._views: list[LiveView] = [_TensorBoard(directory / "tensorboard", step)]
        if tracker != "none":
            self._views.append(Tracker(directory))

    def write(self, step: int, **values: Any) -> None:
        """Appends `values`; in live views the names of nested dicts are joined by slashes."""
        self._rows.append(to_json({"step": step, **values}))
        numbers = {name: value for name, value in _flatten(values) if isinstance(value, (int, float)) and math.isfinite(value)}
        for view in self._views:
            view.write(step, numbers)

    def close_part(self) -> None:
        """Makes what was written outlive this process, also on a store; call it before a checkpoint from which a later process may resume."""
        self._rows.close_part()
        for view in self._views:
            view.flush()

    def close(self, *, hurry: bool = False) -> None:
        """Ends the log.

        Args:
          hurry: the process was told to end, so live views that others keep are not waited for.
        """
        self._rows.close()
        for view in self._views:
            view.close(hurry=hurry)


class _TensorBoard:
    """TensorBoard events in a folder. On a disk they appear at once, on a store at each flush. Those of an earlier process are hidden after `step`.

    Not tensorboardX's SummaryWriter, which registers itself to be closed at exit, so that the process would keep each one until then, nor its
    EventFileWriter, whose thread ends at a full disk or when the clock goes back far, and the training would wait for it for ever.
    """

    def __init__(self, folder: AnyPath, step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        self._folder = folder
        self._temporary = None if is_local(folder) else tempfile.TemporaryDirectory(prefix="plasticity-events-")
        first = step + 1
        place = Path(self._temporary.name if self._temporary else str(folder))
        place.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(place / "events"), f".{first}")  # its names have whole seconds only
        self._add(first, file_version="brain.Event:2")
        self._add(first, session_log=SessionLog(status=SessionLog.START))

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

        self._events.write_event(Event(wall_time=time.time(), step=step, **content))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        from tensorboardX.summary import scalar

        for tag, value in numbers.items():
            self._add(step, summary=scalar(tag, value))
        self._events.flush()

    def flush(self) -> None:
        if self._temporary is not None and not is_local(self._folder):
            upload(Path(self._temporary.name), self._folder)

    def close(self, *, hurry: bool) -> None:
        self._events.close()
        if self._temporary is not None and not is_local(self._folder):
            upload(Path(self._temporary.name), self._folder)
            self._temporary.cleanup()


def _flatten(values: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value
