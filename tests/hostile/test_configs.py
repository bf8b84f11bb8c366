"""Configs that nobody meant, through the real door: each is refused in one line, or makes a graph; nothing is written."""

import json
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutate import NUMBERS, TEXTS, assert_one_line, change_bytes, change_tree, deep, files_below, value, within_limits

from plasticity_jax.config import explain, load_config, to_dict
from plasticity_jax.study.execute import _bytes_needed, dry_run_lines

TINY = "configs/tiny.py"


@pytest.fixture(scope="module")
def tree():
    config = to_dict(load_config(TINY, [("train.compute_dtype", "float32")]))
    config["model"]["rope_scaling"] = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 64}
    config["grid"]["fields"] = [["train.peak_lr", [1e-3, 2e-3]]]
    config["hardware"] = [["H100", {"train.grad_accum_steps": 2}]]
    return json.loads(json.dumps(config))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


def looked_at(path, work, overrides=()):
    """All that is done with a config before anything runs."""
    config = load_config(path, overrides)
    for line in dry_run_lines(config, work / "work", chosen=lambda run: True, every=True):
        assert_one_line(line)
        assert "Error" not in line and "still at work" not in line, line
    _bytes_needed(config)


@given(random=st.randoms(use_true_random=False))
def test_a_tree_that_was_changed(tree, work, random: Random):
    path = work / "config.json"
    path.write_text(json.dumps(change_tree(tree, random)))
    with within_limits() as answered:
        answered(lambda: looked_at(path, work))
    assert files_below(work) == {path}


@given(random=st.randoms(use_true_random=False))
def test_a_file_of_which_bytes_were_changed(tree, work, random: Random):
    path = work / "config.json"
    path.write_bytes(change_bytes(json.dumps({"config": tree}).encode(), random))
    with within_limits() as answered:
        answered(lambda: looked_at(path, work))
    assert files_below(work) == {path}


EXPRESSIONS = (
    "10**400", "(" * 500 + ")" * 500, "[" * 100_000, "-" * 5000 + "1", "9" * 5000, "{1: 2}", "{[]: 1}", "1,2", "'\\x00'", "b'x'", "1j", "...", "{1}",
    "(0, 0)", "None", "__import__('os')", "'a' 'b'", "1_000", "0x10", "inf", "-inf", "1e999", "'\\ud800'", "\ud800", "\x00", "", "=", "(),", "{'a': {}}",
)  # fmt: skip


@given(random=st.randoms(use_true_random=False))
def test_an_override(tree, work, random: Random):
    keys = [
        *explain(load_config(TINY)),
        "name",
        "tasks",
        "grid",
        "model.rope_scaling",
        "model.rope_scaling.factor",
        "no.such.key",
        "",
        ".",
        "a" * 5000,
    ]
    text = random.choice((*EXPRESSIONS, *TEXTS, *(repr(number) for number in NUMBERS), repr(value(random)), repr(deep(150))))
    with within_limits() as answered:
        answered(lambda: looked_at(TINY, work, [(random.choice(keys), text), ("train.compute_dtype", "float32")]))
    assert not (work / "work").exists()
