import dataclasses
import json
import re
import typing
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
    grid_members,
    load_config,
    member_config,
    parse_config,
    result_fields,
    to_dict,
)
from plasticity_jax.config.grid import name_text
from plasticity_jax.errors import UserError
from plasticity_jax.runs.jsonfiles import to_json

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_committed_configs_load(path):
    config = load_config(path)
    assert config.name.replace("-", "_").replace(".", "p") == path.stem
    assert parse_config(to_dict(config)) == config


@pytest.mark.parametrize(
    ("key", "text", "parts"),
    [
        ("model.d_modle", "64", ["model.d_modle", "did you mean model.d_model?"]),
        ("modle.d_model", "64", ["modle", "did you mean model?"]),
        ("tasks.topci.epochs", "2", ["tasks.topci", "did you mean tasks.topic?"]),
        ("model.d_model", "abc", ["model.d_model='abc'", "must be a valid integer", "width of the residual stream"]),
        ("train.steps", "1.5", ["train.steps=1.5", "must be a valid integer"]),
        ("train.peak_lr", "True", ["train.peak_lr=True", "must be a valid number"]),
        ("train.peak_lr", "nan", ["train.peak_lr='nan'", "must be a valid number"]),
        ("train.peak_lr", "-1.0", ["train.peak_lr=-1.0", "must be greater than 0"]),
        ("grid.weight_decay", "0.1", ["grid.weight_decay=0.1", "tuple"]),
        ("grid.weight_decay", "(-0.1,)", ["grid.weight_decay[0]=-0.1", "greater than or equal to 0"]),
        ("grid.weight_decay", "(0.1,0.1)", ["wd0.1", "twice"]),
        ("grid.weight_decay", "()", ["grid.weight_decay=()", "at least 1 item"]),
        ("grid.fields", "('train.peak_lr',(1e-3,))", ["grid.fields[0]='train.peak_lr'", "tuple"]),
        ("grid.fields", "(('train.peak_lr',()),)", ["train.peak_lr has no values"]),
        ("grid.fields", "(('train.peak_lr',(1e-3,'fast')),)", ["grid.fields: train.peak_lr[1]='fast'", "must be a valid number"]),
        ("grid.fields", "(('train.peak_lr',(1e-3,-1e-3)),)", ["grid.fields: train.peak_lr[1]=-0.001", "must be greater than 0"]),
        ("grid.fields", "(('train.peak_lr',(1e-3,)),('train.peak_lr',(2e-3,)))", ["train.peak_lr twice"]),
        ("grid.fields", "(('train.peak_lr',(1e-3,1.00001e-3)),)", ["wd0-peak_lr0.001", "twice"]),
        ("grid.fields", "(('train.peaklr',(1e-3,)),)", ["train.peaklr", "did you mean", "train.peak_lr"]),
        ("grid.fields", "(('trian.peak_lr',(1e-3,)),)", ["trian.peak_lr", "did you mean", "train.peak_lr"]),
        ("grid.fields", "(('train.log_every',(1,2)),)", ["train.log_every", "not the result"]),
        ("grid.fields", "(('evaluate.seed',(3,)),)", ["evaluate.seed", "only in their training"]),
        ("grid.fields", "(('evaluate.temperature',(1.0,)),)", ["evaluate.temperature", "only in their training"]),
        ("grid.fields", "(('model.d_model',(96,90)),)", ["members with model.d_model=90", "88 or 92"]),
        ("grid.fields", "(('decay.mask',('all','most')),)", ["decay.mask[1]='most'", "matrices-only"]),
        ("grid.fields", "(('train.compute_dtype',('auto','float32')),)", ["train.compute_dtype", "'auto'", "float32 or bfloat16"]),
        ("grid.changes", "(('^wd7$',{'train.steps':5}),)", ["'^wd7$' matches no member", "wd0"]),
        ("grid.changes", "(('(',{'train.steps':5}),)", ["'('", "regular expression"]),
        ("grid.changes", "(('wd0',{'train.steps':5.5}),)", ["grid.changes: train.steps=5.5", "must be a valid integer"]),
        ("grid.changes", "(('wd0$',{'train.batch_size':0}),)", ["grid.changes: train.batch_size=0", "greater than 0"]),
        ("grid.changes", "(('wd0',{'gap.seed':5}),)", ["gap.seed", "only in their training"]),
        ("model.d_model", "90", ["model.d_model=90", "model.n_heads=4", "88 or 92"]),
        ("train.keep_steps", "lgo:8", ["train.keep_steps='lgo:8'", '"log:N"']),
        ("train.keep_steps", "log:1", ["train.keep_steps='log:1'", "from 2"]),
        ("train.keep_steps", "(1,0)", ["train.keep_steps", "greater than 0"]),
        ("train.keep_steps", "(1,729)", ["step 729", "train.steps=728"]),
        ("model.n_kv_heads", "3", ["model.n_heads=4", "model.n_kv_heads=3"]),
        ("decay.mask", "none", ["decay.mask='none'", "matrices-only"]),
        ("data.sources", "('sotu','wikipdia')", ["data.sources[1]='wikipdia'", "did you mean wikipedia?"]),
        ("probe.sets", "('tpoic',)", ["probe.sets[0]='tpoic'", "did you mean topic?"]),
        ("model", "3", ["model is a section"]),
        ("name", "../evil", ["name='../evil'"]),
        ("finetune.length_buckets", "(64,32)", ["finetune.length_buckets", "increasing"]),
        ("hardware", "(('cpu',{'train.steps':5}),)", ["train.steps", "defines the result"]),
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
    config = load_config(CONFIGS / "tiny.py", [("grid.weight_decay", "(0.0,0.1)")])
    assert config.grid.timescales is None
    assert [(m.name, m.weight_decay) for m in grid_members(config)] == [("wd0", 0.0), ("wd0.1", 0.1)]
    with pytest.raises(UserError, match="two ways"):
        load_config(CONFIGS / "tiny.py", [("grid.weight_decay", "(0.0,)"), ("grid.timescales", "(None,)")])


def test_int_is_taken_for_float_but_not_the_other_way():
    assert load_config(CONFIGS / "default.py", [("train.peak_lr", "1")]).train.peak_lr == 1.0


@given(st.floats(0.01, 100), st.floats(1e-5, 1e-1), st.integers(10, 10**6), st.sampled_from(["coupled", "independent"]))
def test_decay_follows_from_the_timescale(share, peak_lr, steps, kind):
    config = StudyConfig(train=TrainConfig(peak_lr=peak_lr, steps=steps), grid=GridConfig(timescales=(share,)), decay=DecayConfig(kind=kind))
    (member,) = grid_members(config)
    shrink_per_step = member.weight_decay * (peak_lr if kind == "coupled" else 1.0)
    assert 1 / shrink_per_step / steps == pytest.approx(share)
    back = dataclasses.replace(config, grid=GridConfig(timescales=None, weight_decay=(member.weight_decay,)))
    assert grid_members(back)[0].timescale == pytest.approx(share)


@pytest.mark.parametrize(
    ("keep_steps", "kept"), [("()", ()), ("(100,7,7)", (7, 100)), ("log:2", (1, 500)), ("log:4", (1, 8, 63, 500)), ("log:500", None)]
)
def test_steps_to_keep_are_in_order_and_within_the_run(keep_steps, kept):
    train = load_config(CONFIGS / "tiny.py", [("train.steps", "500"), ("train.keep_steps", keep_steps)]).train
    if kept is not None:
        assert train.kept_steps == kept
    else:
        assert train.kept_steps[0] == 1 and train.kept_steps[-1] == 500 and sorted(set(train.kept_steps)) == list(train.kept_steps)


def test_members_carry_their_seed_in_the_name():
    config = StudyConfig(grid=GridConfig(timescales=None, weight_decay=(0.0, 0.1), seeds=(0, 3)))
    assert [m.name for m in grid_members(config)] == ["wd0", "wd0.1", "wd0-s3", "wd0.1-s3"]


LR_GRID = (("grid.fields", "(('train.peak_lr',(1e-3,4e-3)),)"),)


def test_the_grid_is_a_product_of_seeds_fields_and_decays():
    overrides = [("grid.fields", "(('train.peak_lr',(2,4e-3)),('decay.mask',('all','matrices-only')))"), ("grid.weight_decay", "(0.0,0.1)")]
    members = grid_members(load_config(CONFIGS / "default.py", [*overrides, ("grid.seeds", "(0,3)")]))
    masks = ("mask_all", "mask_matrices_only")
    expected = [f"wd{d}-peak_lr{lr}-{mask}{s}" for s in ("", "-s3") for lr in ("2", "0.004") for mask in masks for d in ("0", "0.1")]
    assert [m.name for m in members] == expected
    assert members[2].overrides == (("train.peak_lr", 2.0), ("decay.mask", "matrices-only"))
    assert type(members[0].overrides[0][1]) is float, "an int where a float belongs would give another hash"


def test_timescales_become_decay_at_the_members_own_rate_and_length():
    fields = "(('train.peak_lr',(1e-3,4e-3)),('train.steps',(100,200)))"
    config = load_config(CONFIGS / "default.py", [("grid.fields", fields), ("grid.timescales", "(None,0.5)")])
    for member in grid_members(config):
        own = member_config(config, member).train
        assert dict(member.overrides) == {"train.peak_lr": own.peak_lr, "train.steps": own.steps}
        assert member.weight_decay == pytest.approx(0.0 if member.timescale is None else 1 / (0.5 * own.peak_lr * own.steps))


def test_member_config_is_the_study_but_for_what_is_swept():
    config = load_config(CONFIGS / "default.py", LR_GRID)
    for member in grid_members(config):
        own = member_config(config, member)
        check_config(own)
        assert own.grid.fields == () and own.train.peak_lr == dict(member.overrides)["train.peak_lr"]
        assert dataclasses.replace(own, grid=config.grid, train=config.train) == config
    plain = load_config(CONFIGS / "default.py")
    assert all(member_config(plain, member) == plain for member in grid_members(plain))


def test_changes_apply_in_order_and_leave_the_name():
    changes = "(('^wd',{'train.batch_size':8}),('wd1$',{'train.batch_size':16,'train.steps':160}))"
    config = load_config(CONFIGS / "tiny.py", [("grid.weight_decay", "(0.0,1.0)"), ("grid.changes", changes)])
    none, one = grid_members(config)
    assert (none.name, one.name, none.timescale) == ("wd0", "wd1", None)
    assert [member_config(config, m).train.batch_size for m in (none, one)] == [8, 16]
    assert one.timescale == pytest.approx(1 / (config.train.peak_lr * 160)), "of the run that the member makes"


@pytest.mark.parametrize(
    "overrides", [LR_GRID, (("grid.fields", "(('data.sources',(('sotu',),('bbc','news'))),)"), ("grid.changes", "(('sotu',{'train.steps':9}),)"))]
)
def test_a_swept_config_survives_json(overrides):
    config = load_config(CONFIGS / "default.py", overrides)
    assert parse_config(json.loads(to_json(to_dict(config)))) == config


def test_a_swept_field_may_hold_a_section(tmp_path):
    scaling = "{'factor':8.0,'low_freq_factor':1.0,'high_freq_factor':4.0,'original_length':64}"
    config = load_config(CONFIGS / "tiny.py", [("grid.fields", f"(('model.rope_scaling',(None,{scaling})),)"), ("grid.timescales", "(None,)")])
    plain, scaled = (member_config(config, m).model.rope_scaling for m in grid_members(config))
    assert plain is None and scaled.factor == 8.0


def test_an_override_of_a_swept_field_is_refused():
    with pytest.raises(UserError, match="no effect, because grid.fields sweeps train.peak_lr"):
        load_config(CONFIGS / "default.py", [*LR_GRID, ("train.peak_lr", "1e-3")])


@given(st.one_of(st.text(), st.lists(st.text()).map(tuple), st.integers(), st.floats(0, 1e9), st.none()))
def test_no_value_makes_a_name_that_leaves_its_folder(value):
    name = f"wd0-files{name_text(value)}"
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name) and len(name) < 80


@pytest.mark.parametrize(("signature", "overrides", "steps"), [("faithful=False", "True", 7), ("faithful=False", "False", 3), ("", "True", 3)])
def test_a_config_file_is_told_of_faithful(tmp_path, signature, overrides, steps):
    file = tmp_path / "mine.py"
    body = "7 if faithful else 3" if signature else "3"
    file.write_text(
        f"from plasticity_jax.config import base_config\ndef get_config({signature}):\n    c = base_config()\n    c.train.steps = {body}\n    return c\n"
    )
    config = load_config(file, [("faithful", overrides)])
    assert config.train.steps == steps and config.faithful is (overrides == "True")
    assert load_config(file).train.steps == 3
    with pytest.raises(UserError, match="faithful='yes'"):
        load_config(file, [("faithful", "yes")])


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
    parse_config(base_config().to_dict())


def test_the_zero_shot_sets_of_a_config_are_those_that_there_are():
    from plasticity_jax.evaluate.zero_shot import SETS
    from plasticity_jax.stages.zero_shot import ZeroShotSet

    assert set(typing.get_args(ZeroShotSet)) == set(SETS)
