"""Studies side by side: the best λ are those that were planted, what cannot be compared is said, and optima that move are seen to move."""

import base64
import csv
import hashlib
import json
import re
import shutil
import uuid
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from running import plasticity
from simulated_study import FLAT, MOVES, Truth, simulated
from synthetic_study import Planted, write_study
from test_report import Page

import plasticity_jax as pj
from plasticity_jax.config import FinetuneConfig, GridConfig, TaskConfig
from plasticity_jax.errors import UserError
from plasticity_jax.report.optima import LARGER, NOT_LARGER, Budget, by_loss, by_score, cuts, larger, moves, optima_move
from plasticity_jax.report.verdicts import CANNOT_TELL, CONTRADICTS, ONE_RUN, SUPPORTS, some_lead
from plasticity_jax.runs.storage import location
from plasticity_jax.study.compare import comparison

pytestmark = pytest.mark.slow

DECAYS = (0.0, 0.1, 0.5, 2.0)
QUIET = {"seeds": 5, "seed_noise": 0.004, "rounding_noise": 0.004, "problem_noise": 0.1}


def grid(seeds=(0,), decays=DECAYS, **more):
    return GridConfig(weight_decay=decays, timescales=None, seeds=seeds, **more)


def budgets(fewer: Truth, more: Truth, seed: int = 0) -> tuple[Budget, Budget]:
    return Budget("short", simulated(fewer, seed), 20.0), Budget("long", simulated(more, seed + 500), 140.0)


# ---------------------------------------------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize("seed", range(3))
def test_optima_that_move_by_one_weight_decay_are_seen_to_move(seed):
    fewer, more = (replace(truth, **QUIET) for truth in MOVES["both optima move down by one λ"])
    short, long = budgets(fewer, more, seed)
    down, up = optima_move(short, long, ("one", "two")), optima_move(*budgets(more, fewer, seed), ("one", "two"))
    assert (down.verdict, up.verdict) == (SUPPORTS, CONTRADICTS), (down.evidence, up.evidence)
    assert "Loss: best at λ=0.75 (5 of 5 seeds) with 20 tokens per parameter, best at λ=0.15 (5 of 5 seeds) with 140" in down.evidence
    assert down.seeds == 5 and down.p is not None and down.p < 0.05
    assert optima_move(*budgets(fewer, fewer, seed), ("one", "two")).verdict == CANNOT_TELL


def test_one_optimum_that_moves_up_is_enough_to_contradict_and_one_that_moves_down_too_few_to_support():
    fewer, more = (replace(truth, **QUIET) for truth in MOVES["both optima move down by one λ"])
    assert optima_move(*budgets(fewer, replace(more, after=fewer.after)), ("one", "two")).verdict == CANNOT_TELL
    assert optima_move(*budgets(replace(more, after=fewer.after), replace(fewer, after=more.after)), ("one", "two")).verdict == CONTRADICTS


@pytest.mark.parametrize("seeds", [(1, 5), (5, 1)])
def test_one_run_at_either_budget_gives_no_verdict_on_tokens(seeds):
    truths = [replace(truth, **(QUIET | {"seeds": n})) for truth, n in zip(MOVES["both optima move down by one λ"], seeds)]
    found = optima_move(*budgets(*truths), ("one", "two"))
    assert found.verdict == ONE_RUN and found.p is None and "λ=0.75" in found.evidence


def test_a_second_seed_that_has_not_finished_gives_no_verdict_on_tokens():
    short, long = budgets(*(replace(truth, **(QUIET | {"seeds": 2})) for truth in MOVES["both optima move down by one λ"]))
    members = tuple(replace(m, pretrain=None, after={}) if m.member.seed == 1 and m.point == 0.15 else m for m in long.results.members)
    found = optima_move(short, replace(long, results=replace(long.results, members=members)), ("one", "two"))
    assert found.verdict == ONE_RUN and found.seeds == 1 and "(1 of 1 seeds) with 140" in found.evidence


