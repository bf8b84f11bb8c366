"""The door through which a config enters: config files, resolved JSON and `--config.a.b=value` overrides become one checked, frozen StudyConfig.

Inside the program nothing checks a config again. What a run has stored is restored unchecked.
"""

import ast
import dataclasses
import functools
import importlib.util
import inspect
import json
import logging
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from plasticity_jax.config.grid import check_members, check_swept
from plasticity_jax.config.packaged import find_config
from plasticity_jax.config.presets import presets
from plasticity_jax.config.schema import (
    RENAMED,
    GridConfig,
    StudyConfig,
    TaskConfig,
    execution_fields,
    explain,
    nearest,
    study_class,
    to_dict,
    unknown_key,
)
from plasticity_jax.errors import UserError, reason

log = logging.getLogger("plasticity_jax")


def base_config() -> Any:
    """The defaults as a locked `ml_collections.ConfigDict`, for `get_config()` to change."""
    from ml_collections import config_dict

    config = config_dict.ConfigDict(to_dict(StudyConfig()))
    config.lock()
    return config


def task(**changes: Any) -> Any:
    """A task's settings for `config.tasks`, as in `config.tasks = {"topic": task(train_rows=4000)}`."""
    from ml_collections import config_dict

    return config_dict.ConfigDict(to_dict(_parse(TaskConfig, changes, "tasks.<name>")))


def preset(name: str) -> Any:
    """A model shape by name for `config.model`, as in `config.model = preset("llama-1b")`."""
    from ml_collections import config_dict

    known = presets()
    if name not in known:
        raise UserError(f"model preset {name!r} is unknown; known: {', '.join(known)}.")
    return config_dict.ConfigDict(to_dict(known[name]))


