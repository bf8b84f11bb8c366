"""What `plasticity status` says of a run that is being worked on."""

from dataclasses import replace

from plasticity_jax.config import StudyConfig, TrainConfig
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.runs.jsonfiles import to_json
from plasticity_jax.runs.logs import METRICS
from plasticity_jax.runs.run import Run
from plasticity_jax.study.graph import save_study
from plasticity_jax.study.status import study_status


def test_a_running_pretraining_says_its_step_and_the_time_that_is_left(tmp_path):
    config = replace(StudyConfig(), train=TrainConfig(steps=100))
    run = Run(config.name, "pretrain", "wd0", {}, {}, version=1, member="wd0")
    save_study(tmp_path, config, [run])
    directory = RunDirectory(tmp_path / config.name / run.id)
    with directory.work(run, config):
        assert [(row["state"], row["reason"]) for row in study_status(tmp_path)] == [("running", "")]
        (directory.path / METRICS).write_text(to_json({"step": 25, "seconds": 50.0}) + "\n")
        assert study_status(tmp_path)[0]["reason"] == "step 25 of 100, 2 min 30 s left"
        directory.write_provenance(environments=[{"members_in_one_program": 4}])  # which share the seconds of their program
        assert study_status(tmp_path)[0]["reason"] == "step 25 of 100, 10 min 0 s left"
    assert study_status(tmp_path)[0]["state"] == "missing"
