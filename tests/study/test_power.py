"""`plasticity power`: its numbers against a simulation of studies, and what it says of a config."""

import json
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from plasticity_jax import cli
from plasticity_jax.config import GridConfig, StudyConfig, TaskConfig
from plasticity_jax.config.recipes import ALL_ROWS
from plasticity_jax.errors import UserError
from plasticity_jax.study.power import power_lines, study_power


def config_of(seeds, rows=(300, 300)):
    return StudyConfig(grid=GridConfig(seeds=tuple(range(seeds))), tasks={f"task{i}": TaskConfig(test_rows=count) for i, count in enumerate(rows)})


@pytest.mark.parametrize("seeds", [3, 6])
def test_power_is_that_of_simulated_studies(seeds):
    """Two models per seed, each off by the seed deviation; a problem's difference is −1, 0 or 1 with the variance that is stated."""
    found, rng, studies = study_power(config_of(seeds), 0.02), np.random.default_rng(0), 3000
    either = 2 * 0.7 * 0.3 * 0.5 / 2
    problems = rng.choice([-1, 0, 1], p=[either, 1 - 2 * either, either], size=(studies, seeds, 600)).mean(axis=2)
    noise = rng.normal(scale=0.02, size=(2, studies, seeds))
    for row in found["differences"]:
        differences = row["difference"] + noise[0] - noise[1] + problems
        test = scipy.stats.ttest_1samp(differences, 0.0, axis=1)
        assert row["power"] == pytest.approx(np.mean((test.pvalue <= 0.05) & (differences.mean(axis=1) > 0)), abs=0.03)
    assert found["problem_deviation"] == pytest.approx(np.std(problems), rel=0.05) and found["problems"] == 600


def test_more_seeds_and_less_noise_see_smaller_differences():
    three, ten = study_power(config_of(3), 0.02), study_power(config_of(10), 0.02)
    assert (
        ten["smallest_difference"] < three["smallest_difference"]
        and study_power(config_of(3), 0.001)["smallest_difference"] < three["smallest_difference"]
    )
    assert [row["seeds_needed"] for row in three["differences"]] == [row["seeds_needed"] for row in ten["differences"]]


def test_one_seed_sees_nothing_and_is_told_so():
    found = study_power(config_of(1))
    assert found["smallest_difference"] is None and {row["power"] for row in found["differences"]} == {0.0}
    assert "one pretraining run: no verdict, whatever the difference; set grid.seeds to two or more" in power_lines(found)


def test_rows_that_only_the_files_know_are_assumed_and_named():
    found = study_power(config_of(3, (300, ALL_ROWS)))
    assert found["problems"] == 1300 and "1,000 assumed of each of task1" in power_lines(found)[0]


def test_impossible_input_is_refused():
    with pytest.raises(UserError, match="--seed-deviation=-1 must be 0 or more"):
        study_power(config_of(3), -1)
    with pytest.raises(UserError, match="give the config a task"):
        study_power(replace(config_of(3), tasks={}))


def test_the_command_prints_words_or_json(capsys):
    flags = ["power", "--config", "configs/default.py", "--config.grid.seeds=(0,1,2)", "--seed-deviation", "0.01"]
    assert cli.main(flags) == 0
    words = capsys.readouterr().out
    assert "3 pretraining seeds, 1,025 problems" in words and "a difference of 0.05: power" in words
    assert cli.main([*flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seed_deviation"] == 0.01
