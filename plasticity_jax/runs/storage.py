"""Where files lie: a local disk, or an object store named by a URL such as gs://bucket/folder. The one path type, and what differs between the two.

A path is `pathlib.Path` on a disk and `upath.UPath` on a store; both read, list and join alike. Only what a store cannot do as a disk does is here:
files that appear whole, trees of files, and a local place for what libraries can only write locally. A store knows no folders: `make_folder` does
nothing there.
"""

import contextlib
import errno
import hashlib
import io
import os
import posixpath
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypeAlias

import fsspec
from fsspec.callbacks import Callback
from typing_extensions import TypeIs
from upath import UPath

from plasticity_jax.errors import UserError, reason
from plasticity_jax.progress import Progress
from plasticity_jax.text import local_path

AnyPath: TypeAlias = Path | UPath

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_EXTRAS = {
    "gs": "'plasticity_jax[gcs]'",
    "gcs": "'plasticity_jax[gcs]'",
    "s3": "s3fs",
    "s3a": "s3fs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
}

# Where what goes to a store is made on this machine; the variable is for machines whose home is small.
CACHE_VARIABLE, _CACHE = "PLASTICITY_CACHE", "~/.cache/plasticity_jax"


def location(place: str | os.PathLike | UPath) -> AnyPath:
    """The path that a text names: local, or on a store if it is a URL. A path is given back as it is.

    Raises:
      UserError: a URL of an unknown kind, without a bucket, or whose driver is not installed.
    """
    if isinstance(place, UPath):
        return place
    url = _URL.fullmatch(place) if isinstance(place, str) else None
    if url is None:
        return Path(place) if isinstance(place, Path) else local_path(str(place))
    scheme, rest = url[1].lower(), url[2]
    if scheme in ("file", "local"):
        return Path(rest)
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise UserError(
            f"{place} needs a driver that is not installed ({reason(error)}); run pip install {_EXTRAS.get(scheme, 'with its name')}."
        ) from error
    except ValueError as error:
        raise UserError(
            f"{place} begins with {scheme}://, which is not a known kind of store; give gs://bucket/folder, another store or a local path."
        ) from error
    if not rest.strip("/"):
        raise UserError(f"{place} names no bucket; give {scheme}://bucket/folder.")
    # Other processes write to the store too, so what it holds is never answered from memory.
    return UPath(f"{scheme}://{rest.rstrip('/')}", use_listings_cache=False)


def is_local(path: AnyPath) -> TypeIs[Path]:
    """Whether a path lies on a disk of this machine, or one that is mounted like it."""
    return isinstance(path, Path)


# ------------------------------------------------------------------------------------------------------------------------- single files


