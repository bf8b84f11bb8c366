from dataclasses import replace
from pathlib import Path

import pytest

from plasticity_jax.config import load_config
from plasticity_jax.errors import UserError
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.runs.run import Run
from plasticity_jax.stages import stages
from plasticity_jax.stages.finetune import finetune_run
from plasticity_jax.study.graph import build_graph, read_study, run_configs, save_study, study_files
from plasticity_jax.study.status import study_status

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
    assert {run.stage for run in runs} == set(stages()) - {"samples", "verifier", "reward", "zero_shot", "forgetting", "import", "held_out"}


def test_every_member_is_scored_before_and_after_on_every_task():
    rows = {(run.member, run.task, run.fields["when"]) for run in graph() if run.stage == "evaluate"}
    assert len({member for member, _, _ in rows}) == 2
    assert len(rows) == 2 * 2 * 2


@pytest.mark.parametrize(
    ("override", "stale"),
    [
        (("spectra.mass", "0.9"), {"spectra"}),
        (("evaluate.n_samples", "3"), {"evaluate"}),
        (("evaluate.repetition_penalty", "1.1"), {"evaluate", "validation"}),
        (("tasks.addition2.validation_rows", "9"), {"prepare", "finetune", "evaluate", "validation", "spectra"}),
        (("finetune.peak_lr", "0.5"), {"finetune", "evaluate", "validation", "spectra"}),
        (("tasks.topic.train_rows", "64"), {"prepare", "finetune", "evaluate", "spectra"}),
        (("train.steps", "41"), {"pretrain", "evaluate", "validation", "finetune", "probe", "spectra", "gap"}),
        (("data.isolate_documents", "True"), {"pretrain", "evaluate", "validation", "finetune", "probe", "spectra", "gap"}),
        (("train.attention", "xla"), set()),
        (("train.remat", "full"), set()),
        (("model.d_ff", "96"), {"init", "pretrain", "evaluate", "validation", "finetune", "probe", "spectra", "gap"}),
        (("mesh.fsdp", "1"), set()),
        (("train.checkpoint_every", "7"), set()),
        (("evaluate.batch_size", "32"), set()),
    ],
)
def test_a_change_makes_stale_what_depends_on_it_and_no_more(override, stale):
    assert changed(graph(), graph(override)) == stale


def test_in_bfloat16_the_batch_size_is_part_of_what_was_evaluated():
    """There it decides how products are rounded, and with it some greedy completions."""
    narrow, sets = ("train.compute_dtype", "bfloat16"), ("zero_shot.sets", "('piqa',)")
    before, after = graph(narrow, sets), graph(narrow, sets, ("evaluate.batch_size", "32"), ("zero_shot.batch_size", "16"))
    assert changed(before, after) == {"evaluate", "validation", "zero_shot"}
    verified = [
        narrow,
        ("verifier.n_samples", "2"),
        *((f"tasks.{task}.verifier_rows", "8") for task in ("addition2", "topic")),
        ("reward.scorer", "verifier"),
    ]
    assert "samples" in changed(graph(*verified), graph(*verified, ("evaluate.batch_size", "32")))


def test_members_of_a_seed_share_start_and_corpus():
    bases = [run for run in graph(("grid.seeds", "(0,1)")) if run.stage == "pretrain"]
    for seed in (0, 1):
        assert len({tuple(run.parents.items()) for run in bases if run.seed == seed}) == 1
    assert len({run.parents["init"] for run in bases}) == 2


def pretrained(*overrides):
    return {run.name: run for run in graph(*overrides) if run.stage == "pretrain"}


def swept(*fields):
    return "grid.fields", repr(fields)


def test_a_members_hash_does_not_depend_on_the_others():
    alone = pretrained(("grid.weight_decay", "(0.1,)"))["wd0.1"]
    among = pretrained(("grid.weight_decay", "(0.0,0.1,1.0)"), ("grid.seeds", "(0,1)"))["wd0.1"]
    assert among.id == alone.id
    # A swept field at the value that the config has anyway is the same run under another name.
    rates = pretrained(("grid.weight_decay", "(0.1,)"), swept(("train.peak_lr", (5e-3, 1e-3))))
    assert rates["wd0.1-peak_lr0.005"].hash == alone.hash != rates["wd0.1-peak_lr0.001"].hash
    assert pretrained(("grid.weight_decay", "(0.0,0.1)"), ("grid.changes", "(('wd0$',{'train.steps':9}),)"))["wd0.1"].id == alone.id


