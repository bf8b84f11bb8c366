"""Names of the packages are imported on first use."""

import importlib
import subprocess
import sys

import pytest

PACKAGES = [f"plasticity_jax{name}" for name in ("", ".analysis", ".evaluate", ".model", ".parallel", ".train")]


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_exists_and_others_are_refused(name):
    package = importlib.import_module(name)
    for public in package.__all__:
        assert getattr(package, public) is not None
    assert set(package.__all__) - {"presets"} <= set(dir(package))
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nothing'"):
        package.nothing


def test_import_of_the_packages_brings_neither_jax_nor_numpy():
    program = f"import sys, {', '.join(PACKAGES)}; plasticity_jax.count_params(plasticity_jax.presets()['llama-1b']); print({{'jax', 'numpy'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60).stdout == "set()\n"


def test_help_needs_no_library_that_is_slow_to_import():
    program = (
        "import sys, plasticity_jax.cli; plasticity_jax.cli.parser().format_help(); print({'jax', 'numpy', 'fsspec', 'upath'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60).stdout == "set()\n"
