"""`plasticity check` of whole studies: every program is compiled as it will run, and one that does not fit says the smallest change that does."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from running import TINY, plasticity, python

from plasticity_jax.config import load_config
from plasticity_jax.parallel.deviceless import target
from plasticity_jax.parallel.mesh import make_mesh
from plasticity_jax.stages import Knob, Program, stages
from plasticity_jax.study.check import Compiler, cases, check_pretraining, check_stages, lines, remedies, remedy
from plasticity_jax.train.check import Measured, gib

ROWS = [(f"tasks.{task}.verifier_rows", "20") for task in load_config(TINY, []).tasks]
CONFIG = load_config(TINY, [("reward.scorer", "verifier"), ("reward.max_length", "128"), *ROWS])
LIGHT = [("model.n_layers", "1"), ("finetune.length_buckets", "(32,)"), ("evaluate.max_length", "56"), ("evaluate.batch_size", "16")]
VMAPPED = [("grid.mode", "vmapped"), ("grid.timescales", "(None, 0.2, 0.8, 4.0)")]


@pytest.fixture(scope="module")
def cpu():
    return target("cpu:1")


def with_memory(place, memory: int):
    return dataclasses.replace(place, hardware=dataclasses.replace(place.hardware, memory=memory, reserve=0))


def test_every_stage_that_runs_a_model_has_its_program_compiled(cpu):
    rows = check_stages(cases(CONFIG, cpu), cpu, tuple(stages()))
    assert {row.stage for row in rows} == {"finetune", "evaluate", "verifier", "reward", "probe", "spectra", "gap"}
    assert all(row.fits and row.found and 0 < row.found.total < row.found.limit for row in rows)
    assert not [line for line in lines(rows) if "does not fit" in line]


def test_a_reward_model_that_is_not_here_is_said_and_the_rest_is_checked(cpu):
    reward = dataclasses.replace(CONFIG.reward, scorer="sequence-classification", model="nowhere")
    rows = check_stages(cases(dataclasses.replace(CONFIG, reward=reward), cpu), cpu, ("reward", "spectra"))
    assert {row.stage: row.found is None for row in rows} == {"reward": True, "spectra": False}
    assert any("reward.model=nowhere is not here" in line for line in lines(rows))


def test_the_command_prints_the_stages_and_takes_some():
    ended = plasticity("check", "--config", TINY, "--topology", "cpu:1", "--stages", "gap,spectra", "--json")
    assert ended.returncode == 0
    record = json.loads(ended.stdout)
    assert [row["stage"] for row in record["stages"]] == ["gap", "spectra"]
    assert record["hours"]["device_hours"] > record["device_hours"] > 0
    refused = plasticity("check", "--config", TINY, "--topology", "cpu:1", "--stages", "nothing")
    assert refused.returncode == 2 and "--stages=nothing" in refused.stderr


# --------------------------------------------------------------------------------------------------------------------- members and groups


def test_members_whose_programs_are_equal_are_one_case_and_others_are_compiled_too(cpu):
    swept = load_config(TINY, [*LIGHT, ("grid.fields", "(('finetune.peak_lr', (1e-3, 2e-3)), ('finetune.batch_size', (8, 16)))")])
    found = cases(swept, cpu)
    assert sorted(case.config.finetune.batch_size for case in found) == [8, 16]
    assert len(check_pretraining(found, cpu)) == 1
    rows = check_stages(found, cpu, ("finetune", "gap"))
    assert [(row.stage, row.what) for row in rows] == [
        ("finetune", "training step, 8 x 32"),
        ("finetune", "training step, 16 x 32"),
        ("gap", "loss, 32 x 64"),  # one program for both
    ]


def test_a_changed_member_is_checked_with_its_own_batch(cpu):
    changed = load_config(TINY, [*LIGHT, ("grid.timescales", "(None, 0.2)"), ("grid.changes", "(('^wd0$', {'train.batch_size': 32}),)")])
    answers = check_pretraining(cases(changed, cpu), cpu)
    assert [answer.config.train.batch_size for answer in answers] == [32, 8]  # the one that needs most memory first


ON_EIGHT = """
import json, sys
from pathlib import Path
from plasticity_jax.config import load_config
from plasticity_jax.parallel.deviceless import target
from plasticity_jax.study.check import cases, check_pretraining, check_stages, lines
eight, found = target("cpu:8"), {}
for name, settings in json.loads(sys.argv[2]).items():
    [case] = cases(load_config(Path(sys.argv[1]), settings), eight)
    [step], [row] = check_pretraining([case], eight), check_stages([case], eight, ("finetune",))
    found[name] = {"groups": case.groups, "members": step.members, "state": step.params + step.optimizer, "pretrain": step.total,
                   "finetune": row.found.total, "line": lines([row])[0]}
