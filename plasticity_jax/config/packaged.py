"""The configs that come with the package, by name."""

import re
from pathlib import Path

from plasticity_jax.config.schema import nearest
from plasticity_jax.errors import UserError
from plasticity_jax.text import local_path

FOLDER = Path(__file__).parents[1] / "configs"  # in a clone a link to the folder at its top


def find_config(given: str) -> Path:
    """The config file that is meant: a path, or a name such as "default" of a config that comes with the package, if no file has it.

    Raises:
      UserError: there is neither; the nearest name is named.
    """
    path = local_path(given)
    if path.is_file():
        return path
    names = sorted(file.stem for file in FOLDER.glob("*.py"))
    if given in names:
        return FOLDER / f"{given}.py"
    if re.fullmatch(r"[\w-]+", given):
        near = nearest(given, names) or f": {', '.join(names)}."
        raise UserError(f"--config={given} is no file, and none of the configs that come with the package{near}")
    raise UserError(
        f"--config={given}: no such file; give a Python config file, the name of a packaged config such as default, or a run's config.json."
    )
