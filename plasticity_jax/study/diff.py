"""What differs between two runs: their configs, what they were made of, where they were made, and the first step at which their logs part."""

from typing import Any

from plasticity_jax.config import to_dict
from plasticity_jax.errors import UserError
from plasticity_jax.runs.directory import CONFIG, PROVENANCE, RESULTS, RunDirectory
from plasticity_jax.runs.environment import differing
from plasticity_jax.runs.jsonfiles import read_json
from plasticity_jax.runs.logs import METRICS, read_whole_rows
from plasticity_jax.runs.storage import AnyPath

_TIMES = ("seconds", "per_second", "mfu", "checkpoint")  # parts of names of what no two runs share
_INPUTS = ("data_fingerprint", "step_0_sha256", "reward_model", "source")
_SHOWN = 100  # characters of a value

Pairs = list[tuple[str, Any, Any]]  # (name, value of the first run, value of the second)


def run_differences(first: AnyPath, second: AnyPath) -> dict[str, Pairs]:
    """What differs between two runs, finished or not, by kind: config, inputs, environment, metrics (of the first step that differs), results.

    Raises:
      UserError: one of them is no run.
    """
    runs = [_opened(path) for path in (first, second)]
    provenances = [_object(run.path / PROVENANCE) for run in runs]
    about, configs = [run.run() for run in runs], [to_dict(run.config()) for run in runs]
    inputs = [one.parents | {name: provenance.get(name) for name in _INPUTS} for one, provenance in zip(about, provenances, strict=True)]
    of_runs = [{"stage": one.stage, "version": one.version, "fields": one.fields} for one in about]
    return {
        "config": _pairs({"run": of_runs[0], **configs[0]}, {"run": of_runs[1], **configs[1]}),
        "inputs": _pairs(inputs[0], inputs[1]),
        "environment": [(name, a, b) for name, (a, b) in differing(provenances).items()],
        "metrics": _first_step(*(read_whole_rows(run.path / METRICS) for run in runs)),
        "results": _pairs(*(_timeless(_object(run.path / RESULTS)) for run in runs)),
    }


def diff_lines(first: AnyPath, second: AnyPath, found: dict[str, Pairs]) -> list[str]:
    """The differences for a terminal."""
    lines = [f"a: {first}", f"b: {second}"]
    for kind, pairs in found.items():
        lines.append(f"{kind}: {'the same' if not pairs else ''}".rstrip())
        lines += [f"  {name}: {_text(a)} | {_text(b)}" for name, a, b in pairs]
    return lines


def _opened(path: AnyPath) -> RunDirectory:
    if not (path / CONFIG).is_file():
        raise UserError(f"{path} holds no {CONFIG}, so it is not a run directory; give one that plasticity status lists.")
    return RunDirectory(path)


def _object(path: AnyPath) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _timeless(tree: Any) -> Any:
    return {name: _timeless(value) for name, value in tree.items() if not any(word in name for word in _TIMES)} if isinstance(tree, dict) else tree


def _pairs(first: dict[str, Any], second: dict[str, Any], prefix: str = "") -> Pairs:
    found: Pairs = []
    for name in dict.fromkeys([*first, *second]):
        a, b = first.get(name), second.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _pairs(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append((f"{prefix}{name}", a, b))
    return found


def _first_step(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> Pairs:
    """The numbers of the first step in both logs that are not the same; that one log ends sooner, if all that both have are."""
    of_first, of_second = ({row["step"]: _timeless(row) for row in rows if isinstance(row.get("step"), int)} for rows in (first, second))
    for step in sorted(of_first.keys() & of_second.keys()):
        if pairs := _pairs(of_first[step], of_second[step], f"step {step} "):
            return pairs
    a, b = (max(steps, default=0) for steps in (of_first, of_second))
    return [("last step", a, b)] if a != b else []


def _text(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
