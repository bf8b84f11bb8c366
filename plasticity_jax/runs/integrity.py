"""Checksums of the files of a finished run, by which any that was altered, cut off or lost is found."""

import fnmatch
import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from plasticity_jax.progress import Progress
from plasticity_jax.runs.storage import AnyPath, relative

T = TypeVar("T")
U = TypeVar("U")

SMALL = 64 * 2**20  # bytes up to which a file is read whenever its run is opened
ARRAYS = ("checkpoints/*", "*.array_record")  # files that are not: their formats find most damage by themselves
READERS = 8

Checksums = dict[str, tuple[int, str]]


def checksums(folder: AnyPath, *, without: tuple[str, ...]) -> Checksums:
    """Every file below a folder, by its path from there: (bytes, SHA-256).

    Args:
      without: names of files of the folder itself that are left out.
    """
    files = {name: path for name, path in sorted(_files(folder)) if name not in without}
    with Progress(f"checksums of {folder.name}", total=len(files), unit="files") as progress:
        return dict(zip(files, _each(_checksum, files.values(), progress), strict=True))


def differences(folder: AnyPath, recorded: Checksums, *, whole: bool = False) -> list[str]:
    """What is no longer as recorded, such as "results.json has been altered"; empty if all files are.

    Files that were added say nothing and do no harm.

    Args:
      whole: read every file. Otherwise those of more than `SMALL` bytes and `ARRAYS` are judged by their size.
    """

    def difference(name: str) -> str | None:
        size, digest = recorded[name]
        try:
            path = folder / name
            found = path.stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes instead of {size:,}"
            read = whole or (size <= SMALL and not any(fnmatch.fnmatchcase(name, pattern) for pattern in ARRAYS))
            if read and _digest(path) != digest:
                return f"{name} has been altered"
        except FileNotFoundError:
            return f"{name} is missing"
        return None

    with Progress(f"verify {folder.name}", total=len(recorded), unit="files") as progress:
        return [found for found in _each(difference, recorded, progress) if found]


def _files(folder: AnyPath) -> Iterator[tuple[str, AnyPath]]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield relative(path, folder), path


def _each(function: Callable[[T], U], items: Iterable[T], progress: Progress) -> Iterator[U]:
    """What a function makes of each item; several at once, because files on a store take long to open."""
    with ThreadPoolExecutor(READERS) as readers:
        for found in readers.map(function, items):
            progress.update(1)
            yield found


def _checksum(path: AnyPath) -> tuple[int, str]:
    return path.stat().st_size, _digest(path)


def _digest(path: AnyPath) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