@pytest.mark.parametrize(
    ("field", "values", "parents"),
    [
        ("train.peak_lr", (1e-3, 2e-3), {"corpus": 1, "init": 1}),
        ("train.steps", (10, 20), {"corpus": 1, "init": 1}),
        ("decay.kind", ("coupled", "independent"), {"corpus": 1, "init": 1}),
        ("model.d_model", (32, 64), {"corpus": 1, "init": 2}),
        ("model.init", ("scaled", "truncated"), {"corpus": 1, "init": 2}),
        ("train.seq_len", (32, 64), {"corpus": 2, "init": 1}),
        ("model.vocab_size", (300, 512), {"corpus": 2, "init": 2}),
    ],
)
def test_members_share_what_the_swept_field_does_not_define(field, values, parents):
    runs = graph(swept((field, values)))
    bases = [run for run in runs if run.stage == "pretrain"]
    assert len({run.id for run in bases}) == 4
    assert {role: len({run.parents[role] for run in bases}) for role in parents} == parents
    assert {stage: sum(run.stage == stage for run in runs) for stage in ("init", "evaluate", "gap")} == {
        "init": parents["init"],
        "evaluate": 16,
        "gap": 4,
    }


def test_a_swept_field_reaches_the_tasks_that_it_defines():
    runs = graph(swept(("data.held_out_fraction", (0.1, 0.2))))
    assert sum(run.name == "task-topic" for run in runs) == 2
    for run in runs:
        if run.stage == "finetune":
            task, base = (next(r for r in runs if r.id == run.parents[role]) for role in ("task", "base"))
            corpus = next(r for r in runs if r.id == base.parents["corpus"])
            assert task.fields["held_out_fraction"] == corpus.fields["held_out_fraction"]


def test_every_run_is_carried_out_with_its_members_config():
    config = load_config(CONFIG, [swept(("train.seq_len", (32, 64)), ("model.d_model", (32, 64))), ("grid.changes", "(('wd0-',{'train.steps':9}),)")])
    runs = build_graph(config)
    for run_id, own in run_configs(config, runs).items():
        run = next(run for run in runs if run.id == run_id)
        fields = run.fields
        if run.stage == "init":
            assert own.model.d_model == fields["model"]["d_model"]
        elif run.name == "corpus":
            assert own.train.seq_len == fields["seq_len"]
        elif run.member:
            assert f"-seq_len{own.train.seq_len}-d_model{own.model.d_model}" in run.member
            assert own.train.steps == (9 if run.member.startswith("wd0-") else config.train.steps)
            assert run.stage != "pretrain" or fields["train"]["seq_len"] == own.train.seq_len


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
        stages()["gap"].on_model(config, tuned)


def test_status_gives_imported_models_and_what_was_made_from_them_their_own_state(tmp_path):
    config = load_config(CONFIG)
    save_study(tmp_path, config, build_graph(config))
    folder = tmp_path / config.name
    imported = Run(config.name, "import", "llama", {"files": {}})
    tuned = Run(config.name, "finetune", "llama-topic", {}, {"base": imported.id})
    scored = Run(config.name, "evaluate", "llama-topic-after", {}, {"model": tuned.id})
    for run in (imported, tuned):
        with RunDirectory(folder / run.id).work(run, config) as directory:
            directory.finish({})
    with pytest.raises(RuntimeError), RunDirectory(folder / scored.id).work(scored, config):
        raise RuntimeError("no such luck")
    states = {row["id"]: row["state"] for row in study_status(tmp_path)}
    assert (states[imported.id], states[tuned.id], states[scored.id]) == ("done", "done", "failed")


def test_status_names_missing_and_stale_runs(tmp_path):
    config = load_config(CONFIG)
    runs = build_graph(config)
    save_study(tmp_path, config, runs)
    assert [run.to_dict()["id"] for run in read_study(study_files(tmp_path)[0])[1]] == [run.id for run in runs]
    assert {row["state"] for row in study_status(tmp_path)} == {"missing"}
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


# ------------------------------------------------------------------------------------------- fine-tuning sweeps, verifiers, rewards, forgetting

SWEPT = ("grid.fields", "(('finetune.peak_lr',(1e-3,3e-3)),('finetune.weight_decay',(0.0,0.1)))")


