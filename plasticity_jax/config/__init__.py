"""The config of a study: fields (`schema.py`), loading (`load.py`), the grid (`grid.py`), model shapes (`presets.py`) and the paper's recipes.

A config file is a short Python file with `get_config()`, which returns the ConfigDict of `base_config()` with some values changed.
"""

# ruff: noqa: F401
from plasticity_jax.config.grid import Member, grid_members, grid_seeds, member_config, name_text
from plasticity_jax.config.load import base_config, check_config, for_device, load_config, parse_config, preset, restore_config, task
from plasticity_jax.config.schema import (
    DataConfig,
    DecayConfig,
    EvaluateConfig,
    FinetuneConfig,
    GridConfig,
    LaunchConfig,
    MeshConfig,
    ModelConfig,
    ReportConfig,
    RopeScaling,
    StudyConfig,
    TaskConfig,
    TrainConfig,
    execution,
    execution_fields,
    explain,
    extra_sections,
    result,
    result_fields,
    to_dict,
)


def __getattr__(name: str):
    """The classes of the extra sections, such as `GapConfig`."""
    for section in extra_sections().values() if name.endswith("Config") else ():
        if section.__name__ == name:
            return section
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
