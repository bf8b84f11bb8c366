"""Tasks on disk: `train.jsonl`, `verifier.jsonl`, `test.jsonl` and `summary.json`, the last written last."""

import dataclasses
import hashlib
import json
import os
from collections import Counter
from pathlib import Path

from plasticity_jax.data.tasks.base import LICENCES, Example, Rows, majority_share
from plasticity_jax.errors import UserError
from plasticity_jax.runs.storage import AnyPath

FIELDS = tuple(field.name for field in dataclasses.fields(Example))
SPLITS = ("train", "verifier", "test")


def write_jsonl(path: Path, rows: list[dict]) -> str:
    """Writes one JSON object a line, in UTF-8; the file appears whole or not at all.

    Returns:
      sha256 of the file, in hex.
    """
    content = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()
    write_whole(path, content)
    return hashlib.sha256(content).hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that other readers see whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def read_jsonl(path: AnyPath, fields: tuple[str, ...], *, sha256: str) -> list[dict]:
    """Reads what `write_jsonl` wrote, checking the hash, and that each line holds exactly `fields`, all of them strings or lists of strings.

    Raises:
      UserError: the file is missing, altered or malformed.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; run the prepare stage again.")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UserError(f"{path} was altered: sha256 {found[:12]}, expected {sha256[:12]}; delete its folder and run the prepare stage again.")
    rows = []
    # Not splitlines(): real text holds characters such as U+2028 that it takes for a line's end.
    for number, line in enumerate(content.decode().split("\n")[:-1], start=1):
        row = json.loads(line)
        if not isinstance(row, dict) or set(row) != set(fields) or not all(map(_is_text, row.values())):
            raise UserError(f"{path} line {number} must be an object with the texts {', '.join(fields)}; run the prepare stage again.")
        rows.append(row)
    return rows


def _is_text(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(part, str) for part in value))


def read_summary(directory: AnyPath) -> dict:
    """The summary beside the rows; its absence means that the rows were never finished.

    Raises:
      UserError: there is none.
    """
    path = directory / "summary.json"
    if not path.is_file():
        raise UserError(f"{directory} holds no finished rows (no summary.json); run the prepare stage again.")
    return json.loads(path.read_bytes())


def write_summary(directory: Path, summary: dict) -> None:
    write_whole(directory / "summary.json", (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())


def licences_of(sources: set[str]) -> dict[str, str]:
    """Licence note of each package named in `sources` ("package==version", with or without a file after a colon, or "generated")."""
    packages = sorted({source.partition("==")[0] for source in sources})
    return {package: LICENCES[package] for package in packages}


def write_task(directory: Path, task: Rows) -> dict:
    """Writes a task's rows to `directory`.

    Returns:
      The summary, also in `summary.json`: `rows` and `source_splits` (per split), `classes` (different answers in the test rows),
      `majority_share` (accuracy of always giving the most common test answer, or the option in the most common place), `subsets` (rows of each test
      set, where there are several), `counts` (what filters did), `sources` (packages with version), `licences`, `sha256` (per file) and `fingerprint`
      (sha256 over all).
    """
    splits = {split: getattr(task, split) for split in SPLITS}
    (directory / "summary.json").unlink(missing_ok=True)
    hashes = {split: write_jsonl(directory / f"{split}.jsonl", [dataclasses.asdict(row) for row in rows]) for split, rows in splits.items()}
    # BBC rows come from a file each; the rows themselves say which.
    sources = {row.source.partition(":")[0] for rows in splits.values() for row in rows}
    summary = {
        "rows": {split: len(rows) for split, rows in splits.items()},
        "source_splits": {split: dict(sorted(Counter(row.source_split for row in rows).items())) for split, rows in splits.items()},
        "classes": len({row.answer for row in task.test}),
        "majority_share": majority_share([row.options.index(row.response) if row.options else row.answer for row in task.test]),
        "subsets": dict(sorted(Counter(row.subset for row in task.test if row.subset).items())),
        "counts": task.counts,
        "sources": sorted(sources),
        "licences": licences_of(sources),
        "sha256": hashes,
        "fingerprint": hashlib.sha256("".join(hashes.values()).encode()).hexdigest(),
    }
    write_summary(directory, summary)
    return summary


def read_task(directory: AnyPath) -> Rows:
    """Reads what `write_task` wrote.

    Raises:
      UserError: no finished rows there, or rows that were altered.
    """
    summary = read_summary(directory)
    splits = {
        split: [
            Example(**{**row, "options": tuple(row["options"])})
            for row in read_jsonl(directory / f"{split}.jsonl", FIELDS, sha256=summary["sha256"][split])
        ]
        for split in SPLITS
    }
    return Rows(**splits, counts=summary["counts"])