def of_stage(runs, stage):
    return [run for run in runs if run.stage == stage]


def test_members_that_differ_in_their_fine_tuning_share_their_pretraining():
    plain, swept = graph(), graph(SWEPT)
    for stage in ("prepare", "init", "pretrain", "probe", "spectra", "gap"):
        of_bases = [{run.id for run in of_stage(runs, stage) if stage != "spectra" or not run.task} for runs in (swept, plain)]
        assert of_bases[0] == of_bases[1]
    before = {run.id for run in of_stage(plain, "evaluate") if run.fields["when"] == "before"}
    assert before <= {run.id for run in of_stage(swept, "evaluate")}
    tuned = of_stage(swept, "finetune")
    assert len(tuned) == 2 * 2 * 4 and len({run.id for run in tuned}) == len(tuned)
    assert {(run.fields["peak_lr"], run.fields["weight_decay"]) for run in tuned} == {(lr, wd) for lr in (1e-3, 3e-3) for wd in (0.0, 0.1)}
    assert any("sft_peak_lr0.003-sft_weight_decay0.1-topic" in run.name for run in tuned)
    assert len({run.parents["base"] for run in tuned}) == 2


def test_a_fine_tuning_that_is_swept_is_carried_out_with_its_own_recipe():
    config = load_config(CONFIG, [("train.compute_dtype", "float32"), SWEPT])
    runs = build_graph(config)
    configs = run_configs(config, runs)
    for run in of_stage(runs, "finetune"):
        assert configs[run.id].finetune.peak_lr == run.fields["peak_lr"]
        assert configs[run.id].finetune.weight_decay == run.fields["weight_decay"]


VERIFIER = (("reward.scorer", "verifier"), ("tasks.addition2.verifier_rows", "32"), ("tasks.topic.verifier_rows", "32"))


def test_one_verifier_per_task_learns_from_every_members_samples_and_rates_every_tuned_model():
    runs = graph(*VERIFIER, ("finetune.seeds", "(0,5)"))
    verifiers = {run.task: run for run in of_stage(runs, "verifier")}
    assert set(verifiers) == {"addition2", "topic"}
    for task, verifier in verifiers.items():
        read = {parent for role, parent in verifier.parents.items() if role.startswith("samples-")}
        assert read == {run.id for run in of_stage(runs, "samples") if run.task == task} and len(read) == 2
    rated = {run.parents["completions"] for run in of_stage(runs, "reward")}
    assert rated == {run.id for run in of_stage(runs, "evaluate") if run.fields["when"] == "after"}
    assert all(run.parents["scorer"] == verifiers[run.task].id for run in of_stage(runs, "reward"))
    assert {run.fields["split"] for run in of_stage(runs, "samples")} == {"verifier"}
    position = {run.id: i for i, run in enumerate(runs)}
    assert all(position[parent] < position[run.id] for run in runs for parent in run.parents.values())


def test_a_log_probability_is_that_of_the_model_that_wrote_unless_another_is_named(tmp_path):
    for run in of_stage(graph(("reward.scorer", "log-probability")), "reward"):
        assert run.parents["scorer"].startswith("finetune/")
    folders = []
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"x" * (1 + (name == "c")))
        folders.append({run.id for run in of_stage(graph(("reward.scorer", "log-probability"), ("reward.model", str(tmp_path / name))), "reward")})
    assert not any(
        "scorer" in run.parents for run in graph(("reward.scorer", "log-probability"), ("reward.model", "nowhere")) if run.stage == "reward"
    )
    assert len(folders[0]) == 4 and folders[0] != folders[2]


def test_held_out_text_is_scored_after_every_fine_tuning():
    runs = graph(("forgetting.held_out_loss", "True"))
    corpus, tuned = [run.id for run in runs if run.name == "corpus"], {run.id for run in of_stage(runs, "finetune")}
    assert {run.parents["model"] for run in of_stage(runs, "forgetting")} == tuned
    assert [run.parents["corpus"] for run in of_stage(runs, "forgetting")] == corpus * len(tuned)


def test_the_zero_shot_suite_is_run_before_and_after_every_fine_tuning():
    runs = of_stage(graph(("zero_shot.sets", "('piqa','hellaswag')")), "zero_shot")
    assert [run.fields["when"] for run in runs].count("before") == 2 and [run.fields["when"] for run in runs].count("after") == 4
    assert {run.task for run in runs} == {None, "addition2", "topic"}
