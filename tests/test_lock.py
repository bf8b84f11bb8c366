"""The lock files name what pyproject.toml asks for, on every Python, from the public index."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def locked() -> list[dict]:
    return tomllib.loads((ROOT / "uv.lock").read_text())["package"]


@pytest.fixture(scope="module")
def pinned() -> list[tuple[Requirement, set[str]]]:
    """Requirement and hashes of every line of requirements-lock.txt."""
    lines = (ROOT / "requirements-lock.txt").read_text().replace("\\\n", " ").splitlines()
    split = [line.split("--hash=") for line in lines if line and not line.startswith("#")]
    return [(Requirement(words[0].strip()), {word.strip() for word in words[1:]}) for words in split]


def asked(requirements) -> set[tuple]:
    """Name, extras and range of requirements; markers are worded in several ways."""
    return {(canonicalize_name(one.name), frozenset(one.extras), one.specifier) for one in map(Requirement, requirements)}


def test_the_lock_is_of_todays_pyproject(project, locked):
    """If this fails: make lock."""
    [own] = [package for package in locked if package["name"] == "plasticity-jax"]
    rows = own["metadata"]["requires-dist"]
    found = asked(f"{row['name']}[{','.join(row.get('extras', ()))}]{row.get('specifier', '')}" for row in rows)
    extras = project["optional-dependencies"]
    assert found == asked([*project["dependencies"], *(line for lines in extras.values() for line in lines)])
    assert set(own["metadata"]["provides-extras"]) == set(extras)


def test_every_file_is_on_the_public_index_and_has_a_hash(locked):
    files = [file for package in locked for file in (*package.get("wheels", ()), *filter(None, [package.get("sdist")]))]
    assert len(files) > len(locked)
    assert {package["source"].get("registry") for package in locked if package["name"] != "plasticity-jax"} == {"https://pypi.org/simple"}
    for file in files:
        assert re.fullmatch(r"https://files\.pythonhosted\.org/packages/[0-9a-f]{2}/[0-9a-f]{2}/[0-9a-f]{60}/[^/]+", file["url"])
        assert re.fullmatch(r"sha256:[0-9a-f]{64}", file["hash"])


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_what_pip_installs_is_whole_on_every_python(project, pinned, locked, python):
    here = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux", "platform_system": "Linux"}
    here |= {"implementation_name": "cpython", "platform_python_implementation": "CPython", "platform_machine": "x86_64"}
    chosen = {}
    for one, hashes in pinned:
        if one.marker is None or one.marker.evaluate(here):
            assert one.name not in chosen, "one version"
            chosen[one.name] = next(iter(one.specifier)).version
            [package] = [package for package in locked if package["name"] == one.name and package["version"] == chosen[one.name]]
            assert hashes == {file["hash"] for file in (*package.get("wheels", ()), *filter(None, [package.get("sdist")]))}
    extras = project["optional-dependencies"]
    for one in map(Requirement, [*project["dependencies"], *extras["data"], *extras["test"]]):
        if one.marker is None or Marker(str(one.marker)).evaluate(here):
            assert one.specifier.contains(chosen[canonicalize_name(one.name)])
