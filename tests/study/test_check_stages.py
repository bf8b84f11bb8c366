"""`plasticity check` of the stages after pretraining: every program is compiled, and one that does not fit says what to change."""

import dataclasses
import json

import pytest
from running import TINY, plasticity

from plasticity_jax.config import load_config
from plasticity_jax.parallel.deviceless import target
from plasticity_jax.stages import stages
from plasticity_jax.study.check import check_stages, lines
from plasticity_jax.train.check import check

CONFIG = load_config(
    TINY,
    [("reward.scorer", "verifier"), ("reward.max_length", "128"), *[(f"tasks.{task}.verifier_rows", "20") for task in load_config(TINY, []).tasks]],
)


@pytest.fixture(scope="module")
def cpu():
    return target("cpu:1")


@pytest.fixture(scope="module")
def answer(cpu):
    return check(CONFIG, cpu)


def test_every_stage_that_runs_a_model_has_its_program_compiled(cpu, answer):
    rows = check_stages(answer, cpu, tuple(stages()))
    assert {row.stage for row in rows} == {"finetune", "evaluate", "verifier", "reward", "probe", "spectra", "gap"}
    assert all(row.fits and row.found and 0 < row.found.total < row.found.limit for row in rows)
    assert not [line for line in lines(rows) if "does not fit" in line]
    assert [row.stage for row in check_stages(answer, cpu, ("gap",))] == ["gap"]


def test_what_does_not_fit_names_its_stage_its_size_and_a_way_out(cpu, answer):
    small = dataclasses.replace(cpu, hardware=dataclasses.replace(cpu.hardware, memory=100_000, reserve=0))
    [row] = check_stages(answer, small, ("finetune",))
    assert not row.fits and row.found is not None and row.found.total > 100_000
    assert "does not fit" in lines([row])[0]
    assert lines([row])[-1].startswith("finetune needs ") and "raise finetune.grad_accum_steps" in lines([row])[-1]


def test_a_reward_model_that_is_not_here_is_said_and_the_rest_is_checked(cpu, answer):
    reward = dataclasses.replace(CONFIG.reward, scorer="sequence-classification", model="nowhere")
    asked = dataclasses.replace(answer, config=dataclasses.replace(answer.config, reward=reward))
    rows = check_stages(asked, cpu, ("reward", "spectra"))
    assert {row.stage: row.found is None for row in rows} == {"reward": True, "spectra": False}
    assert any("reward.model=nowhere is not here" in line for line in lines(rows))


def test_the_command_prints_the_stages_and_takes_some():
    ended = plasticity("check", "--config", TINY, "--topology", "cpu:1", "--stages", "gap,spectra", "--json")
    assert ended.returncode == 0
    assert [row["stage"] for row in json.loads(ended.stdout)["stages"]] == ["gap", "spectra"]
    refused = plasticity("check", "--config", TINY, "--topology", "cpu:1", "--stages", "nothing")
    assert refused.returncode == 2 and "--stages=nothing" in refused.stderr
