"""What enters as a config besides a Python file: resolved JSON, sections from outside, stored configs; and who wins over whom."""

import json
import logging
import pickle
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import pytest
from annotated_types import Gt
from hypothesis import given
from hypothesis import strategies as st

from plasticity_jax import config as facade
from plasticity_jax.cli import main
from plasticity_jax.config import (
    DataConfig,
    GridConfig,
    ModelConfig,
    RopeScaling,
    StudyConfig,
    TaskConfig,
    TrainConfig,
    base_config,
    check_config,
    explain,
    for_device,
    grid_members,
    load_config,
    member_config,
    parse_config,
    restore_config,
    schema,
    to_dict,
)
from plasticity_jax.config.schema import MOST
from plasticity_jax.errors import UserError
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.runs.jsonfiles import to_json
from plasticity_jax.runs.run import Run
from plasticity_jax.study.graph import build_graph, read_study, save_study

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = CONFIGS / "tiny.py"
FLOAT32 = ("train.compute_dtype", "float32")


def refusal(*arguments) -> str:
    with pytest.raises(UserError) as error:
        load_config(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def printed(capsys, *words: str) -> str:
    capsys.readouterr()
    assert main(["config", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "from_checkpoints"))  # whose models are elsewhere
def test_what_plasticity_config_prints_is_the_same_study(name, tmp_path, capsys):
    path = CONFIGS / f"{name}.py"
    resolved = tmp_path / "resolved.json"
    resolved.write_text(printed(capsys, "--config", str(path), "--config.train.compute_dtype=float32", "--config.train.b2=0.98765432109876543"))
    config = load_config(path, [FLOAT32, ("train.b2", "0.98765432109876543")])
    assert load_config(resolved) == config
    assert [run.id for run in build_graph(load_config(resolved))] == [run.id for run in build_graph(config)]


def test_the_json_that_a_run_and_a_study_write_is_a_config(tmp_path):
    fields = "(('model.rope_scaling',(None,{'factor':8.0,'low_freq_factor':1.0,'high_freq_factor':4.0,'original_length':64})),)"
    config = load_config(TINY, [FLOAT32, ("grid.fields", fields), ("train.keep_steps", "(1,10)")])
    with RunDirectory(tmp_path / "run").work(Run("tiny", "init", "s0", {}), config):
        pass
    save_study(tmp_path, config, build_graph(config))
    for file in (tmp_path / "run" / "config.json", tmp_path / "tiny" / "study.json"):
        assert load_config(file) == config
        assert load_config(file, [("evaluate.seed", "5")]) == replace(config, evaluate=replace(config.evaluate, seed=5))


def test_a_resolved_json_executes_nothing(tmp_path):
    canary = tmp_path / "canary"
    code = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    tree = to_dict(StudyConfig(data=DataConfig(files=code, tokenizer=f"/{code}", text_field="${HOME}")))
    file = tmp_path / "resolved.json"
    file.write_text(json.dumps(tree))
    config = load_config(file)
    assert (config.data.files, config.data.text_field) == (code, "${HOME}") and not canary.exists()
    file.write_text(f"def get_config():\n    {code}\n")
    assert "resolved.json is not JSON" in refusal(file) and not canary.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": {"stesp": 5}}, "config key train.stesp is unknown; did you mean train.steps?"),
        ({"trian": {}}, "config key trian is unknown; did you mean train?"),
        ({"train": {"warmup_share": 0.1}}, "config key train.warmup_share is now called train.warmup_fraction."),
        ({"verifier": {"held_out_share": 0.1}}, "config key verifier.held_out_share is now called verifier.held_out_fraction."),
        ({"tasks": {"topic": {"epoch": 1}}}, "config key tasks.topic.epoch is unknown; did you mean tasks.topic.epochs?"),
        ({"model": {"rope_scaling": {"factor": 1}}}, "model.rope_scaling.low_freq_factor is missing"),
        ({"train": {"steps": "5"}}, "train.steps='5' must be a valid integer"),
        ({"train": {"z_loss": float("nan")}}, "train.z_loss=nan must be a finite number"),
        ({"grid": {"weight_decay": None, "timescales": [1e-320]}}, "grid.timescales=1e-320 at a learning rate that would decay by "),
        ({"grid": {"weight_decay": [1e-323], "timescales": None}}, "grid.weight_decay=9.881e-324 at a learning rate"),
        ({"grid": {"weight_decay": [1e300], "timescales": None}}, "grid.weight_decay=1e+300 at a learning rate"),
        ({"evaluate": {"n_samples": 1_000_000}}, "evaluate.n_samples=1000000 must be less than or equal to 10000"),
        ({"train": 5}, "train=5 must be a section with keys batch_size"),
        ([], "holds no config"),
        ({"config": []}, "holds no config"),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_bad_json_is_one_line(change, said, inside, tmp_path):
    file = tmp_path / "resolved.json"
    file.write_text(json.dumps({"run": {}, "config": change} if inside and "config" not in change else change))
    assert said in refusal(file)


def test_a_file_that_gives_no_config_is_one_line(tmp_path):
    (tmp_path / "mine.py").write_text("def get_config():\n    return 5\n")
    assert refusal(tmp_path / "mine.py") == f"{tmp_path / 'mine.py'}: get_config() returned int; return a ConfigDict, such as that of base_config()."


def test_an_empty_path_is_refused(capsys):
    assert main(["status", "--workdir", ""]) == 2
    assert "--workdir: a path is empty" in capsys.readouterr().err


RENAMED = [
    ("train.warmup_share", "train.warmup_fraction"),
    ("train.decay_share", "train.decay_fraction"),
    ("train.final_lr_share", "train.final_lr_fraction"),
    ("finetune.warmup_share", "finetune.warmup_fraction"),
    ("verifier.warmup_share", "verifier.warmup_fraction"),
    ("data.held_out_share", "data.held_out_fraction"),
    ("verifier.held_out_share", "verifier.held_out_fraction"),
    ("train.microbatches", "train.grad_accum_steps"),
    ("finetune.microbatches", "finetune.grad_accum_steps"),
]


@pytest.mark.parametrize(("old", "new"), RENAMED)
def test_an_old_key_is_refused_with_its_new_name_wherever_it_stands(old, new, tmp_path):
    said = f"{old} is now called {new}."
    assert said in refusal(TINY, [(old, "1")])
    assert said in refusal(TINY, [("grid.fields", f"(({old!r},(1,)),)")])
    assert said in refusal(TINY, [("grid.changes", f"(('wd0',{{{old!r}:1}}),)")])
    assert said in refusal(TINY, [("hardware", f"(('cpu',{{{old!r}:1}}),)")])
    section, name = old.split(".")
    (tmp_path / "resolved.json").write_text(json.dumps({section: {name: 1}}))
    assert said in refusal(tmp_path / "resolved.json")
    for statement in (f"c.{old} = 1", f"c.{section}['{name}'] = 1", f"c.{new} = c.{old}"):
        file = tmp_path / "mine.py"
        file.write_text(f"from plasticity_jax.config import base_config\ndef get_config():\n    c = base_config()\n    {statement}\n    return c\n")
        assert refusal(file) == f"{file}: line 4: config key {name} is now called {new.split('.')[1]}."


def test_an_unknown_key_of_a_python_file_names_the_nearest_alone(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from plasticity_jax.config import base_config\ndef get_config():\n    c = base_config()\n    c.train.stesp = 5\n    return c\n")
    assert refusal(file) == f"{file}: line 4: config key stesp is unknown; did you mean steps?"
    file.write_text("def get_config():\n    return {}['warmup']\n")
    assert "KeyError" in refusal(file)


V5E = ("hardware", "(('TPU v5',{'train.grad_accum_steps':2,'mesh.fsdp':4}),)")


def test_the_command_line_wins_over_a_hardware_rule(caplog, tmp_path):
    kind = "TPU v5 lite"
    assert for_device(load_config(TINY, [V5E]), kind).train.grad_accum_steps == 2
    with caplog.at_level(logging.INFO, "plasticity_jax"):
        config = load_config(TINY, [V5E, ("train.grad_accum_steps", "1")])
    (record,) = caplog.records
    assert record.getMessage() == "--config.train.grad_accum_steps=1 wins over the hardware rule 'TPU v5', which sets it to 2"
    on_device = for_device(config, kind)
    assert (on_device.train.grad_accum_steps, on_device.mesh.fsdp) == (1, 4)
    (tmp_path / "resolved.json").write_text(to_json(to_dict(config)))
    assert for_device(load_config(tmp_path / "resolved.json"), kind) == on_device, "the JSON remembers what won"


def test_a_hardware_rule_that_does_not_fit_is_refused_on_its_device():
    config = load_config(TINY, [("hardware", "(('H100',{'train.loss_chunks':3}),)")])
    assert for_device(config, "cpu") == config
    with pytest.raises(UserError, match="train.seq_len=64 is not divisible by train.loss_chunks=3"):
        for_device(config, "NVIDIA H100 80GB HBM3")
    assert "hardware: train.grad_accum_steps=0 must be greater than 0" in refusal(TINY, [("hardware", "(('H100',{'train.grad_accum_steps':0}),)")])
    assert "hardware: train.scan_layers=1 must be a valid boolean" in refusal(TINY, [("hardware", "(('H100',{'train.scan_layers':1}),)")])


@dataclass(frozen=True)
class StubConfig:
    """The section of an analysis in another package."""

    depth: Annotated[int, Gt(0)] = 3
    kind: Literal["wide", "deep"] = "wide"
    rate: float = schema.execution(1.0, "items per second")

    def check(self, config):
        if self.depth > config.model.n_layers:
            raise UserError(f"stub.depth={self.depth} is above model.n_layers={config.model.n_layers}; lower it.")


@pytest.fixture
def stub(monkeypatch):
    known = schema.extra_sections()
    monkeypatch.setattr(schema, "extra_sections", lambda: {**known, "stub": StubConfig})
    return [FLOAT32, ("model.n_layers", "4")]


def test_a_section_from_outside_is_a_section_like_any_other(stub, tmp_path):
    config = load_config(TINY, [*stub, ("stub.depth", "4"), ("stub.rate", "2")])
    assert config.stub == StubConfig(depth=4, rate=2.0) and type(config.stub.rate) is float
    assert isinstance(config, StudyConfig) and StudyConfig(stub=StubConfig(depth=1)).stub.depth == 1 and StudyConfig().stub == StubConfig()
    assert replace(config, stub=StubConfig()).stub.depth == 3 and to_dict(config)["stub"] == {"depth": 4, "kind": "wide", "rate": 2.0}
    assert restore_config(json.loads(to_json(to_dict(config)))) == config
    assert base_config().stub.depth == 3 and pickle.loads(pickle.dumps(config)) == config
    assert explain(config)["stub.rate"] == {"value": 2.0, "doc": "items per second", "execution": True}
    assert for_device(load_config(TINY, [*stub, ("hardware", "(('cpu',{'stub.rate':5}),)")]), "cpu").stub.rate == 5.0
    assert [run.id for run in build_graph(config)] == [run.id for run in build_graph(load_config(TINY, stub))]
    for override, said in [
        (("stub.depth", "0"), "stub.depth=0 must be greater than 0"),
        (("stub.dept", "2"), "did you mean stub.depth?"),
        (("stub.kind", "dep"), "stub.kind='dep' must be 'wide' or 'deep'; did you mean deep?"),
        (("stub.depth", "5"), "stub.depth=5 is above model.n_layers=4"),
        (("grid.fields", "(('stub.depth',(1,2)),)"), "only in their training"),
        (("grid.fields", "(('model.n_layers',(4,2)),)"), "for the members with model.n_layers=2: stub.depth=3 is above"),
    ]:
        assert said in refusal(TINY, [*stub, override])
    (tmp_path / "resolved.json").write_text(json.dumps({"stub": {"depht": 2}}))
    assert "config key stub.depht is unknown; did you mean stub.depth?" in refusal(tmp_path / "resolved.json")


def test_without_it_there_is_no_such_section():
    assert "config key stub is unknown" in refusal(TINY, [("stub.depth", "1")])
    assert not hasattr(StudyConfig(), "stub") and not hasattr(facade, "StubConfig")
    with pytest.raises(TypeError):
        StudyConfig(stub=StubConfig())


def test_building_a_config_judges_nothing_and_the_door_judges_everything():
    broken = StudyConfig(train=TrainConfig(steps=-1))
    with pytest.raises(UserError, match="train.steps=-1 must be greater than 0"):
        check_config(broken)
    assert replace(broken, name="other").train.steps == -1


def test_a_stored_config_is_restored_and_not_judged():
    config = replace(load_config(TINY, [FLOAT32]), train=TrainConfig(steps=-1), tasks={"gone": TaskConfig(epochs=0)})
    tree = json.loads(to_json(to_dict(config)))
    assert restore_config(tree) == config
    del tree["spectra"], tree["evaluate"]["seed"]
    tree["train"]["no_more"] = 1
    tree["removed"] = {"a": 1}
    assert restore_config(tree) == config, "missing fields have their defaults, unknown ones are left out"
    tree["train"]["warmup_share"] = tree["train"].pop("warmup_fraction") / 2
    assert restore_config(tree).train.warmup_fraction == config.train.warmup_fraction / 2


def test_a_run_and_a_study_of_another_version_are_read(tmp_path):
    config = load_config(TINY, [FLOAT32])
    runs = build_graph(config)
    save_study(tmp_path, config, runs)
    file = tmp_path / "tiny" / "study.json"
    tree = json.loads(file.read_text())
    tree["config"]["train"]["steps"] = "many"
    tree["config"]["model"]["rope_kind"] = "new"
    tree["config"]["grid"]["fields"] = [["model.rope_kind", ["new"]]]
    file.write_text(json.dumps(tree))
    assert [run.id for run in read_study(file)[1]] == [run.id for run in runs]
    assert restore_config(tree["config"]).grid.fields == () and main(["status", "--workdir", str(tmp_path)]) == 0


LONG_ROPE = RopeScaling(8.0, 1.0, 4.0, 64)


def test_a_stored_grid_has_the_types_of_its_fields():
    grid = GridConfig(fields=(("model.rope_scaling", (None, LONG_ROPE)), ("data.sources", (("sotu",),))), changes=(("wd0", {"model.d_head": 2}),))
    config = StudyConfig(model=ModelConfig(rope_scaling=LONG_ROPE), grid=grid)
    back = restore_config(json.loads(to_json(to_dict(config))))
    assert back == config and member_config(back, grid_members(back)[-1]).model.rope_scaling == LONG_ROPE


def test_every_field_says_what_it_means(capsys):
    config = load_config(CONFIGS / "default.py", [("model.rope_scaling", str(to_dict(LONG_ROPE)))])
    rows = explain(config)
    assert {name for name, row in rows.items() if not row["doc"]} == set()
    shown = json.loads(printed(capsys, "--config", str(CONFIGS / "default.py"), "--explain", "--config.train.steps=7"))
    assert shown["train.steps"] == {"value": 7, "doc": "optimizer steps", "execution": False}
    assert shown["train.remat"]["execution"] and shown["tasks.topic.epochs"]["doc"] == "passes over the training rows"
    assert set(shown) == set(explain(load_config(CONFIGS / "default.py")))


def test_plasticity_config_prints_overrides_and_refuses_what_is_wrong(capsys):
    tree = json.loads(printed(capsys, "--config", str(TINY), "--config.train.steps=7", "--config.grid.weight_decay=(0.0,)"))
    assert tree["train"]["steps"] == 7 and tree["grid"]["weight_decay"] == [0.0] and tree["grid"]["timescales"] is None
    assert main(["config", "--config", str(TINY), "--config.train.steps=x"]) == 2
    assert "train.steps='x'" in capsys.readouterr().err


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=5e-324), st.integers(1, MOST))
def test_numbers_pass_the_door_exactly(number, count):
    config = parse_config({"train": {"max_loss": number, "held_out_tokens": count}})
    assert (config.train.max_loss, config.train.held_out_tokens) == (number, count)


@pytest.mark.parametrize(
    "text, line",
    [
        ("def get_config():\n    c = {\n    return c\n", "line 2: SyntaxError: '{' was never closed"),
        ("def get_config():\n    d = {}\n    return d['x']\n", "line 3: KeyError: 'x'"),
        (
            "from plasticity_jax.config import base_config\n\ndef get_config():\n    c = base_config()\n    c.train.stepz = 3\n    return c\n",
            "line 5: ",
        ),
    ],
)
def test_an_error_in_a_config_file_says_its_line(tmp_path, text, line):
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(UserError, match=re.escape(f"own.py: {line}")) as error:
        load_config(tmp_path / "own.py", [])
    assert "\n" not in str(error.value)


def test_all_tasks_are_replaced_at_once():
    assert load_config(TINY, [("tasks", "{}")]).tasks == {}
    [(name, task)] = load_config(TINY, [("tasks", "{'addition2': {'epochs': 2}}")]).tasks.items()
    assert (name, task.epochs) == ("addition2", 2)
    for key, value in (("tasks", "3"), ("train", "{}")):
        with pytest.raises(UserError, match="is a section"):
            load_config(TINY, [(key, value)])
