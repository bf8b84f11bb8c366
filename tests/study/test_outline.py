"""What a study says it will do: the table against numbers computed by hand."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import TINY

from plasticity_jax.config import load_config
from plasticity_jax.errors import UserError
from plasticity_jax.parallel import hardware
from plasticity_jax.progress import duration
from plasticity_jax.runs.directory import DONE, RunDirectory
from plasticity_jax.runs.jsonfiles import read_json, write_json
from plasticity_jax.stages import Work, stages
from plasticity_jax.study import outline as outlining
from plasticity_jax.study.graph import build_graph, study_dir
from plasticity_jax.study.outline import member_lines, outline, outline_lines, scaled
from plasticity_jax.text import three_digits

# Two models without tasks and probes, d_model 32, d_ff 64, 2 layers, vocabulary 512, 4 heads of 8, 2 of keys and values.
MATRICES = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) + 32 * 512
PER_TOKEN = 6 * MATRICES + 12 * 2 * 4 * 8 * 64  # FLOPs of training at 64 tokens
PRETRAIN, GAP = 40 * 8 * 64 * PER_TOKEN, 2 * 2048 * PER_TOKEN // 3
SPECTRA = 2 * (2 * 6 * (2 * 32 * 8**2 - 2 * 8**3 / 3) + 2 * 4 * (2 * 8**3 + 8 * 8**3 / 3))
BYTES = 4 * (MATRICES + 32 * 512 + (2 * 2 + 1) * 32)  # with the input embedding and the norms

SMALL = [("train.compute_dtype", "float32"), ("tasks", "{}"), ("probe.sets", "()")]
CONFIG = load_config(TINY, SMALL)


def finish(config, workdir, *chosen):
    """Finishes runs, without work."""
    for run in chosen:
        with RunDirectory(study_dir(workdir, config) / run.id).work(run, config) as directory:
            directory.finish({})


def test_the_table_is_the_one_computed_by_hand(tmp_path):
    assert (f"{2 * PRETRAIN:.1e}", f"{2 * GAP:.1e}", f"{2 * SPECTRA:.1e}", BYTES) == ("1.1e+10", "7.0e+08", "2.6e+05", 205_440)
    lines = outline_lines(outline(CONFIG, tmp_path, build_graph(CONFIG)))
    assert lines == [
        "tiny: 8 runs to do, 0 done",
        "  stage     to do  done  tokens  model FLOPs  checkpoints",
        "  init          1     0                            205 kB",
        "  prepare       1     0",
        "  pretrain      2     0     41k       1.1e10       411 kB",
        "  gap           2     0   8.19k        7.0e8",
        "  spectra       2     0                2.6e5",
        "  total         8     0   49.2k       1.1e10       616 kB",
        "  not counted: init, prepare: no declared work",
        "  no hours: the peak of cpu is not known; a study tells its time left once runs have finished",
    ]
    assert not list(tmp_path.iterdir())


def test_what_is_done_is_not_counted_again(tmp_path):
    runs = build_graph(CONFIG)
    first = next(run for run in runs if run.stage == "pretrain")
    finish(CONFIG, tmp_path, *(run for run in runs if run.stage in ("init", "prepare")), first)
    found = outline(CONFIG, tmp_path, runs)
    (row,) = [row for row in found.stages if row.stage == "pretrain"]
    assert (row.runs, row.done, row.tokens, row.flops, row.checkpoints) == (1, 1, 40 * 8 * 64, PRETRAIN, BYTES)
    lines = outline_lines(found)
    assert "  init          0     1" in lines and not any("not counted" in line for line in lines)
    everything = outline_lines(outline(CONFIG, tmp_path / "other", runs[:1]))
    assert everything[0] == "tiny: 1 runs to do, 0 done"


def test_records_that_what_is_left_descends_from_are_to_be_made_anew(tmp_path):
    """Without its data a record of the corpus tells no rows either."""
    config = load_config(TINY, [("train.compute_dtype", "float32")])
    runs = build_graph(config)
    left = next(run for run in runs if run.stage == "finetune")
    finish(config, tmp_path, *(run for run in runs if run is not left))
    for run in runs:
        if run is not left:
            done = study_dir(tmp_path, config) / run.id / DONE
            write_json(done, read_json(done) | {"record": True})
    rows = {row.stage: row for row in outline(config, tmp_path, runs).stages}
    assert {stage: row.runs for stage, row in rows.items() if row.runs} == {"init": 1, "prepare": 2, "pretrain": 1, "finetune": 1}
    assert rows["finetune"].tokens == 128 * 192 and rows["finetune"].bounded and not rows["finetune"].problem


def test_hours_are_those_of_a_machine_whose_peak_is_known(tmp_path, monkeypatch):
    known = hardware.Hardware("toy", "cpu", PRETRAIN / 3600, 1e30, 2**30, 0, 1)  # on which one pretraining takes an hour at its peak
    monkeypatch.setattr(hardware, "of_kind", lambda kind: known)
    found = outline(CONFIG, tmp_path, build_graph(CONFIG))
    mfu = CONFIG.launch.mfu
    assert {row.stage: row.hours for row in found.stages} == {
        "init": None,
        "prepare": None,
        "pretrain": pytest.approx(2 / mfu),
        "gap": pytest.approx(2 * GAP / PRETRAIN / mfu),
        "spectra": pytest.approx(2 * SPECTRA / PRETRAIN / mfu),
    }
    lines = outline_lines(found)
    assert lines[1].endswith("  hours") and lines[4] == "  pretrain      2     0     41k       1.1e10       411 kB       5"
    assert not any("no hours" in line for line in lines)


def test_bounds_are_marked_and_moments_count_where_they_are_kept(tmp_path):
    config = load_config(TINY, [("train.compute_dtype", "float32"), ("train.keep_optimizer", "True"), ("train.keep_steps", "(1, 40)")])
    found = outline(config, tmp_path, build_graph(config))
    rows = {row.stage: row for row in found.stages}
    assert rows["finetune"].bounded and not rows["pretrain"].bounded
    assert rows["finetune"].tokens == 4 * 128 * 192, "four fine-tunings on 128 rows of the longest bucket"
    assert rows["evaluate"].tokens == 8 * 21 * 192 + 4 * 21 * 3 * (24 + 8), "batches of 21 prompts of 192 tokens, three completions each"
    assert (rows["init"].checkpoints, rows["pretrain"].checkpoints, rows["finetune"].checkpoints) == (BYTES, 2 * 2 * 3 * BYTES, 4 * 3 * BYTES)
    lines = outline_lines(found)
    (line,) = [line for line in lines if line.startswith("  finetune")]
    assert "≤ 98.3k" in line and any(line.startswith("  ≤ at most: rows and their lengths") for line in lines)


@pytest.mark.parametrize(("error", "said"), [(UserError("no folder; put it there."), "no folder; put it there."), (KeyError("x"), "KeyError: 'x'")])
def test_work_that_cannot_be_told_is_a_note_and_stops_nothing(tmp_path, monkeypatch, error, said):
    def work(ahead):
        yield Work(flops=1.0)
        raise error

    changed = {name: dataclasses.replace(stage, work=work) if name == "gap" else stage for name, stage in stages().items()}
    monkeypatch.setattr(outlining, "stages", lambda: changed)
    found = outline(CONFIG, tmp_path, build_graph(CONFIG))
    (row,) = [row for row in found.stages if row.stage == "gap"]
    assert set(row.work.values()) == {None} and row.tokens == 0
    assert f"  not counted: gap: {said}" in outline_lines(found)


def test_no_own_stage_fails_to_tell_its_work(tmp_path):
    changed = [("train.compute_dtype", "float32"), ("reward.scorer", "log-probability"), ("forgetting.held_out_loss", "True")]
    config = load_config(TINY, changed)
    assert {row.problem for row in outline(config, tmp_path, build_graph(config)).stages} == {"", "no declared work"}


def test_a_config_for_other_devices_has_an_outline_too(tmp_path):
    config = load_config(TINY, [*SMALL, ("mesh.fsdp", "16"), ("launch.parallel_runs", "3")])
    rows = {row.stage: row for row in outline(config, tmp_path, build_graph(config)).stages}
    assert rows["pretrain"].flops == 2 * PRETRAIN and not rows["pretrain"].problem


def test_members_that_decay_alike_share_a_line():
    fields = [("grid.seeds", "(0, 1, 2)"), ("grid.fields", "(('finetune.peak_lr', (1e-3, 2e-3)),)"), ("grid.timescales", "(None, 2000.0)")]
    config = load_config(TINY, [("train.compute_dtype", "float32"), *fields])
    swept = "finetune.peak_lr = 0.001, 0.002, seeds 0, 1, 2"
    assert member_lines(config) == [
        f"6 members: λ = 0, peak lr·λ = 0, no decay, {swept}",
        f"6 members: λ = 0.0025, peak lr·λ = 1.25e-05, timescale 2,000 of the run, {swept}",
    ]
    assert (
        member_lines(load_config(TINY, [*SMALL, ("grid.seeds", "(0, 1)")]))[0]
        == "2 members, wd0 … wd0-s1: λ = 0, peak lr·λ = 0, no decay, seeds 0, 1"
    )
    assert member_lines(CONFIG) == ["wd0: λ = 0, peak lr·λ = 0, no decay", "wd25: λ = 25, peak lr·λ = 0.125, timescale 0.2 of the run"]


@given(st.floats(min_value=0, max_value=1e15))
def test_numbers_have_three_digits_and_no_exponent(value):
    text = three_digits(value)
    assert "e" not in text and "inf" not in text
    if value >= 0.001:
        assert float(text.replace(",", "")) == pytest.approx(value, rel=0.0051)
    assert "e" not in duration(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (999.6, "1k"),
        (1220, "1.22k"),
        (999_499, "999k"),
        (999_500, "1M"),
        (2e9, "2B"),
        (1.3e13, "13T"),
        (2e16, "20,000T"),
    ],
)
def test_numbers_have_the_unit_that_suits_them(value, text):
    assert scaled(value, ("", "k", "M", "B", "T")) == text


def test_the_docs_show_the_table_of_the_default_study(tmp_path):
    root = TINY.parents[1]
    config = load_config(root / "configs" / "default.py", [("train.compute_dtype", "float32")])
    table = outline_lines(outline(config, tmp_path, build_graph(config)))
    assert "```\n" + "\n".join(table[: table.index(next(line for line in table if "≤ at most" in line)) + 1]) + "\n```" in (
        root / "docs" / "commands.md"
    ).read_text(encoding="utf-8")