print(json.dumps(found))
"""


def test_members_that_run_as_one_program_are_compiled_as_one():
    """Four members over eight devices, two for each: a device holds the state of one model."""
    alone = [*LIGHT, VMAPPED[1], ("mesh.data", "2"), ("mesh.fsdp", "4")]
    together = [*LIGHT, *VMAPPED, ("mesh.member", "4"), ("mesh.data", "2")]
    found = json.loads(python(ON_EIGHT, TINY, json.dumps({"together": together, "alone": alone, "unsplit": [*LIGHT, VMAPPED[1]]}), devices=8))
    four, one, whole = found["together"], found["alone"], found["unsplit"]
    assert (four["groups"]["pretrain"], four["groups"]["finetune"], four["groups"]["gap"], four["members"], one["members"]) == (4, 4, 1, 4, 1)
    assert four["state"] == pytest.approx(whole["state"], abs=16) and one["state"] < 0.3 * whole["state"]
    assert "4 members as one program" in four["line"] and "as one program" not in one["line"]
    assert min(four["pretrain"], four["finetune"]) > whole["state"] and four["pretrain"] > one["pretrain"]


def test_members_on_one_device_take_their_states_side_by_side(cpu):
    [four], [one] = (cases(load_config(TINY, [*LIGHT, *settings]), cpu) for settings in (VMAPPED, [VMAPPED[1]]))
    (together,), (alone,) = (check_pretraining([case], cpu) for case in (four, one))
    assert (together.params, together.optimizer) == (4 * alone.params, 4 * alone.optimizer)


# ------------------------------------------------------------------------------------------------------------------- the smallest change


class Counting(Compiler):
    """Stands in for a compiler: the memory of a program is what `size` says of its config."""

    def __init__(self, place, size):
        super().__init__(place)
        self.size, self.asked = size, []

    def __call__(self, program, config, what):
        self.asked.append(what)
        total, limit = self.size(config), self.target.hardware.limit
        return Measured(fits=total <= limit, total=total, limit=limit, largest=[], collectives={}, compile_seconds=0.0)


PARTS = Knob("finetune.grad_accum_steps", (2, 4, 8, 16))
REMAT = Knob("train.remat", ("dots", "full"))


def asked(place, knobs, size, held=0, axis="fsdp", config=CONFIG):
    """(the way out, number of compiles) of a program that does not fit."""
    compiler = Counting(place, size)
    program = Program("", lambda own: None, knobs, held, axis, way_out="shorter rows")
    found = compiler(program, config, "")
    return remedy(program, config, make_mesh(config.mesh, place.devices), found, compiler, "finetune"), len(compiler.asked) - 1


def test_the_fewest_parts_that_fit_are_found_with_few_compiles(cpu):
    place = with_memory(cpu, 30)
    way_out, compiles = asked(place, (PARTS, REMAT), lambda config: 10 + 64 // config.finetune.grad_accum_steps)
    assert way_out == f"finetune.grad_accum_steps=4 fits ({gib(26)})" and compiles <= 4


def test_remat_is_changed_where_no_number_of_parts_is_enough(cpu):
    place = with_memory(cpu, 30)
    rows = {"none": 64, "dots": 16, "full": 4}
    way_out, _ = asked(place, (PARTS, REMAT), lambda config: 28 + rows[config.train.remat] // config.finetune.grad_accum_steps)
    assert way_out == f"train.remat='dots' and finetune.grad_accum_steps=8 fits ({gib(30)})"


@pytest.mark.parametrize("limit", range(3, 40, 3))
def test_the_largest_batch_that_fits_is_found(cpu, limit):
    values = tuple(range(37, 0, -1))
    way_out, compiles = asked(with_memory(cpu, limit), (Knob("reward.batch_size", values),), lambda config: config.reward.batch_size)
    assert way_out == f"reward.batch_size={min(37, limit)} fits ({gib(min(37, limit))})" and compiles <= 8


def test_a_state_that_no_batch_makes_fit_names_the_smallest_mesh_that_holds_it(cpu):
    """The width of the model, 32, is what fsdp divides: of 5 parts, which would do by bytes, the next larger divisor is 8."""
    way_out, compiles = asked(with_memory(cpu, 100), (PARTS, REMAT), lambda config: 600, held=500)
    assert compiles == 0 and way_out == f"parameters and moments take {gib(500)} of it; mesh.fsdp=8, 8 devices, fits by bytes"
    way_out, _ = asked(with_memory(cpu, 60), (PARTS,), lambda config: 50 + 160 // config.finetune.grad_accum_steps, held=40)
    assert way_out == f"finetune.grad_accum_steps=16 fits ({gib(60)})"
    way_out, _ = asked(with_memory(cpu, 50), (PARTS,), lambda config: 50 + 160 // config.finetune.grad_accum_steps, held=40)
    assert (
        way_out
        == f"with finetune.grad_accum_steps=16 it needs {gib(60)}; then parameters take {gib(40)} of it; mesh.fsdp=2, 2 devices, fits by bytes"
    )


def test_where_not_even_a_mesh_helps_the_length_is_named(cpu):
    way_out, _ = asked(with_memory(cpu, 50), (PARTS,), lambda config: 400 + 160 // config.finetune.grad_accum_steps, held=40)
    assert way_out == "shorter rows"


@pytest.mark.parametrize("stage", ["pretrain", "evaluate", "gap"])
def test_what_is_named_fits_and_the_next_larger_does_not(stage, cpu):
    """Of the real programs, with memory for the smallest of them and a little more."""
    [case] = cases(load_config(TINY, [*LIGHT, ("reward.scorer", "log-probability"), ("reward.max_length", "32")]), cpu)
    mesh = make_mesh(case.config.mesh, cpu.devices)
    [program] = stages()[stage].programs(case.config, mesh, 1)
    knob, compiler = program.knobs[0], Compiler(cpu)
    section, _, name = knob.field.partition(".")

    def measured(value):
        own = getattr(case.config, section)
        return compiler(program, dataclasses.replace(case.config, **{section: dataclasses.replace(own, **{name: value})}), "").total

    smallest, whole = measured(knob.values[-1]), measured(getattr(getattr(case.config, section), name))
    assert smallest < whole
    small = with_memory(cpu, (smallest + whole) // 2)
    if stage == "pretrain":
        [line] = remedies(check_pretraining([case], small), small)
    else:
        [row] = check_stages([case], small, (stage,))
        assert not row.fits
        line = lines([row])[-1]
    assert line.startswith(f"{stage} needs {gib(whole)} of {gib(small.hardware.limit)}: {knob.field}=")
    value = int(line.partition(f"{knob.field}=")[2].split()[0])
    place = knob.values.index(value)
    before = getattr(getattr(case.config, section), name) if place == 0 else knob.values[place - 1]
    assert measured(value) <= small.hardware.limit < measured(before)


def test_equal_programs_are_compiled_once(cpu, monkeypatch):
    compiled = []
    program = Program("", lambda own: SimpleNamespace(as_text=lambda: "equal", compile=lambda: compiled.append(1) or real))
    real = jax.jit(jnp.sum).lower(jax.ShapeDtypeStruct((8,), jnp.float32)).compile()
    compiler = Compiler(cpu)
    assert compiler(program, CONFIG, "") is compiler(program, CONFIG, "") and len(compiled) == 1
