"""Tasks on disk: `train.jsonl`, `validation.jsonl`, `verifier.jsonl` and `test.jsonl`, then `summary.json`, which marks them complete."""

import dataclasses
import hashlib
from collections import Counter
from pathlib import Path

from plasticity_jax.data.tasks.base import LICENCES, Example, Rows, majority_share
from plasticity_jax.errors import UserError
from plasticity_jax.runs import jsonfiles
from plasticity_jax.runs.storage import AnyPath

FIELDS = tuple(field.name for field in dataclasses.fields(Example))
SPLITS = ("train", "validation", "verifier", "test")


def write_jsonl(path: Path, rows: list[dict]) -> str:
    """Writes one JSON object per line, atomically, and returns the sha256 (hex) of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    jsonfiles.write_jsonl(path, rows)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_jsonl(path: AnyPath, fields: tuple[str, ...], *, sha256: str) -> list[dict]:
    """Reads what `write_jsonl` wrote. Checks the hash, and that each line holds exactly `fields`, all strings or lists of strings.

    Raises:
      UserError: the file is missing, altered or malformed.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; run the prepare stage again.")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise UserError(f"{path} was altered: sha256 {found[:12]}, expected {sha256[:12]}; delete its folder and run the prepare stage again.")
    rows = jsonfiles.read_jsonl(path)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or set(row) != set(fields) or not all(map(_is_text, row.values())):
            raise UserError(f"{path} line {number} must be an object with the texts {', '.join(fields)}; run the prepare stage again.")
    return rows


def _is_text(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(part, str) for part in value))


def read_summary(directory: AnyPath) -> dict:
    """Reads the summary beside the rows. Raises UserError if there is none: the rows were never finished."""
    path = directory / "summary.json"
    if not path.is_file():
        raise UserError(f"{directory} holds no finished rows (no summary.json); run the prepare stage again.")
    return jsonfiles.read_json(path)


def licences_of(sources: set[str]) -> dict[str, str]:
    """The license note of each package in `sources`, which are "generated", "package==version" or "package==version:file"."""
    packages = sorted({source.partition("==")[0] for source in sources})
    return {package: LICENCES[package] for package in packages}


def write_task(directory: Path, task: Rows) -> dict:
    """Writes a task's rows to `directory`.

    Returns:
      The summary, also in `summary.json`: `rows` and `source_splits` (per split), `classes` (distinct answers in the test rows),
      `majority_share` (accuracy of always giving the most common test answer, or the option in the most common position), `subsets` (rows per test
      set, if there are several), `counts` (rows per filter), `sources` (packages with versions), `licences`, `sha256` (per file) and `fingerprint`
      (sha256 over all files).
    """
    splits = {split: getattr(task, split) for split in SPLITS}
    (directory / "summary.json").unlink(missing_ok=True)
    hashes = {split: write_jsonl(directory / f"{split}.jsonl", [dataclasses.asdict(row) for row in rows]) for split, rows in splits.items()}
    # Without file names: every BBC row comes from a file of its own.
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
    jsonfiles.write_json(directory / "summary.json", summary)
    return summary


def read_task(directory: AnyPath) -> Rows:
    """Reads what `write_task` wrote.

    Raises:
      UserError: there are no finished rows, or they were altered.
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
