"""In bf16, every tensor's gradient is as exact on every mesh as on one device."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from running import environment

SCRIPT = Path(__file__).parent / "gradients_on_meshes.py"

pytestmark = pytest.mark.slow

MARGIN = 1.5  # of one device's error; a sum of many terms in bf16, such as the embedding's, has 25 to 50 times as much


@pytest.fixture(scope="module")
def errors():
    done = subprocess.run([sys.executable, SCRIPT], env=environment(devices=8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("network", "cases"), [("llama", 9), ("olmo2", 3)])
def test_bf16_gradients_are_as_exact_on_every_mesh_as_on_one_device(errors, network, cases):
    expected = errors[network].pop("one")
    assert len(errors[network]) == cases and all(0 < error < 0.02 for error in expected.values())
    worse = {
        (case, path): (error, expected[path])
        for case, of_case in errors[network].items()
        for path, error in of_case.items()
        if error > MARGIN * expected[path]
    }
    assert not worse
