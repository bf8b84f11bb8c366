"""From a config file and `--config.a.b=value` overrides to a checked StudyConfig.

A config file is a short Python file with `get_config()`, which returns the ConfigDict of `base_config()` with some values changed.
The fields stand in `config_fields.py`, the checks in `config_checks.py`.
"""

import ast
import importlib.util
import inspect
import re
import typing
from pathlib import Path
from typing import Any

from plasticity_jax.config.checks import build, check_config, check_trained_vocabulary, typed_grid, unknown_key
from plasticity_jax.config.schema import (
    DataConfig,
    DecayConfig,
    EvaluateConfig,
    FinetuneConfig,
    GapConfig,
    GridConfig,
    LaunchConfig,
    Member,
    MeshConfig,
    ModelConfig,
    ProbeConfig,
    ReportConfig,
    RewardConfig,
    RopeScaling,
    SpectraConfig,
    StudyConfig,
    TaskConfig,
    TrainConfig,
    VerifierConfig,
    ZeroShotConfig,
    execution_fields,
    grid_members,
    member_config,
    name_text,
    result_fields,
    to_dict,
)
from plasticity_jax.errors import UserError

__all__ = [
    "DataConfig",
    "DecayConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "GapConfig",
    "GridConfig",
    "Member",
    "LaunchConfig",
    "MeshConfig",
    "ModelConfig",
    "ProbeConfig",
    "ReportConfig",
    "RewardConfig",
    "RopeScaling",
    "SpectraConfig",
    "StudyConfig",
    "TaskConfig",
    "TrainConfig",
    "VerifierConfig",
    "ZeroShotConfig",
    "base_config",
    "check_config",
    "execution_fields",
    "for_device",
    "from_dict",
    "grid_members",
    "load_config",
    "member_config",
    "preset",
    "result_fields",
    "task",
    "to_dict",
]


def base_config():
    """The defaults above as a locked `ml_collections.ConfigDict`, for `get_config()` to change."""
    from ml_collections import config_dict

    config = config_dict.ConfigDict(to_dict(StudyConfig()))
    config.lock()
    return config


def task(**changes):
    """A task's settings for `config.tasks`, as in `config.tasks = {"topic": task(train_rows=4000)}`."""
    from ml_collections import config_dict

    return config_dict.ConfigDict(to_dict(build(TaskConfig, changes, "tasks.<name>")))


def preset(name: str):
    """A model shape by name for `config.model`, as in `config.model = preset("llama-1b")`."""
    from ml_collections import config_dict

    from plasticity_jax.config.presets import presets

    known = presets()
    if name not in known:
        raise UserError(f"model preset {name!r} is unknown; known: {', '.join(known)}.")
    return config_dict.ConfigDict(to_dict(known[name]))


def load_config(path: str | Path, overrides: typing.Sequence[tuple[str, str]] = ()) -> StudyConfig:
    """Reads a config file, applies overrides, checks everything.

    Args:
      path: a Python file with `get_config()`; one that takes `faithful` is given it, where the overrides set it.
      overrides: pairs (dotted key, text of a Python literal or bare string), later ones win.
    Raises:
      UserError: a missing file, an unknown key (the nearest known one is named), a value of another type, or values that do not fit.
    """
    named = dict(overrides)
    tree = _read_file(Path(path), faithful=_literal(named["faithful"]) if "faithful" in named else None)
    if overrides:
        if {"grid.weight_decay", "grid.timescales"} <= named.keys():
            raise UserError("grid.weight_decay and grid.timescales are two ways to say the same; set one of them.")
        for key, text in overrides:
            _override(tree, key, text)
            other = {"grid.weight_decay": "timescales", "grid.timescales": "weight_decay"}.get(key)
            if other:
                tree["grid"][other] = None
    config = from_dict(tree)
    check_trained_vocabulary(config)
    for name, _ in config.grid.fields:
        if name in named:
            raise UserError(f"--config.{name}={named[name]} has no effect, because grid.fields sweeps {name}; change grid.fields.")
    return config


def from_dict(tree: dict[str, Any]) -> StudyConfig:
    """Builds and checks a config from nested dicts, as `to_dict` wrote them. Raises UserError."""
    config = typed_grid(build(StudyConfig, tree, ""))
    check_config(config)
    return config


def restore_config(tree):
    return from_dict(tree)


def for_device(config: StudyConfig, device_kind: str) -> StudyConfig:
    """Applies the `hardware` rules whose regex matches the device kind (such as "cpu" or "NVIDIA H100 80GB HBM3")."""
    tree = to_dict(config)
    for pattern, changes in config.hardware:
        if re.search(pattern, device_kind, re.IGNORECASE):
            for key, value in changes.items():
                section, name = key.split(".")
                tree[section][name] = value
    return from_dict(tree)


def _read_file(path: Path, *, faithful: Any) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"--config={path}: no such file; give a Python config file such as configs/default.py.")
    spec = importlib.util.spec_from_file_location(f"plasticity_config_{path.stem}", path)
    if spec is None:
        raise UserError(f"--config={path} is not a Python file; give one such as configs/default.py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"{path} has no get_config(); a config file defines get_config() -> ConfigDict.")
        takes = isinstance(faithful, bool) and "faithful" in inspect.signature(module.get_config).parameters
        return (module.get_config(faithful=faithful) if takes else module.get_config()).to_dict()
    except UserError:
        raise
    except (AttributeError, KeyError) as error:  # a locked ConfigDict refuses unknown keys, and its first line names the nearest
        raise UserError(f"{path}: {_one_line(error)}") from error
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    text = str(error.args[0]) if error.args else str(error)
    return " ".join(text.split())


def _override(tree: dict[str, Any], key: str, text: str) -> None:
    *parents, last = key.split(".")
    node, seen = tree, ""
    for name in parents:
        if not isinstance(node, dict) or name not in node:
            raise unknown_key(seen, name, node)
        node, seen = node[name], f"{seen}{name}."
    if not isinstance(node, dict) or last not in node:
        raise unknown_key(seen, last, node)
    if isinstance(node[last], dict) and node[last]:
        raise UserError(f"--config.{key}={text}: {key} is a section; set one of {', '.join(sorted(node[last]))}.")
    node[last] = _literal(text)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # a bare string such as bfloat16