@contextlib.contextmanager
def replacing(path: AnyPath, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """A binary file to write to, which takes the place of `path` when the block ends: a reader sees the old file or the whole new one.

    If the block raises, the old file stays. The folder must exist.

    Args:
      durable: force it onto the disk, so that it also survives the machine.
    """
    if not is_local(path):
        with io.BytesIO() as content:
            yield content
            path.fs.pipe_file(path.path, content.getvalue())
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def open_file(path: AnyPath) -> IO[bytes]:
    """Opens a file of a run to read. Raises UserError at a pipe, which would be waited for, a device, which may not end, and a folder."""
    if is_local(path) and os.path.lexists(path) and not path.is_file():
        raise UserError(f"{path} is no regular file; delete it and run again.")
    return path.open("rb")


def read_bytes(path: AnyPath) -> bytes:
    """All of a file that `open_file` opens."""
    with open_file(path) as file:
        return file.read()


def remove_partial(folder: AnyPath) -> None:
    """Removes the files of a folder that a killed `replacing` has left half-written. Only where no other process writes there."""
    for partial in folder.glob(".*.partial") if is_local(folder) else ():
        partial.unlink(missing_ok=True)


def write_bytes(path: AnyPath, content: bytes) -> None:
    """Writes a file that readers see whole or not at all."""
    with replacing(path) as file:
        file.write(content)


def make_folder(path: AnyPath) -> None:
    """Makes a folder and those above it, where there are folders."""
    if is_local(path):
        path.mkdir(parents=True, exist_ok=True)


def relative(path: AnyPath, start: AnyPath) -> str:
    """`path` as seen from the folder `start`; the whole path where they lie on different stores."""
    if is_local(path) and is_local(start):
        return os.path.relpath(path, start)
    if is_local(path) or is_local(start) or path.protocol != start.protocol:
        return str(path.absolute())
    return posixpath.relpath(path.path, start.path)


def joined(start: AnyPath, place: str) -> AnyPath:
    """The path that `relative` wrote, seen from `start` again."""
    if _URL.fullmatch(place) or (Path(place).is_absolute() and not is_local(start)):
        return location(place)
    return start / place if is_local(start) else (start / place).resolve()  # stores take ".." for a name


# ------------------------------------------------------------------------------------------------------------------------ trees of files


def remove_tree(path: AnyPath) -> None:
    """Removes a folder with all that is below it, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        if is_local(path):
            shutil.rmtree(path)
        else:
            path.fs.rm(path.path, recursive=True)


def upload(folder: Path, target: UPath, *, last: str | None = None) -> None:
    """Copies the files below a local folder to a store.

    Args:
      last: the file in the folder that is copied after all others, and so stands for the whole.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).as_posix() != last)
    with _Transfer(f"upload {target.name}", total=sum(path.stat().st_size for path in files)) as transfer:
        target.fs.put([str(path) for path in files], [f"{target.path}/{path.relative_to(folder).as_posix()}" for path in files], callback=transfer)  # pyright: ignore[reportArgumentType]
    if last is not None:
        write_bytes(target / last, (folder / last).read_bytes())


class _Transfer(Callback):
    """What fsspec reports of a transfer, as our progress in bytes."""

    def __init__(self, what: str, *, total: int):
        super().__init__()
        self._progress = Progress(what, total=total, unit="bytes")

    def branched(self, path_1: str, path_2: str, **kwargs: Any) -> Callback:
        return _OneFile(self._progress)

    def __enter__(self) -> "_Transfer":
        self._progress.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._progress.__exit__(*exception)


class _OneFile(Callback):
    def __init__(self, progress: Progress):
        super().__init__()
        self._progress = progress

    def relative_update(self, inc: int = 1) -> None:
        self._progress.update(inc)


# --------------------------------------------------------------------------------------------------------------------------- staging


def cache_folder() -> Path:
    """The folder on this machine for what goes to a store when it is finished: ~/.cache/plasticity_jax, or what $PLASTICITY_CACHE names."""
    return Path(os.environ.get(CACHE_VARIABLE) or _CACHE).expanduser()


@contextlib.contextmanager
def staging(folder: AnyPath) -> Iterator[Path]:
    """A local folder to write to: `folder` itself, or one whose files are copied to the store when the block ends without an error.

    After an error the files stay on this machine, and the next call for the same folder finds them: what can resume does.
    """
    if is_local(folder):
        yield folder
        return
    stage = cache_folder() / "unfinished" / f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"
    stage.mkdir(parents=True, exist_ok=True)
    yield stage
    upload(stage, folder)
    shutil.rmtree(stage, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------------------------- room


def check_writable(folder: AnyPath) -> None:
    """Makes a folder and tries to write to it. Raises OSError with `strerror` if that fails."""
    if is_local(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
        return
    probe = folder / f".probe.{os.getpid()}"
    try:
        write_bytes(probe, b"\0")
        probe.unlink()
    except Exception as error:  # every driver has types of its own for a missing bucket or missing rights
        raise OSError(errno.EIO, reason(error)) from error


def check_checkpoint_place(place: AnyPath) -> None:
    """Refuses a store on which a half-written checkpoint could be taken for a whole one: all but gs://, where Orbax commits steps. Raises UserError."""
    if not is_local(place) and place.protocol not in ("gs", "gcs"):
        raise UserError(f"{place}: checkpoints are written to a local or shared disk, or to gs://; give one of these.")


def free_bytes(folder: AnyPath) -> int | None:
    """Free space of a folder's disk; None on a store, which has no end."""
    return shutil.disk_usage(folder).free if is_local(folder) else None