def test_without_a_shared_task_nothing_is_said_of_the_optima():
    found = optima_move(*budgets(*(replace(truth, **QUIET) for truth in MOVES["both optima move down by one λ"])), ())
    assert found.verdict == CANNOT_TELL and "No task was learned in both settings" in found.evidence


def test_a_cut_rests_on_the_paired_t_tests_of_both_sides():
    """Two λ leave one cut with one candidate on either side; the p values are scipy's."""
    fewer = Truth(
        decays=(0.1, 1.0), loss=(0.02, 0.0), after=(0.0, 0.0), before=(0.0, 0.0), **{n: (0.0, 0.0) for n in ("rank", "rank_vo", "gap", "probe")}
    )
    short, long = simulated(fewer, 0), simulated(replace(fewer, loss=(0.0, 0.02)), 1)

    def p(results, better, worse):
        losses = {point: [m.loss for m in results.at(point)] for point in (better, worse)}
        return scipy.stats.ttest_rel(losses[better], losses[worse], alternative="less").pvalue

    assert moves(by_loss(), short, long) == pytest.approx(max(p(short, 1.0, 0.1), p(long, 0.1, 1.0)), rel=1e-6)
    assert moves(by_loss(), long, short) == pytest.approx(max(p(long, 1.0, 0.1), p(short, 0.1, 1.0)), rel=1e-6)


def test_cuts_use_the_shared_weight_decays_or_else_leave_no_room_for_one_optimum():
    assert cuts([0.0, 0.1, 0.6, 1.0], [0.0, 0.1, 0.3, 1.0]) == [
        ([0.1, 1.0], [0.0], [0.0], [0.1, 1.0]),
        ([1.0], [0.0, 0.1], [0.0, 0.1], [1.0]),
    ]
    # The upper optimum above 0.15 and the lower below 0.1; above 0.75, below 0.4. At 0 there is nothing below.
    assert cuts([0.0, 0.15, 0.75, 3.0], [0.0, 0.02, 0.1, 0.4]) == [
        ([0.75, 3.0], [0.0, 0.15], [0.0, 0.02], [0.1, 0.4]),
        ([3.0], [0.0, 0.15, 0.75], [0.0, 0.02, 0.1], [0.4]),
    ]
    assert cuts([0.1], [0.1]) == cuts([], []) == cuts([0.1, 0.2], [1.0, 2.0]) == []


def test_weight_decays_that_leave_no_cut_say_nothing_of_where_optima_move():
    """With fewer tokens the best is at 0, with more at 0.2; but between 0 and 1 the shorter runs were not tried."""
    same = {name: (0.0, 0.0, 0.0) for name in ("before", "rank", "rank_vo", "gap", "probe")}
    fewer = Truth(decays=(0.0, 1.0, 4.0), loss=(0.0, 0.1, 0.5), after=(0.1, 0.05, 0.0), **same, **QUIET)
    more = Truth(decays=(0.0, 0.2, 0.6), loss=(0.1, 0.0, 0.2), after=(0.0, 0.1, 0.2), **same, **QUIET)
    short, long = budgets(fewer, more)
    assert cuts(list(more.decays), list(fewer.decays)) == [] and moves(by_loss(), long.results, short.results) == 1.0
    assert optima_move(short, long, ("one", "two")).verdict == CANNOT_TELL
    assert some_lead(lambda a, b: None, [], [0.0]) == 1.0


def test_the_best_is_that_of_the_means_and_seeds_are_counted():
    results = simulated(Truth(seeds=3, loss=(0.1, 0.0, 0.1, 0.9)), 0)
    best = by_loss().best(results)
    losses = np.array([[next(m.loss for m in results.at(d) if m.member.seed == s) for d in results.points] for s in (0, 1, 2)])
    assert best.decay == results.points[losses.mean(axis=0).argmin()] and best.value == pytest.approx(losses.mean(axis=0).min())
    assert list(best.of_seeds.values()) == [results.points[i] for i in losses.argmin(axis=1)]
    members = tuple(replace(m, state="diverged", pretrain=None) if (m.point, m.member.seed) == (0.15, 1) else m for m in results.members)
    assert by_loss().best(replace(results, members=members)).decay != 0.15


