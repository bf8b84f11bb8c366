import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plasticity_jax.parallel.flags import PLATFORMS, Flag, with_flags

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.py")


def test_every_flag_says_why():
    assert all(flag.reason and flag.name.startswith("xla_") for here in PLATFORMS for flag in here.flags)


def test_the_compiler_knows_the_gpu_flags():
    # Its parser is one for all platforms and ends the process at an unknown flag; that of the TPU is in libtpu.
    [gpu] = [here for here in PLATFORMS if "gpu" in here.names]
    code = [sys.executable, "-c", "import jax; jax.devices()"]

    def status(flags):
        return subprocess.run(code, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True).returncode

    assert status(with_flags("", gpu.flags)) == 0
    assert status(with_flags("", (*gpu.flags, Flag("xla_gpu_no_such_flag", "true", "")))) != 0


def test_what_the_user_set_stays():
    flags = (Flag("xla_a", "true", "why"), Flag("xla_b", "2", "why"))
    assert with_flags("--xla_b=1 --xla_c=3", flags) == "--xla_b=1 --xla_c=3 --xla_a=true"
    assert with_flags("", flags) == "--xla_a=true --xla_b=2"


def pretrain(workdir, cache, *more):
    """Standard error of a short pretraining in a process of its own."""
    command = [sys.executable, "-m", "plasticity_jax", "pretrain", "--config", TINY, "--member", "wd0", "--workdir", str(workdir)]
    command += [
        "--config.train.compute_dtype=float32",
        "--config.train.steps=6",
        "--config.data.max_documents=100",
        f"--config.launch.compile_cache={cache}",
    ]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # a command that ran in this process has set it, and what is set stays
    result = subprocess.run([*command, *more], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr


def outcome(workdir):

    [folder] = (workdir / "tiny" / "pretrain").iterdir()
    return json.loads((folder / "results.json").read_text())["held_out"], json.loads((folder / "results.json").read_text())["norms"]


@pytest.mark.slow
def test_a_warm_cache_gives_the_same_bits_and_a_damaged_one_is_compiled_anew(tmp_path):
    cache = tmp_path / "cache"
    pretrain(tmp_path / "cold", cache)
    [folder] = cache.iterdir()
    entries = {path: path.read_bytes() for path in folder.glob("*-cache")}
    assert entries
    pretrain(tmp_path / "warm", cache)
    assert {path: path.read_bytes() for path in folder.glob("*-cache")} == entries  # nothing was compiled
    assert outcome(tmp_path / "warm") == outcome(tmp_path / "cold")
    for path in entries:
        path.write_bytes(b"damaged")
    said = pretrain(tmp_path / "damaged", cache)
    assert "cannot be used and is compiled anew" in said
    assert "Traceback" not in said
    assert outcome(tmp_path / "damaged") == outcome(tmp_path / "cold")


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_left_out(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written to (Not a directory): every start compiles anew" in pretrain(tmp_path / "w", tmp_path / "file" / "cache")
