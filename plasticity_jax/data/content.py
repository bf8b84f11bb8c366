"""The hash of a file's content, by which a run knows that an input was edited."""

import functools
import hashlib

from plasticity_jax.errors import UserError, reason
from plasticity_jax.progress import Progress
from plasticity_jax.runs.storage import AnyPath, is_local, location

READ_BYTES = 2**20


def content_hash(place: str | AnyPath) -> str | None:
    """The sha256 (hex) of a file; None where there is no such file. A process reads a file again only when its size or time, or what a store says of it,
    has changed.

    Raises:
      UserError: the address cannot be read.
    """
    try:
        path = location(place).expanduser()
        if not path.is_file():
            return None
        found = path.stat()
        return _sha256(path, found.st_size, str(found.st_mtime_ns) if is_local(path) else path.fs.ukey(path.path))
    except (OSError, ValueError) as error:
        raise UserError(f"{place} cannot be read ({reason(error)}); check the address") from error


@functools.lru_cache(maxsize=4096)
def _sha256(path: AnyPath, size: int, version: str) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file, Progress(f"hash {path.name}", total=size, unit="bytes") as progress:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
            progress.update(len(chunk))
    return digest.hexdigest()
