"""What changes the rounding of a run, and so its last digits, as its provenance has it: devices, libraries, flags, and how the work was divided."""

import re
from collections.abc import Sequence
from typing import Any

# Whose versions may change what is computed.
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "tokenizers", "sentencepiece", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")
# Execution fields that set a cadence, a place, or a limit: no number depends on them.
_NO_MATTER = re.compile(
    r"data\..*|launch\..*|report\..*|probe\.files|grid\.mode|finetune\.select|evaluate\.grade_workers|train\.(keep_.*|profile_steps)"
    r"|.*\.(log|eval|checkpoint)_every|train\.eval_tokens"
)


def environments_of(provenance: dict[str, Any]) -> list[dict[str, str]]:
    """The environments in which a run was made, one after the other: what it is → which one, flat. One of before there were environments has fewer facts."""
    execution = {f"config {name}": value for name, value in _dict(provenance.get("execution")).items() if not _NO_MATTER.fullmatch(name)}
    recorded = provenance.get("environments")
    old = {name: provenance[name] for name in ("device_kind", "mesh") if name in provenance} | {
        "libraries": _of_libraries(provenance.get("versions"))
    }
    found = [one for one in recorded if isinstance(one, dict)] if isinstance(recorded, list) and recorded else [old]
    commit = {"code": _dict(provenance.get("git")).get("commit")}
    return [_flat(one | execution | commit) for one in found]


def _of_libraries(versions: Any) -> dict[str, Any]:
    return {name: version for name, version in _dict(versions).items() if name in LIBRARIES}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name} ") if isinstance(value, dict) else {} if value is None else {f"{prefix}{name}": str(value)}
    return flat


def differing(provenances: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """What is not the same in all environments of all runs, where it is known → what it is for each run, the values of a run's own joined by "then"."""
    of_runs = [environments_of(provenance) for provenance in provenances]
    names = list(dict.fromkeys(name for of_run in of_runs for one in of_run for name in one))
    found = {}
    for name in names:
        values = [list(dict.fromkeys(one[name] for one in of_run if name in one)) for of_run in of_runs]
        if len({value for of_run in values for value in of_run}) > 1:
            found[name] = [" then ".join(of_run) or "unknown" for of_run in values]
    return found
