import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plasticity_jax.config import (
    DecayConfig,
    GridConfig,
    StudyConfig,
    TrainConfig,
    base_config,
    check_config,
    execution_fields,
    for_device,
    from_dict,
    grid_members,
    load_config,
    result_fields,
    to_dict,
)
from plasticity_jax.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_committed_configs_load(path):
    config = load_config(path)
    assert config.name == path.stem
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    ("key", "text", "parts"),
    [
        ("model.d_modle", "64", ["model.d_modle", "did you mean model.d_model?"]),
        ("modle.d_model", "64", ["modle", "did you mean model?"]),
        ("tasks.topci.epochs", "2", ["tasks.topci", "did you mean tasks.topic?"]),
        ("model.d_model", "abc", ["model.d_model='abc'", "must be an int"]),
        ("train.steps", "1.5", ["train.steps=1.5", "must be an int"]),
        ("train.peak_lr", "True", ["train.peak_lr=True", "must be a float"]),
        ("train.peak_lr", "nan", ["train.peak_lr", "must be a float"]),
        ("train.peak_lr", "-1.0", ["train.peak_lr=-1.0", "must be positive"]),
        ("grid.weight_decay", "0.1", ["grid.weight_decay=0.1", "tuple"]),
        ("grid.weight_decay", "(-0.1,)", ["grid.weight_decay[0]=-0.1", "not negative"]),
        ("grid.weight_decay", "(0.1,0.1)", ["wd0.1", "twice"]),
        ("grid.weight_decay", "()", ["empty"]),
        ("model.d_model", "90", ["model.d_model=90", "model.n_heads=4", "88 or 92"]),
        ("model.n_kv_heads", "3", ["model.n_heads=4", "model.n_kv_heads=3"]),
        ("decay.mask", "none", ["decay.mask='none'", "matrices-only"]),
        ("data.sources", "('sotu','wikipdia')", ["data.sources[1]='wikipdia'", "did you mean wikipedia?"]),
        ("probe.sets", "('tpoic',)", ["probe.sets[0]='tpoic'", "did you mean topic?"]),
        ("model", "3", ["model is a section"]),
        ("name", "../evil", ["name='../evil'"]),
        ("finetune.length_buckets", "(64,32)", ["finetune.length_buckets", "increasing"]),
        ("hardware", "(('cpu',{'train.steps':5}),)", ["train.steps", "no execution field"]),
        ("hardware", "(('(',{'train.eval_every':5}),)", ["'('", "regular expression"]),
    ],
)
def test_bad_value_is_one_line_with_value_and_rule(key, text, parts):
    with pytest.raises(UserError) as error:
        load_config(CONFIGS / "default.py", [(key, text)])
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_unknown_key_in_a_file_names_the_nearest(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from plasticity_jax.config import base_config\ndef get_config():\n    c = base_config()\n    c.train.step = 5\n    return c\n")
    with pytest.raises(UserError, match=r"mine\.py.*steps") as error:
        load_config(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["def broken(:\n", "x = 1\n", "import no_such_module\ndef get_config(): pass\n", "def get_config(): return 3\n"])
def test_broken_file_is_one_line(tmp_path, text):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(file)
    assert "mine.py" in str(error.value) and "\n" not in str(error.value)


def test_one_way_of_giving_the_grid_replaces_the_other():
    config = load_config(CONFIGS / "default.py", [("grid.weight_decay", "(0.0,0.1)")])
    assert config.grid.timescales is None
    assert [(m.name, m.weight_decay) for m in grid_members(config)] == [("wd0", 0.0), ("wd0.1", 0.1)]
    with pytest.raises(UserError, match="two ways"):
        load_config(CONFIGS / "default.py", [("grid.weight_decay", "(0.0,)"), ("grid.timescales", "(None,)")])


def test_int_is_taken_for_float_but_not_the_other_way():
    assert load_config(CONFIGS / "default.py", [("train.peak_lr", "1")]).train.peak_lr == 1.0


@given(st.floats(0.01, 100), st.floats(1e-5, 1e-1), st.integers(10, 10**6), st.sampled_from(["coupled", "independent"]))
def test_decay_follows_from_the_timescale(share, peak_lr, steps, kind):
    config = StudyConfig(
        train=TrainConfig(peak_lr=peak_lr, steps=steps), grid=GridConfig(timescales=(share,)), decay=DecayConfig(kind=kind)
    )
    (member,) = grid_members(config)
    shrink_per_step = member.weight_decay * (peak_lr if kind == "coupled" else 1.0)
    assert 1 / shrink_per_step / steps == pytest.approx(share)
    back = dataclasses.replace(config, grid=GridConfig(timescales=None, weight_decay=(member.weight_decay,)))
    assert grid_members(back)[0].timescale == pytest.approx(share)


def test_members_carry_their_seed_in_the_name():
    config = StudyConfig(grid=GridConfig(timescales=None, weight_decay=(0.0, 0.1), seeds=(0, 3)))
    assert [m.name for m in grid_members(config)] == ["wd0", "wd0.1", "wd0-s3", "wd0.1-s3"]


def test_hardware_rules_change_execution_fields_of_matching_devices_only():
    config = load_config(CONFIGS / "default.py", [("hardware", "(('H100|A100',{'mesh.fsdp':8,'evaluate.batch_size':4096}),)")])
    assert for_device(config, "cpu") == config
    assert for_device(config, "NVIDIA H100 80GB HBM3").mesh.fsdp == 8
    assert for_device(config, "NVIDIA H100 80GB HBM3").evaluate.batch_size == 4096


def test_every_field_is_either_a_result_or_an_execution_field():
    config = StudyConfig()
    executed = execution_fields(config)
    assert "mesh.data" in executed and "train.checkpoint_every" in executed
    assert "checkpoint_every" not in result_fields(config.train) and "steps" in result_fields(config.train)
    assert result_fields(config.mesh) == {}


def test_base_config_is_locked():
    with pytest.raises(AttributeError):
        base_config().train.no_such_key = 1
    check_config(from_dict(base_config().to_dict()))
