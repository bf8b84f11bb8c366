from dataclasses import replace
from pathlib import Path

import pytest

from plasticity_jax.config import load_config
from plasticity_jax.errors import UserError
from plasticity_jax.records import STAGES
from plasticity_jax.study.graph import build_graph, finetune_run, gap_run, read_study, save_study, study_files, study_status

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.py"


def graph(*overrides):
    return build_graph(load_config(CONFIG, [("train.compute_dtype", "float32"), *overrides]))


def changed(before, after):
    """Names of the stages some of whose runs have another hash."""
    old = {run.id for run in before}
    return {run.stage for run in after if run.id not in old}


def test_parents_come_before_children_and_ids_are_unique():
    runs = graph(("grid.seeds", "(0,1)"), ("finetune.seeds", "(0,5)"))
    seen = set()
    for run in runs:
        assert set(run.parents.values()) <= seen
        assert run.id not in seen
        seen.add(run.id)
    assert {run.stage for run in runs} == set(STAGES)


def test_every_member_is_scored_before_and_after_on_every_task():
    rows = {(run.member, run.task, run.fields["when"]) for run in graph() if run.stage == "evaluate"}
    assert len({member for member, _, _ in rows}) == 2
    assert len(rows) == 2 * 2 * 2


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        (("spectra.mass", "0.9"), {"spectra"}),
        (("evaluate.n_samples", "3"), {"evaluate"}),
        (("finetune.peak_lr", "0.5"), {"finetune", "evaluate"}),
        (("tasks.topic.train_rows", "64"), {"prepare", "finetune", "evaluate"}),
        (("train.steps", "41"), {"pretrain", "evaluate", "finetune", "probe", "spectra", "gap"}),
        (("model.d_ff", "96"), {"init", "pretrain", "evaluate", "finetune", "probe", "spectra", "gap"}),
        (("mesh.fsdp", "1"), set()),
        (("train.checkpoint_every", "7"), set()),
        (("evaluate.batch_size", "32"), set()),
    ],
)
def test_a_change_makes_stale_what_depends_on_it_and_no_more(override, stages):
    assert changed(graph(), graph(override)) == stages


def test_members_of_a_seed_share_start_and_corpus():
    bases = [run for run in graph(("grid.seeds", "(0,1)")) if run.stage == "pretrain"]
    for seed in (0, 1):
        assert len({tuple(run.parents.items()) for run in bases if run.seed == seed}) == 1
    assert len({run.parents["init"] for run in bases}) == 2


def test_names_do_not_matter_for_what_a_task_needs():
    config = load_config(CONFIG)
    base = next(run for run in build_graph(config) if run.stage == "pretrain")
    with pytest.raises(UserError, match="did you mean.*topic|topic"):
        finetune_run(config, base, "topci", 0)
    with pytest.raises(UserError, match="no settings in this config"):
        finetune_run(replace(config, tasks={}), base, "topic", 0)


def test_gap_of_a_tuned_model_is_refused():
    config = load_config(CONFIG)
    tuned = next(run for run in build_graph(config) if run.stage == "finetune")
    with pytest.raises(UserError, match="--only"):
        gap_run(config, tuned)


def test_status_names_missing_and_stale_runs(tmp_path):
    config = load_config(CONFIG)
    runs = build_graph(config)
    save_study(tmp_path, config, runs)
    assert [run.to_dict()["id"] for run in read_study(study_files(tmp_path)[0])[1]] == [run.id for run in runs]
    assert {row["state"] for row in study_status(tmp_path)} == {"missing"}
    from plasticity_jax.records import RunDirectory

    first = RunDirectory(tmp_path / config.name / runs[0].id)
    with first.work(runs[0], config):
        first.finish({})
    save_study(tmp_path, config, runs[1:])
    states = {row["id"]: row["state"] for row in study_status(tmp_path)}
    assert states[runs[0].id] == "stale"
    assert len(states) == len(runs)


def test_a_folder_without_a_study_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no study"):
        study_files(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        study_files(tmp_path / "x")