def load_config(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> StudyConfig:
    """Reads a config, applies overrides, checks everything.

    Args:
      path: a Python file with `get_config()`, which is passed `faithful` if it takes it and the overrides set it; or JSON (the config.json of a run, a
        study.json, the output of `plasticity config`), which executes no code but the modules that its tasks name; or the name of a config that comes
        with the package, such as "default".
      overrides: pairs (dotted key, text of a Python literal or bare string); later ones win, and they win over `hardware` rules.
    Raises:
      UserError: a missing file, an unknown key (the nearest known one is named), a value of another type, or values that do not fit.
    """
    path, given = find_config(str(path)), {key: _literal(text) for key, text in overrides}
    tree = _read_json(path) if path.suffix == ".json" else _read_python(path, faithful=given.get("faithful"))
    if {"grid.weight_decay", "grid.timescales"} <= given.keys():
        raise UserError("grid.weight_decay and grid.timescales are two ways to say the same; set one of them.")
    for key, value in given.items():
        _override(tree, key, value)
        other = {"grid.weight_decay": "timescales", "grid.timescales": "weight_decay"}.get(key)
        if other:
            tree["grid"][other] = None
    _find_beside(tree, path.parent)
    config = parse_config(tree)
    if config.data.tokenizer == "train" and config.model.vocab_size < 300:
        raise UserError(f"model.vocab_size={config.model.vocab_size} is below 300; a byte-level tokenizer needs 256 bytes and special tokens.")
    for name, _ in config.grid.fields:
        if name in given:
            raise UserError(f"--config.{name}={given[name]} has no effect, because grid.fields sweeps {name}; change grid.fields.")
    return replace(config, hardware=tuple(_without(pattern, changes, given) for pattern, changes in config.hardware))


def parse_config(tree: dict[str, Any]) -> StudyConfig:
    """Builds and checks a config from nested dicts, as `to_dict` writes them. Raises UserError."""
    config = _parse(study_class(), tree, "")
    fields = tuple(
        (name, tuple(_swept(config, "grid.fields", name, value, f"[{i}]") for i, value in enumerate(values))) for name, values in config.grid.fields
    )
    if config.grid.models and config.grid.timescales == GridConfig().timescales:  # nobody chose them
        config = replace(config, grid=replace(config.grid, timescales=None))
    for pattern in config.grid.leave_out:
        _check_pattern("grid.leave_out", pattern)
    changes = _typed_rules("grid.changes", config.grid.changes, lambda name, value: _swept(config, "grid.changes", name, value))
    hardware = _typed_rules("hardware", config.hardware, lambda name, value: _executed(config, name, value))
    config = replace(config, grid=replace(config.grid, fields=fields, changes=changes), hardware=hardware)
    config.check()
    check_members(config)
    return config


def check_config(config: StudyConfig) -> None:
    """Checks a config that was built in Python and came through no file. Raises UserError."""
    parse_config(to_dict(config))


def for_device(config: StudyConfig, device_kind: str) -> StudyConfig:
    """Applies the `hardware` rules whose regex matches the device kind (such as "cpu" or "NVIDIA H100 80GB HBM3").

    Raises:
      UserError: the values that the rules set do not fit the others.
    """
    for pattern, changes in config.hardware:
        if re.search(pattern, device_kind, re.IGNORECASE):
            for key, value in changes.items():
                section, name = key.split(".")
                config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
            for section in dict.fromkeys(key.partition(".")[0] for key in changes):
                config.check_section(section)
    return config


def restore_config(tree: dict[str, Any]) -> StudyConfig:
    """A stored config as the run had it, unchecked. Of another version's, unknown fields are left out and missing ones have their defaults."""
    config = _restore(study_class(), tree)
    grid, hints = config.grid, _field_types(config)
    fields = tuple((name, tuple(_restore(hints[name], value) for value in values)) for name, values in grid.fields if name in hints)
    changes = tuple((pattern, {name: _restore(hints[name], value) for name, value in new.items() if name in hints}) for pattern, new in grid.changes)
    return replace(config, grid=replace(grid, fields=fields, changes=changes))


def _restore(hint: Any, value: Any) -> Any:
    """A value of stored JSON as the type that its field has in memory."""
    hint = _plain(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        section: Any = hint
        hints = typing.get_type_hints(section)
        named = {name if name in hints else RENAMED.get(name, name): inner for name, inner in value.items()}
        return section(**{name: _restore(hints[name], inner) for name, inner in named.items() if name in hints})
    if typing.get_origin(hint) is dict and isinstance(value, dict):
        return {key: _restore(typing.get_args(hint)[1], inner) for key, inner in value.items()}
    return to_dict(value)


@functools.lru_cache
def _adapter(hint: Any):
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(dict[str, hint], config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))  # pyright: ignore[reportInvalidTypeForm]


def _parse(hint: Any, value: Any, path: str) -> Any:
    """The value as its field's type: checked for type and bounds, lists as tuples, sections as dataclasses. `path` names it in messages.

    Strict JSON is the one mode of pydantic with our rules: an int is accepted as a float, a bool is not an int, a string is not a number, and dicts and
    lists are accepted as dataclasses and tuples.
    """
    from pydantic import ValidationError

    try:
        return _adapter(hint).validate_json(json.dumps({path: _without_minus_zero(value)}, default=_refuse_object))[path]
    except ValidationError as error:
        raise UserError(_message(hint, path, error.errors(include_url=False)[0])) from None
    except ValueError:
        raise UserError(
            f"{path or 'the config'} holds an integer of more than {sys.get_int_max_str_digits():,} digits; give a smaller one."
        ) from None
    except TypeError as error:  # a key of a dict
        raise UserError(f"{path or 'the config'}: {error}; use strings as keys.") from None


def _without_minus_zero(value: Any) -> Any:
    """0.0 for −0.0, which is the same number and would name another member."""
    if isinstance(value, dict):
        return {key: _without_minus_zero(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_minus_zero(inner) for inner in value]
    return 0.0 if isinstance(value, float) and value == 0 else value


def _refuse_object(value: Any) -> NoReturn:
    raise UserError(f"the config holds {value!r} of type {type(value).__name__}; use numbers, strings, True, False, None, tuples and dicts.")


def _message(hint: Any, path: str, error: Any) -> str:
    """One line for an error of pydantic: the value, the rule, and what the field means."""
    keys = error["loc"][1:]
    name = (path + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)).lstrip(".")
    if error["type"] == "unexpected_keyword_argument":
        siblings = dataclasses.fields(_plain(_field_at(hint, keys[:-1])[0]))
        return str(unknown_key(name, (name.removesuffix(keys[-1]) + field.name for field in siblings)))
    if not error["loc"] or error["type"] == "missing":
        return f"{name} is missing." if error["loc"] else f"the config does not fit into JSON: {error['msg']}."
    field, doc = _field_at(hint, keys)
    rule = re.sub(r"^\w+ should (.*?)(?: after validation.*)?$", r"must \1", error["msg"])
    rule = rule.replace("a valid array", "a tuple, such as (1, 2)").replace("an object", "a dict")
    if error["type"] == "dataclass_type":
        rule = f"must be a section with keys {', '.join(f.name for f in dataclasses.fields(_plain(field)))}"
    near = nearest(str(error["input"]), map(str, typing.get_args(_plain(field)))) if error["type"] == "literal_error" else ""
    value = repr(to_dict(error["input"]))
    return f"{name}={value[:200]} {rule}{near or (f' ({doc}).' if doc else '.')}"


def _field_at(hint: Any, keys: Iterable[Any]) -> tuple[Any, str]:
    """The type of what lies under these keys, and the meaning of the field that it is in."""
    doc = ""
    for key in keys:
        hint = _plain(hint)
        if dataclasses.is_dataclass(hint):
            doc = next((field.metadata.get("doc", "") for field in dataclasses.fields(hint) if field.name == key), doc)
            hint = typing.get_type_hints(hint).get(key)
        elif args := typing.get_args(hint):
            hint = args[1] if typing.get_origin(hint) is dict else args[0] if args[-1] is Ellipsis else args[key]
    return hint, doc


def _plain(hint: Any) -> Any:
    """The type without its bounds, and of `X | None` the X."""
    hint = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return _plain(next(arg for arg in typing.get_args(hint) if arg is not type(None)))
    return hint


def _swept(config: StudyConfig, where: str, name: str, value: Any, index: str = "") -> Any:
    """A value of the grid, checked and typed as its field."""
    hint = _field_type(config, name, f"{where}: config key ")
    check_swept(config, where, name)
    return _parse(hint, value, f"{where}: {name}{index}")


def _executed(config: StudyConfig, name: str, value: Any) -> Any:
    """A value of a hardware rule, checked and typed as its field."""
    hint = _field_type(config, name, "hardware: config key ")
    if name not in execution_fields(config):
        raise UserError(f"hardware: {name} defines the result; a rule sets execution fields only, such as train.grad_accum_steps.")
    return _parse(hint, value, f"hardware: {name}")


def _field_type(config: StudyConfig, name: str, where: str) -> Any:
    hints = _field_types(config)
    if name not in hints:
        raise unknown_key(name, hints, where)
    return hints[name]


def _field_types(config: StudyConfig) -> dict[str, Any]:
    """Dotted field of every section → its type, with its bounds."""
    sections = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {
        f"{name}.{key}": hint
        for name, section in sections.items()
        if dataclasses.is_dataclass(section)
        for key, hint in typing.get_type_hints(type(section), include_extras=True).items()
    }


def _typed_rules(where: str, rules: tuple[tuple[str, dict], ...], typed: Callable[[str, Any], Any]) -> tuple[tuple[str, dict], ...]:
    """(regex, {field: value}) pairs with their values checked and typed."""
    for pattern, _ in rules:
        _check_pattern(where, pattern)
    return tuple((pattern, {name: typed(name, value) for name, value in changes.items()}) for pattern, changes in rules)


def _check_pattern(where: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{where}: {pattern!r} is not a regular expression ({error}); write one such as '^wd1$' or 'H100|A100'.") from None


def _find_beside(tree: dict[str, Any], folder: Path) -> None:
    """The corpus, and tables and modules of tasks, that lie beside the config and not in the current folder get their path."""
    if isinstance(tree.get("data"), dict) and isinstance(tree["data"].get("files"), str):
        tree["data"]["files"] = _beside(tree["data"]["files"], folder)
    tasks = tree["tasks"] if isinstance(tree.get("tasks"), dict) else {}
    for task in (task for task in tasks.values() if isinstance(task, dict)):
        if isinstance(task.get("module"), str):
            task["module"] = _beside(task["module"], folder, "" if task["module"].endswith(".py") else ".py")
        if isinstance(task.get("rows"), str):
            task["rows"] = ", ".join(_beside(place.strip(), folder) for place in task["rows"].split(","))
        if isinstance(task.get("files"), dict) and isinstance(task.get("prompt"), str):
            task["files"] = {key: _beside(place, folder) if isinstance(place, str) else place for key, place in task["files"].items()}


def _beside(place: str, folder: Path, ending: str = "") -> str:
    there = str(folder / place)
    return there if "://" not in place and not os.path.exists(place + ending) and os.path.exists(there + ending) else place


def _without(pattern: str, changes: dict[str, Any], given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A hardware rule without the fields that the command line sets."""
    for key in (key for key in changes if key in given):
        log.info("--config.%s=%s wins over the hardware rule %r, which sets it to %s", key, given[key], pattern, changes[key])
    return pattern, {key: value for key, value in changes.items() if key not in given}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not JSON ({reason(error)}); give the config.json of a run, a study.json, or the output of plasticity config."
        ) from None
    tree = tree.get("config", tree) if isinstance(tree, dict) else tree
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no config; give the config.json of a run, a study.json, or the output of plasticity config.")
    return _complete(tree)


def _read_python(path: Path, *, faithful: Any) -> dict[str, Any]:
    from ml_collections import config_dict

    spec = importlib.util.spec_from_file_location(f"plasticity_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path} is neither a Python file nor JSON; give one such as configs/default.py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"{path} has no get_config(); a config file defines get_config() -> ConfigDict.")
        takes = isinstance(faithful, bool) and "faithful" in inspect.signature(module.get_config).parameters
        made = module.get_config(faithful=faithful) if takes else module.get_config()
        if not isinstance(made, config_dict.ConfigDict):
            raise UserError(f"{path}: get_config() returned {type(made).__name__}; return a ConfigDict, such as that of base_config().")
        return _complete(made.to_dict())
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: {_file_error(error, path)}") from error


def _file_error(error: Exception, path: Path) -> str:
    """What went wrong in a config file and in which line of it, on one line; of an unknown key, as ConfigDict refuses it, the nearest known one."""
    lines = (
        [error.lineno] if isinstance(error, SyntaxError) else [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    )
    where = f"line {lines[-1]}: " if lines and lines[-1] else ""
    if error.args and isinstance(error.args[0], KeyError):  # ConfigDict wraps it in an AttributeError
        error = error.args[0]
    text = " ".join(str(error.args[0] if error.args else error).split())
    key = re.search(r"""^Key "(\w+)" does not exist|^'(\w+)'$""", text) if isinstance(error, KeyError) else None
    if key and (key[1] or key[2] in RENAMED):
        names = {**to_dict(StudyConfig()), **explain(StudyConfig(tasks={"": TaskConfig()}))}
        return where + str(unknown_key(key[1] or key[2], {name.rpartition(".")[2] for name in names}))
    return f"{where}{type(error).__name__}: {text!r}" if isinstance(error, KeyError) else f"{where}{type(error).__name__}: {text}"


def _complete(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with the defaults of the sections and fields that it leaves out."""
    defaults = to_dict(StudyConfig())
    both = {name for name, value in tree.items() if isinstance(value, dict) and isinstance(defaults.get(name), dict)}
    return defaults | tree | {name: defaults[name] | tree[name] for name in both}


def _override(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    node, seen = tree, ""
    for name in (*sections, last):
        if not isinstance(node, dict) or name not in node:
            raise unknown_key(seen + name, (seen + known for known in (node if isinstance(node, dict) else ())))
        parent, node, seen = node, node[name], f"{seen}{name}."
    # A field whose keys are the user's own, such as tasks, is replaced as a whole.
    of_user = typing.get_origin(_plain(_field_at(study_class(), (*sections, last))[0])) is dict
    if isinstance(node, dict) and node and not (of_user and isinstance(value, dict)):
        raise UserError(f"--config.{key}={value}: {key} is a section; set one of {', '.join(sorted(node))}.")
    parent[last] = value


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # the last two of expressions that are nested too deeply
        return text  # a bare string such as bfloat16
