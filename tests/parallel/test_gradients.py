"""In bf16, every tensor's gradient is as exact on every mesh as on one device."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from running import environment

SCRIPT = Path(__file__).parent / "gradients_on_meshes.py"
sys.path.insert(0, str(SCRIPT.parent))
from gradients_on_meshes import ALWAYS, EVERY  # noqa: E402

pytestmark = pytest.mark.slow

MARGIN = 1.5  # of one device's error; a sum of many terms in bf16, such as the embedding's, has 25 to 50 times as much


@pytest.mark.parametrize("arguments", [(), pytest.param(("every",), marks=pytest.mark.nightly)], ids=["some", "every"])
def test_bf16_gradients_are_as_exact_on_every_mesh_as_on_one_device(arguments):
    done = subprocess.run([sys.executable, SCRIPT, *arguments], env=environment(devices=8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert {network: tuple(of_network) for network, of_network in errors.items()} == (EVERY if arguments else ALWAYS)
    expected = {network: of_network.pop("one") for network, of_network in errors.items()}
    assert all(0 < error < 0.02 for of_network in expected.values() for error in of_network.values())
    worse = {
        (network, case, path): (error, expected[network][path])
        for network, of_network in errors.items()
        for case, of_case in of_network.items()
        for path, error in of_case.items()
        if error > MARGIN * expected[network][path]
    }
    assert not worse