CASES = {
    LARGER: Truth(loss=(0.1, 0.0, 0.05, 0.9), after=(0.0, 0.0, 0.2, 0.0), **QUIET),
    NOT_LARGER: Truth(loss=(0.1, 0.05, 0.0, 0.9), after=(0.0, 0.2, 0.0, 0.0), **QUIET),
    "chance could have given the difference": Truth(loss=(0.1, 0.0, 0.05, 0.9)),
    "the largest λ, 3, may be the loss-best, and none lies above it": Truth(loss=(0.9, 0.5, 0.2, 0.0), **QUIET),
    ONE_RUN: Truth(loss=(0.1, 0.0, 0.05, 0.9), after=(0.0, 0.0, 0.2, 0.0), seeds=1),
}


@pytest.mark.parametrize("word", CASES)
def test_whether_the_downstream_best_is_larger(word):
    found = larger(simulated(CASES[word], 0), ("one", "two"))
    assert word in (found.word, found.why)
    assert found.word in (LARGER, NOT_LARGER, ONE_RUN) or found.word == CANNOT_TELL and found.why


def test_loss_best_weight_decays_that_disagree_leave_it_open():
    """Both 0.15 and 0.75 may have the lowest loss, and the best score lies at 0.75: larger than the one, not than the other."""
    assert larger(simulated(Truth(loss=(0.1, 0.0, 0.0, 0.9), after=(0.0, 0.0, 0.2, 0.0), **QUIET), 0), ("one", "two")).word == CANNOT_TELL


def test_a_score_that_is_the_same_for_all_has_no_best_and_is_said():
    results = simulated(Truth(seeds=3), 0)
    for m in results.members:
        for task, score in m.after.items():
            rows = tuple(replace(outcome, greedy=np.ones_like(outcome.greedy)) for outcome in score.outcomes)
            m.after[task] = replace(score, greedy=np.ones_like(score.greedy), outcomes=rows)
    found = larger(results, ("one", "two"))
    assert (found.word, found.why) == (CANNOT_TELL, "the score is the same number for every model")
    assert by_score(("one",)).best(results).equals == results.points[1:]


# ----------------------------------------------------------------------------------------------------------------------------- the page

SHORT = Planted(name="short", loss=(3.3, 3.1, 3.0, 3.2), after=(0.60, 0.65, 0.70, 0.80), grid=grid())
LONG = replace(SHORT, name="long", loss=(3.1, 2.9, 3.0, 3.3), after=(0.60, 0.65, 0.80, 0.70), train={"steps": 2240})
READ = ("prepare", "init", "pretrain", "finetune", "evaluate", "spectra")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    work = tmp_path_factory.mktemp("pair")
    return [write_study(work, planted, stages=READ) for planted in (SHORT, LONG)]


