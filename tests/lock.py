"""Writes requirements-lock.txt: every package of the test environment with its version and the SHA-256 of the file that pip takes for it here.

Command: make lock. It asks pip's index for the files' hashes and installs nothing; the index itself is named nowhere.
"""

import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

LOCK = Path(__file__).parents[1] / "requirements-lock.txt"
HEAD = """\
# The environment that the tests run in: Python {python} on {system}. Written by make lock.
# Install:  pip install --require-hashes --no-deps -r requirements-lock.txt && pip install --no-deps -e .
"""


def pip(*arguments: str) -> str:
    return subprocess.run([sys.executable, "-m", "pip", *arguments], check=True, capture_output=True, text=True).stdout


def main() -> None:
    pinned = [line for line in pip("freeze", "--exclude-editable").splitlines() if re.fullmatch(r"[A-Za-z0-9._-]+==\S+", line)]
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "asked.txt", Path(folder) / "answer.json"
        asked.write_text("\n".join(pinned))
        pip("install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps", "--report", str(answer), "-r", str(asked))
        report = json.loads(answer.read_text(encoding="utf-8"))
    LOCK.write_text(locked(report), encoding="utf-8")
    print(f"{LOCK.name}: {len(report['install'])} packages")


def locked(report: dict) -> str:
    """The lines of the lock file for what pip would install."""
    lines = []
    for item in report["install"]:
        name, version = (item["metadata"][key] for key in ("name", "version"))
        lines.append(f"{name.lower().replace('_', '-')}=={version} --hash=sha256:{item['download_info']['archive_info']['hashes']['sha256']}\n")
    head = HEAD.format(python=".".join(platform.python_version_tuple()[:2]), system=f"{platform.system()} {platform.machine()}")
    return head + "".join(sorted(lines))


if __name__ == "__main__":
    main()
