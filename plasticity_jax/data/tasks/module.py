"""Tasks from a Python file of the user's own, such as one beside the config: nothing to install, nothing to write into this package."""

import functools
import importlib.util
import sys
import traceback
from pathlib import Path

from plasticity_jax.data.content import content_hash
from plasticity_jax.data.tasks.base import Task
from plasticity_jax.errors import UserError, reason
from plasticity_jax.plugins import extensions


def module_file(module: str) -> Path:
    """The file that `tasks.<name>.module` names: a path, or the name of a module, which is that of a file without .py."""
    path = Path(module).expanduser()
    return path if path.suffix == ".py" else path.with_name(f"{path.name}.py")


def task_of_module(name: str, module: str) -> Task:
    """The task of that name in a file.

    Raises:
      UserError: there is no such file, it cannot be executed, or it declares no task of that name.
    """
    path = module_file(module)
    content = content_hash(path)
    if content is None:
        raise UserError(
            f"tasks.{name}.module={module}: no such file ({path}); give a Python file, relative to the current folder or to the config's."
        )
    found = _tasks(path, content)
    if name not in found:
        raise UserError(f"tasks.{name}.module={module} declares no Task named {name!r}; it has {', '.join(found) or 'none'}: give it this name.")
    return found[name]


@functools.lru_cache
def _tasks(path: Path, content: str) -> dict[str, Task]:
    """Name → task of a file; `content` is its hash, so that a file that has changed is executed again."""
    spec = importlib.util.spec_from_file_location(f"plasticity_task_{path.stem}_{content[:8]}", path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        raise UserError(f"{path}: {f'line {line}: ' if line else ''}{type(error).__name__}: {reason(error)}") from error
    return {task.name: task for task in extensions(module, Task)}