@pytest.fixture(scope="module")
def written(pair, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "new" / "page"
    ended = plasticity("compare", "--study", pair[0], "--study", pair[1], "--out", out, "--json")
    assert ended.returncode == 0, ended.stderr
    return out, json.loads(ended.stdout)


def rows_of(out, name):
    with open(out / "tables" / f"{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def compared(*planted, tmp_path, **how):
    folders = [write_study(tmp_path / str(i), one, stages=how.get("stages", READ)) for i, one in enumerate(planted)]
    return pj.compare_studies(folders)


def page_of(found, out) -> str:
    return " ".join(Page(found.write(out).read_text(encoding="utf-8")).text.split())


def test_the_table_of_settings_is_what_was_planted(written):
    out, said = written
    for rows in (rows_of(out, "settings"), said["settings"]):
        assert [row["setting"] for row in rows] == ["short", "long"]
        assert [(float(row["loss_best"]), float(row["score_best"])) for row in rows] == [(0.5, 2.0), (0.1, 0.5)]
        assert [float(row["loss_at_score_best"]) for row in rows] == [3.2, 3.0] and {row["larger"] for row in rows} == {ONE_RUN}
        assert [float(row["tokens_per_parameter"]) for row in rows] == pytest.approx([500 * 4096 / 530_000, 2240 * 4096 / 530_000])
    [moved] = said["verdicts"]
    assert moved["verdict"] == ONE_RUN and "λ=0.5 (1 of 1 seeds)" in moved["evidence"]
    assert {row["field"] for row in rows_of(out, "differences")} == {"train.steps"}
    ranks = rows_of(out, "ranks")
    assert len(ranks) == 8 and float(ranks[0]["W_QK median"]) == pytest.approx(0.8, abs=0.02)


def test_studies_that_differ_in_their_seeds_alone_say_so(tmp_path):
    text = page_of(
        compared(*(replace(SHORT, name=f"seeds{seed}", grid=replace(SHORT.grid, seeds=(seed,))) for seed in (1, 2)), tmp_path=tmp_path),
        tmp_path / "out",
    )
    assert "Nothing: they are equal in all settings." in text and "no member has finished" not in text.partition("What the settings differ in")[2]


def test_the_page_is_self_contained_and_has_every_section(written):
    out, _ = written
    text = (out / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert {"answer", "settings", "claims", "tasks", "figures", "figure-best", "figure-over_decay", "figure-ranks", "table-ranks"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids)) and all(load.startswith(("data:", "#")) for load in page.loads)
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.policy
    for link in page.links:
        assert link.startswith("#") and link[1:] in page.ids or (out / link).is_file(), link
    assert all((out / "figures" / f"{name}.{kind}").is_file() for name in ("best", "over_decay", "ranks") for kind in ("svg", "png"))
    hovered = re.findall(r"<title>([^<]*)</title>", text)
    assert "short: 2 at λ with the lowest held-out loss 0.5" in hovered and "long: 0.5 at λ with the lowest held-out loss 0.1" in hovered


def test_python_gives_the_tables_and_figures_of_the_page(pair, written):
    found = pj.compare_studies(pair)
    assert [row["setting"] for row in found.tables()["settings"]] == ["short", "long"] and found.verdicts[0].verdict == ONE_RUN
    assert len(found.figure("best").axes) == 1 and len(found.figure("over_decay").axes) == 2
    with pytest.raises(UserError, match="figure 'rank' is unknown; known: best, over_decay, ranks"):
        found.figure("rank")


def test_what_an_earlier_page_left_goes_and_other_files_stay(pair, written, tmp_path):
    out = tmp_path / "page"
    shutil.copytree(written[0], out)
    (out / "notes.txt").write_text("mine")
    (out / "figures" / "mine.png").write_bytes(b"mine")
    bare = [
        write_study(tmp_path / name, replace(planted, name=name), stages=("prepare", "init", "pretrain"))
        for name, planted in (("a", SHORT), ("b", LONG))
    ]
    page = pj.compare_studies(bare).write(out)
    assert page == out / "index.html" and "No setting has both" in page.read_text(encoding="utf-8")
    kept = {path.name for path in (out / "figures").iterdir()} | {path.name for path in out.iterdir()}
    assert kept == {"over_decay.svg", "over_decay.png", "mine.png", "notes.txt", "index.html", "compare.json", "figures", "tables"}
    victims = [tmp_path / "escape.txt", out / "notes.txt"]
    victims[0].write_text("mine")
    listed = json.loads((out / "compare.json").read_text())["files"]
    (out / "compare.json").write_text(json.dumps({"files": [*listed, "../escape.txt", str(victims[0]), "notes.txt"]}))
    pj.compare_studies(bare).write(out)
    assert [victim.read_text() for victim in victims] == ["mine", "mine"], "a list of files that was tampered with deletes nothing else"
    (out / "compare.json").unlink()
    with pytest.raises(UserError, match="index.html, which no comparison wrote"):
        pj.compare_studies(bare).write(out)


def refused(*argv) -> str:
    ended = plasticity("compare", *argv)
    assert ended.returncode == 2 and ended.stdout == "" and len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    return ended.stderr


def test_bad_input_is_one_line_and_nothing_is_written(pair, tmp_path):
    short, long = map(str, pair)
    out = tmp_path / "out"
    assert "--study is given 1 times; give it two or more" in refused("--study", short, "--out", out)
    assert "--study is given 0 times" in refused("--out", out)
    assert "is given twice" in refused("--study", short, "--study", long, "--study", f"{long}/../short", "--out", out)
    assert "no such directory" in refused("--study", short, "--study", tmp_path / "nowhere", "--out", out)
    assert "holds no study" in refused("--study", short, "--study", tmp_path, "--out", out)
    assert "holds the studies long, short; name one of them" in refused("--study", short, "--study", pair[0].parent, "--out", out)
    assert not out.exists()
    out.write_text("mine")
    assert "is a file" in refused("--study", short, "--study", long, "--out", out)
    assert "is a file" in refused("--study", short, "--study", long, "--out", out / "below")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "index.html").write_text("mine")
    assert "which no comparison wrote" in refused("--study", short, "--study", long, "--out", tmp_path / "full")
    assert out.read_text() == (tmp_path / "full" / "index.html").read_text() == "mine"


def test_a_workdir_with_one_study_names_it(tmp_path):
    folders = [write_study(tmp_path / name, SHORT, stages=("prepare", "init", "pretrain")) for name in ("a", "b")]
    found = pj.compare_studies([tmp_path / "a", folders[1]])
    assert [setting.name for setting in found.settings] == list(found.names) == ["a/short", "b/short"]
    assert any(note.startswith("b/short: Partial study") for note in found.notes)


def test_a_model_stands_beside_the_ranks_and_one_of_another_cut_is_left_out(pair, tmp_path):
    spectra = [sorted(study.glob("spectra/*"))[0] for study in pair]
    run = tmp_path / "public"
    shutil.copytree(spectra[0], run)
    write_config(run, pair[0])
    out = tmp_path / "page"
    ended = plasticity("compare", "--study", pair[0], "--study", pair[1], "--model", run, "--out", out)
    assert ended.returncode == 0, ended.stderr
    row = rows_of(out, "ranks")[-1]
    assert row["weight_decay"] == "" and float(row["W_QK median"]) == pytest.approx(0.8, abs=0.03) and row["setting"] == "wd0"
    assert "Dashed: models beside the studies" in (out / "index.html").read_text(encoding="utf-8")
    found = pj.compare_studies(pair, [run])
    other = replace(found.models[0], spectra=replace(found.models[0].spectra, mass=0.9))
    found = comparison(found.studies, [other])
    assert not found.models and any("wd0 is left out of the ranks: 0.9 of the sum" in note for note in found.notes)
    pretrain = tmp_path / "pretrain"
    shutil.copytree(sorted(pair[0].glob("pretrain/*"))[0], pretrain)
    write_config(pretrain, pair[0])
    assert "is a run of stage pretrain; give the directory of the model’s".replace("’", "'") in refused(
        "--study", pair[0], "--study", pair[1], "--model", pretrain, "--out", tmp_path / "no"
    )


def write_config(run, study):
    """The config.json of a run, which the planted ones lack; its checksum is not among DONE's."""
    tree = json.loads((study / "study.json").read_text())
    name = f"{'pretrain' if run.name == 'pretrain' else 'spectra'}/wd0"
    about = next(row for row in tree["runs"] if row["id"].startswith(name))
    (run / "config.json").write_text(json.dumps({"run": about, "config": tree["config"]}))


# ------------------------------------------------------------------------------------------------------- what cannot be computed or compared


def test_other_test_rows_leave_a_task_out_and_other_tokenizers_the_losses(tmp_path):
    found = compared(SHORT, replace(LONG, data="-other"), tmp_path=tmp_path)
    notes = " ".join(found.notes)
    assert found.tasks == () and "Task topic is not part of the score: the test rows differ between short and long." in notes
    assert "Losses do not stand beside each other, because the held-out rows of short and long differ" in notes and not found.same_losses
    assert "also differ in tasks.sentiment, tasks.topic" in notes and found.verdicts == []
    rows = found.tables()["settings"]
    assert [(row["loss_best"], row["score_best"]) for row in rows] == [(0.5, 2.0), (0.1, 0.5)], "within a setting the optima stand"
    text = page_of(found, tmp_path / "out")
    assert "scores do not" in text and "Each loss is less the lowest of its own setting" in text


def test_the_score_is_over_the_tasks_that_all_learned(tmp_path):
    found = compared(SHORT, replace(LONG, tasks=("topic",)), tmp_path=tmp_path)
    assert found.tasks == ("topic",) and "Task sentiment is not part of the score: long does not have it." in found.notes
    scores = {row["weight_decay"]: row["score"] for row in found.tables()["every_decay"] if row["setting"] == "short"}
    assert scores == {row["weight_decay"]: row["topic after"] for row in found.tables()["every_decay"] if row["setting"] == "short"}
    assert {row["task"] for row in found.tables()["by_task"]} == {"topic", "sentiment"}


def test_a_task_that_one_setting_did_not_learn_is_named(tmp_path):
    found = compared(SHORT, replace(LONG, after=(0.3, 0.35, 0.4, 0.35)), tmp_path=tmp_path)
    assert found.tasks == ("topic",) and "Task sentiment is not part of the score: no model learned it in long." in found.notes


@pytest.mark.parametrize("stages", [(), ("prepare", "init"), ("pretrain",), ("pretrain", "spectra"), ("evaluate", "finetune")])
def test_missing_stages_have_a_page(tmp_path, stages):
    text = page_of(compared(SHORT, LONG, tmp_path=tmp_path, stages=stages), tmp_path / "out")
    assert "Partial study" in text and ("No spectra, and so no ranks: short; long." in text) == ("spectra" not in stages)
    assert ("no model has a held-out loss yet" in text) == ("pretrain" not in stages)


def test_diverged_and_broken_models_are_left_out_by_name(tmp_path):
    broken = replace(LONG, loss=(3.1, None, None, None))
    ranks = replace(SHORT, rank_qk=(float("nan"), 0.7, 0.5, 0.3), loss=(3.1, None, 3.0, 3.2))
    found = compared(ranks, broken, tmp_path=tmp_path)
    notes = " ".join(found.notes)
    assert "short: λ = 0.1 diverged with a seed" in notes and "long: only λ = 0 has a held-out loss" in notes and "pretrain/wd0.5 diverged" in notes
    assert [row["loss_best"] for row in found.tables()["settings"]] == [0.5, 0.0]
    rows = {(row["setting"], row["weight_decay"]): row["W_QK median"] for row in found.tables()["ranks"]}
    assert rows["short", 0.0] is None and rows["short", 0.5] == pytest.approx(0.5, abs=0.02)
    text = page_of(found, tmp_path / "out")
    assert not re.search(r"\bnan\b", text.lower().replace("loss nan at step", ""))


def test_one_member_has_a_page(tmp_path):
    one = {"loss": (3.3,), "after": (0.6,), "before": (0.1,), "rank_qk": (0.8,), "rank_vo": (0.8,), "gap": (0.1,), "probe": (0.6,)}
    alone = Planted(name="alone", grid=grid(decays=(0.1,)), **one)
    found = compared(alone, SHORT, tmp_path=tmp_path)
    assert "alone: only λ = 0.1 has a held-out loss" in " ".join(found.notes) and "alone" in page_of(found, tmp_path / "out")


def test_a_study_that_does_not_compare_weight_decays_is_left_out_and_named(tmp_path):
    rates = replace(SHORT, name="rates", grid=GridConfig(weight_decay=(0.1,), timescales=None, fields=(("train.peak_lr", (1e-3, 2e-3)),)))
    found = compared(rates, SHORT, tmp_path=tmp_path)
    assert [s.name for s in found.settings] == ["short"]
    assert "rates compares along peak learning rate and not along weight decay" in found.notes[0] and page_of(found, tmp_path / "out")
    assert compared(rates, replace(rates, name="again"), tmp_path=tmp_path / "both").settings == ()


def test_slices_are_settings_and_pairs_differ_in_tokens_alone(tmp_path):
    rates = (("train.peak_lr", (1e-3, 5e-3)),)
    swept = replace(SHORT, name="rates", grid=grid(fields=rates))
    found = compared(swept, replace(LONG, train={"steps": 2240, "schedule": "wsd"}), tmp_path=tmp_path)
    assert [s.name for s in found.settings] == ["rates, peak lr = 0.001", "rates, peak lr = 0.005", "long"]
    assert [(a.name, b.name) for a, b in found.pairs] == [("rates, peak lr = 0.005", "long")], "0.005 is the default, and so long's"
    assert "They also differ in train.schedule (cosine against wsd)." in found.verdicts[0].evidence
    assert "peak lr = 0.001 and long have the same network and other numbers of tokens, but also differ in train.peak_lr" in " ".join(found.notes)


def test_the_fine_tuning_chosen_on_validation_rows_stands_for_its_study(tmp_path):
    chosen = Planted(
        name="chosen",
        loss=(3.3, 3.2, 3.3, 3.2),
        before=(0.1,) * 4,
        after=(0.60, 0.70, 0.80, 0.50),
        validation=(0.70, 0.60, 0.50, 0.55),
        grid=grid(decays=(0.0, 1.0), fields=(("finetune.peak_lr", (1e-3, 3e-3)),)),
        finetune=FinetuneConfig(select="validation"),
    )
    found = compared(chosen, SHORT, tmp_path=tmp_path, stages=(*READ, "validation"))
    assert [s.name for s in found.settings] == ["chosen, SFT = chosen on validation rows", "short"]
    assert found.tables()["settings"][0]["score_at_score_best"] == pytest.approx(0.7, abs=0.01), "not 0.8, which validation does not choose"
    assert "chosen tries 2 fine-tunings" in found.notes[0]


def test_answers_that_are_generated_otherwise_do_not_share_a_score(tmp_path, monkeypatch):
    import synthetic_study

    make = synthetic_study.config_of
    first = write_study(tmp_path, SHORT, stages=READ)
    monkeypatch.setattr(
        synthetic_study, "config_of", lambda planted: replace(make(planted), tasks={"topic": TaskConfig(test_rows=300, max_new_tokens=5)})
    )
    second = write_study(tmp_path, replace(LONG, tasks=("topic",)), stages=READ)
    notes = " ".join(pj.compare_studies([first, second]).notes)
    assert "Task topic is not part of the score: its answers are generated or graded differently in short and long." in notes


def test_studies_and_page_may_lie_on_a_store(pair):
    store = location(f"memory://{uuid.uuid4().hex}")
    for study in pair:
        store.fs.put(str(study), f"{store.path}/{study.name}", recursive=True)
    page = pj.compare_studies([store / "short", store / "long"]).write(store / "page")
    assert "short" in page.read_text(encoding="utf-8") and (store / "page" / "tables" / "settings.csv").is_file()
    assert page == pj.compare_studies([store / "short", store / "long"]).write(store / "page")


def test_same_optima_are_never_told_apart_in_a_flat_study():
    truth = Truth(loss=FLAT, seeds=3)
    assert {optima_move(*budgets(truth, truth, seed), ("one", "two")).verdict for seed in range(8)} == {CANNOT_TELL}
