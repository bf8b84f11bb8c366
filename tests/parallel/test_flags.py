import os
import subprocess
import sys
import textwrap

import pytest

from plasticity_jax.parallel.flags import FLAGS, guess_platform, set_flags

TINY_CACHE = """
    import logging, sys
    logging.basicConfig(level="WARNING", format="%(message)s")
    from dataclasses import replace
    from plasticity_jax.config import LaunchConfig, StudyConfig
    from plasticity_jax.parallel import flags

    flags._MIN_COMPILE_SECONDS = 0.0
    flags.prepare_backend(StudyConfig(launch=LaunchConfig(compile_cache=sys.argv[1])))
    import jax, jax.numpy as jnp

    hits = []
    jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
    x = jax.random.normal(jax.random.key(0), (64, 64))
    out = jax.jit(lambda x: jnp.tanh(x @ x).sum(0))(x)
    print(len(hits), out.tobytes().hex())
"""


def in_a_process(code, *arguments, **environment):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def test_jax_accepts_every_gpu_flag_and_aborts_on_an_unknown_one():
    code = "import jax; jax.devices(); print('ran')"
    flags = " ".join(flag for flag, _ in FLAGS["gpu"][1])
    assert in_a_process(code, XLA_FLAGS=flags).stdout == "ran\n"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags + " --xla_gpu_no_such_flag=true"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=120).returncode != 0


def test_what_the_user_set_stays():
    environment = {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=d"}
    added = set_flags("gpu", environment)
    assert environment["XLA_FLAGS"].split()[:2] == ["--xla_gpu_enable_latency_hiding_scheduler=false", "--xla_dump_to=d"]
    assert environment["XLA_FLAGS"].count("latency_hiding") == 1 and added and not set_flags("gpu", environment)
    assert set_flags("cpu", {}) == []


@pytest.mark.parametrize("named, platform", [("cpu", "cpu"), ("cuda,cpu", "gpu"), ("tpu", "tpu")])
def test_the_platform_named_in_the_environment_counts(named, platform):
    assert guess_platform({"JAX_PLATFORMS": named}) == platform


def test_a_second_process_takes_the_stored_programs_and_computes_the_same_bits(tmp_path):
    cold, warm = (in_a_process(TINY_CACHE, tmp_path).stdout.split() for _ in range(2))
    assert int(cold[0]) == 0 < int(warm[0]) and cold[1] == warm[1]
    [machine] = tmp_path.iterdir()
    assert machine.name.startswith("cpu-jaxlib")


def test_a_damaged_program_is_compiled_again_with_one_line_each(tmp_path):
    cold = in_a_process(TINY_CACHE, tmp_path)
    [machine] = tmp_path.iterdir()
    entries = [path for path in machine.iterdir() if path.name.endswith("-cache")]
    for number, path in enumerate(entries):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if number % 2 else b"\0" * len(content))
    damaged = in_a_process(TINY_CACHE, tmp_path)
    assert damaged.stdout.split()[1] == cold.stdout.split()[1]
    lines = damaged.stderr.splitlines()
    assert lines and all(line.startswith("launch.compile_cache: a stored program could not be used") for line in lines), damaged.stderr


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = in_a_process(TINY_CACHE, tmp_path / "file")
    assert done.stderr.count("\n") == 1 and "going on without stored programs" in done.stderr and done.stdout.startswith("0 ")
