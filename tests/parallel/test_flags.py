import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings

import pytest
from running import PLASTICITY, TINY, environment, plasticity

from plasticity_jax.parallel import flags
from plasticity_jax.parallel.flags import PLATFORMS, Flag, leave_out_absent_tpu, prepare_backend, with_flags


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


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A workdir with the corpus and the step-0 parameters."""
    folder = tmp_path_factory.mktemp("prepared") / "work"
    ended = plasticity("study", *CONFIG, "--stages", "prepare,init", "--workdir", folder)
    assert ended.returncode == 0, ended.stderr
    return folder


CONFIG = ["--config", TINY, "--config.train.compute_dtype=float32", "--config.train.steps=4", "--config.data.max_documents=100"]
CONFIG += ["--config.model.n_layers=1", "--config.train.held_out_tokens=256", "--config.train.eval_tokens=64"]


def pretrain(prepared, workdir, cache):
    """Standard error of a short pretraining in a process of its own, with a compile cache of its own."""
    shutil.copytree(prepared, workdir)
    own = environment(JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    del own["JAX_COMPILATION_CACHE_DIR"]  # that of the tests
    command = [*PLASTICITY, "pretrain", *map(str, CONFIG), "--member", "wd0", "--workdir", str(workdir), f"--config.launch.compile_cache={cache}"]
    result = subprocess.run(command, env=own, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr


def outcome(workdir):
    [folder] = (workdir / "tiny" / "pretrain").iterdir()
    results = json.loads((folder / "results.json").read_text())
    return results["held_out"], results["norms"]


@pytest.mark.slow
def test_a_warm_cache_gives_the_same_bits_and_a_damaged_one_is_compiled_anew(prepared, tmp_path):
    cache = tmp_path / "cache"
    pretrain(prepared, tmp_path / "cold", cache)
    [folder] = cache.iterdir()
    entries = {path: path.read_bytes() for path in folder.glob("*-cache")}
    assert entries
    pretrain(prepared, tmp_path / "warm", cache)
    assert {path: path.read_bytes() for path in folder.glob("*-cache")} == entries  # nothing was compiled
    assert outcome(tmp_path / "warm") == outcome(tmp_path / "cold")
    for path in entries:
        path.write_bytes(b"damaged")
    said = pretrain(prepared, tmp_path / "damaged", cache)
    assert "cannot be used and is compiled again" in said
    assert "Traceback" not in said
    assert outcome(tmp_path / "damaged") == outcome(tmp_path / "cold")


def test_a_cache_that_cannot_be_written_is_left_out(monkeypatch, caplog, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    (tmp_path / "file").write_text("")
    prepare_backend(str(tmp_path / "file" / "cache"))
    assert "cannot be written to (Not a directory): every start compiles again" in caplog.text
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


@pytest.mark.parametrize(
    "installed, files, given, expected",
    [
        (["libtpu"], [], {}, "cpu"),
        ([], [], {}, None),
        (["libtpu", "jax_plugins"], [], {}, None),
        (["libtpu"], ["dev/accel0"], {}, None),
        (["libtpu"], ["dev/vfio/3"], {}, None),
        (["libtpu"], ["dev/vfio/vfio"], {}, "cpu"),  # which is there without any device
        (["libtpu"], [], {"JAX_PLATFORMS": "tpu,cpu"}, "tpu,cpu"),
        (["libtpu"], [], {"JAX_FORCE_TPU_INIT": "1"}, None),
    ],
)
def test_jax_looks_for_a_tpu_only_where_one_may_be(monkeypatch, tmp_path, installed, files, given, expected):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in installed or None if name in ("libtpu", "jax_plugins") else find(name))
    monkeypatch.setattr(flags, "ROOT", tmp_path)
    for name in ("JAX_PLATFORMS", "JAX_FORCE_TPU_INIT", "TPU_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    leave_out_absent_tpu()
    assert os.environ.get("JAX_PLATFORMS") == expected


def test_a_device_of_the_tpus_maker_counts_as_one(monkeypatch, tmp_path):
    monkeypatch.setattr(flags, "ROOT", tmp_path)
    for name in ("JAX_FORCE_TPU_INIT", "TPU_LIBRARY_PATH"):  # jax sets the second where libtpu is installed
        monkeypatch.delenv(name, raising=False)
    for name, vendor in (("0000:00:01.0", "0x8086"), ("0000:00:04.0", "0x1ae0")):
        folder = tmp_path / "sys" / "bus" / "pci" / "devices" / name
        folder.mkdir(parents=True)
        assert not flags._tpu_is_here()
        (folder / "vendor").write_text(vendor + "\n")
    assert flags._tpu_is_here()


def test_a_thousand_commands_in_one_process_wrap_warnings_once(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda *arguments: shown.append(arguments))
    for _ in range(1000):
        prepare_backend(None)
    warnings.showwarning(UserWarning("another"), UserWarning, "file.py", 1)
    assert len(shown) == 1
