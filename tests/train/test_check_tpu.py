"""The real train step, compiled for TPU chips that are not here."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from running import PLASTICITY, TINY, environment, python
from worlds import CONFIG, change

from plasticity_jax.config import MeshConfig, load_config
from plasticity_jax.model.transformer import count_params
from plasticity_jax.parallel.deviceless import target
from plasticity_jax.parallel.mesh import make_mesh
from plasticity_jax.stages import stages
from plasticity_jax.study.check import cases, check_pretraining, check_stages
from plasticity_jax.train.check import check, program_bytes, refused_bytes
from plasticity_jax.train.memory import training_bytes
from plasticity_jax.train.pretrain import step_settings

pytestmark = pytest.mark.tpu_compile


def test_a_small_step_fits_on_four_chips_and_a_huge_batch_does_not():
    place = target("v5e:2x2")
    assert len(place.devices) == 4
    config = change(CONFIG, "train", batch_size=8, seq_len=128, compute_dtype="bfloat16")
    config = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=4))
    small = check(config, place)
    assert small.fits and small.collectives and small.params >= 4 * count_params(config.model) // 4
    large = check(change(config, "train", batch_size=131072, seq_len=2048), place)
    assert not large.fits and large.total > large.limit and large.largest


def test_every_stage_compiles_for_four_chips():
    place = target("v5e:2x2")
    own = {"reward.scorer": "verifier", "reward.max_length": "128", "train.compute_dtype": "bfloat16", "mesh.data": "1", "mesh.fsdp": "4"}
    verified = [(f"tasks.{task}.verifier_rows", "20") for task in load_config(TINY, []).tasks]
    rows = check_stages(cases(load_config(TINY, [*own.items(), *verified]), place), place, tuple(stages()))
    assert {row.stage for row in rows} == {"finetune", "evaluate", "verifier", "reward", "probe", "spectra", "gap"}
    assert all(row.found is not None and row.fits for row in rows)
    assert all(row.found.collectives for row in rows if row.found and row.stage != "evaluate")  # whose matrices are small enough to be whole


def test_members_on_their_own_chips_take_what_one_model_takes():
    """Two members on four chips each: a chip holds the shard of one model, as on four chips alone."""
    own = [("train.compute_dtype", "bfloat16"), ("grid.timescales", "(None, 0.2)"), ("mesh.data", "1"), ("mesh.fsdp", "4")]
    eight, four = target("v5e:2x4"), target("v5e:2x2")
    [together] = cases(load_config(TINY, [*own, ("grid.mode", "vmapped"), ("mesh.member", "2")]), eight)
    [alone] = cases(load_config(TINY, [*own, ("grid.mode", "sequential")]), four)
    assert (together.groups["pretrain"], together.groups["finetune"]) == (2, 2)
    (found,), (one,) = check_pretraining([together], eight), check_pretraining([alone], four)
    assert found.fits and (found.members, found.params) == (2, one.params) and found.total == pytest.approx(one.total, rel=0.2)
    (found,), (one,) = check_stages([together], eight, ("finetune",)), check_stages([alone], four, ("finetune",))
    assert found.members == 2 and found.found.total == pytest.approx(one.found.total, rel=0.2)


def test_the_memory_of_a_program_is_what_the_compiler_refuses_by():
    """A loop stacks its carry, which is then read in two ways: two stacks, and nothing else, are there at once."""
    (device,) = target("v5e:1x1").devices
    here = jax.sharding.SingleDeviceSharding(device)
    x, kernel = (jax.ShapeDtypeStruct((rows, 2048), jnp.bfloat16, sharding=here) for rows in (2**14, 2048))

    def compiled(length: int):
        def stacked(x, kernel):
            def layer(x, _):
                x = jnp.tanh(x @ kernel)
                return x, x

            stack = jax.lax.scan(layer, x, None, length=length)[1]
            return jnp.sum(stack[::-1].cumsum(0) * stack)

        return jax.jit(stacked).lower(x, kernel).compile()

    stack = 2**26  # bytes of one element
    assert program_bytes(compiled(112).memory_analysis(), device.platform) == pytest.approx(2 * 112 * stack, rel=0.02)
    with pytest.raises(jax.errors.JaxRuntimeError) as refusal:
        compiled(128)
    assert refused_bytes(str(refusal.value)) == pytest.approx(2 * 128 * stack, rel=0.02)


def test_two_checks_at_once_do_not_wait_for_each_other_or_fail():
    """libtpu's lock file refuses a second process while a first one has it loaded."""
    code = "import sys; from plasticity_jax.parallel.deviceless import target; print(len(target('v5e:2x2').devices), flush=True); sys.stdin.read()"
    first = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
    assert first.stdin is not None and first.stdout is not None
    try:
        assert first.stdout.readline() == "4\n"  # libtpu is loaded there, and stays so
        assert python(code.replace("sys.stdin.read()", "")) == "4\n"
        assert first.poll() is None
    finally:
        first.stdin.close()
        first.wait()


@pytest.mark.parametrize("remat", ["dots", pytest.param("full", marks=pytest.mark.nightly)])
def test_the_estimate_of_a_training_step_is_what_the_compiler_needs(remat):
    place = target("v5e:2x2")
    model = {"vocab_size": 8192, "d_model": 512, "n_layers": 12, "n_heads": 8, "n_kv_heads": 4, "d_ff": 1408}
    train = {"batch_size": 32, "seq_len": 2048, "compute_dtype": "bfloat16", "scan_layers": True, "remat": remat}
    config = change(change(CONFIG, "model", **model), "train", **train)
    config = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=4))
    mesh = make_mesh(config.mesh, place.devices)
    assert training_bytes(step_settings(config, mesh), mesh, 32, 2048) == pytest.approx(check(config, place).total, rel=0.25)


@pytest.mark.parametrize("platforms", ["cpu", ""])
def test_who_has_libtpu_and_no_tpu_is_not_shown_its_errors(tmp_path, platforms):
    command = [*PLASTICITY, "study", "--config", str(TINY), "--workdir", str(tmp_path / "work"), "--dry-run"]
    own = environment(JAX_PLATFORMS=platforms)
    own.pop("TPU_LIBRARY_PATH", None)  # jax sets it in this process, once another test has compiled for a TPU
    done = subprocess.run(command, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line[9:] for line in done.stderr.splitlines()] == ["train.compute_dtype auto → float32 on this platform"]
