"""`plasticity check`: what it counts, against independent counts; what it refuses."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest
from worlds import CONFIG, change

from plasticity_jax.config import GridConfig, ModelConfig
from plasticity_jax.errors import UserError
from plasticity_jax.model import cpu
from plasticity_jax.model.flops import flops_per_token
from plasticity_jax.model.transformer import abstract_params, apply, count_params
from plasticity_jax.parallel.deviceless import target
from plasticity_jax.train.check import (
    Answer,
    check,
    grid_device_hours,
    largest_values,
    refuse_over_budget,
    refused_bytes,
    search,
    to_record,
)

# As libtpu 0.0.52 says it.
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (17.51G) exceeds available HBM (15.75G)."


def dot_flops(jaxpr) -> int:
    """FLOPs of every matrix product in a program without loops."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            total += dot_flops(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_of_the_programs_products(tied, monkeypatch):
    monkeypatch.setattr(cpu, "one_cpu", lambda mesh: False)  # where rotary tables go through a product, too
    model = ModelConfig(vocab_size=320, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, tie_embeddings=tied)
    batch, length = 2, 8
    jaxpr = jax.make_jaxpr(lambda params, tokens: apply(model, params, tokens)[0])(abstract_params(model), jnp.zeros((batch, length), jnp.int32))
    assert 3 * dot_flops(jaxpr.jaxpr) == batch * length * flops_per_token(model, length)


def test_device_hours_of_the_grid_are_those_of_its_members():
    config = dataclasses.replace(CONFIG, grid=GridConfig(weight_decay=(0.0, 0.1), timescales=None, seeds=(0, 1)))
    tokens = 4 * CONFIG.train.steps * CONFIG.train.batch_size * CONFIG.train.seq_len
    expected = tokens * flops_per_token(config.model, config.train.seq_len) / (config.launch.mfu * 1e6) / 3600
    assert grid_device_hours(config, 1e6) == pytest.approx(expected)


def test_a_launch_over_the_budget_is_refused():
    refuse_over_budget(CONFIG)
    refuse_over_budget(dataclasses.replace(CONFIG, max_device_hours=1e6))
    with pytest.raises(UserError, match=r"max_device_hours=1e-12.*raise max_device_hours"):
        refuse_over_budget(dataclasses.replace(CONFIG, max_device_hours=1e-12))


def test_a_check_says_the_bytes_of_the_state():
    place = target("cpu:1")
    record = to_record(check(CONFIG, place), place)
    params = 4 * count_params(CONFIG.model)
    assert record["fits"] and record["bytes"]["params"] == params
    assert 2 * params <= record["bytes"]["optimizer"] <= 2 * params + 64
    assert set(record) == {
        "topology",
        "devices",
        "fits",
        "bytes",
        "members",
        "microbatch",
        "remat",
        "flops_per_token",
        "collectives",
        "compile_seconds",
        "device_hours",
    }
    json.dumps(record, allow_nan=False)


def test_too_little_memory_is_an_answer_that_names_the_largest_buffers():
    place = target("cpu:1")
    small = dataclasses.replace(place, hardware=dataclasses.replace(place.hardware, memory=1000))
    answer = check(CONFIG, small)
    assert not answer.fits and answer.total > answer.limit and answer.largest


def test_search_ends_at_the_whole_batch_without_remat_where_all_fits():
    answer = search(change(CONFIG, "train", scan_layers=True), target("cpu:1"))
    assert (answer.fits, answer.config.train.grad_accum_steps, answer.config.train.remat) == (True, 1, "none")


def bytes_by_setting(found, *, of_row: dict[str, int], limit: int):
    """A stand-in for a compilation: the memory of a config is its rows times what a row takes with its remat policy. Adds each config to `found`."""

    def compiled(config, place, members):
        train = config.train
        found.append((train.grad_accum_steps, train.remat))
        total = train.batch_size // train.grad_accum_steps * of_row[train.remat]
        measured = {"fits": total <= limit, "total": total, "limit": limit, "largest": [], "collectives": {}, "compile_seconds": 0.0}
        return Answer(config=config, members=members, params=0, optimizer=0, **measured)

    return compiled


@pytest.mark.parametrize(
    "of_row, expected, compiles",
    [
        ({"none": 1, "dots": 1, "full": 1}, (1, "none"), 4),
        ({"none": 20, "dots": 10, "full": 1}, (8, "dots"), 4),  # 8 rows take 80 of 100
        ({"none": 21, "dots": 12, "full": 1}, (16, "none"), 4),
        ({"none": 90, "dots": 43, "full": 1}, (64, "dots"), 4),  # 2 rows take 86 of 100, which fits and leaves too little free
        ({"none": 90, "dots": 86, "full": 2}, (2, "full"), 6),
        ({"none": 200, "dots": 200, "full": 101}, (64, "full"), 6),
    ],
)
def test_search_finds_the_fewest_parts_without_full_remat(of_row, expected, compiles, monkeypatch):
    found = []
    monkeypatch.setattr("plasticity_jax.train.check._compile", bytes_by_setting(found, of_row=of_row, limit=100))
    answer = search(change(CONFIG, "train", batch_size=64), target("cpu:1"))
    assert (answer.config.train.grad_accum_steps, answer.config.train.remat) == expected
    assert len(found) == len(set(found)) <= compiles


def test_the_tpu_compilers_refusal_is_read():
    assert refused_bytes(OUT_OF_MEMORY) == int(17.51 * 2**30)


def test_the_largest_values_of_a_program_are_named():
    program = jax.jit(lambda x: (x @ x.T).astype(jnp.bfloat16).sum()).lower(jax.ShapeDtypeStruct((64, 32), jnp.float32)).as_text()
    assert largest_values(program, 3) == [
        (4 * 64 * 64, "f32[64,64] over all devices"),
        (4 * 64 * 32, "f32[64,32] over all devices"),
        (4 * 64 * 32, "f32[32,64] over all devices"),
    ]
