"""Every metric on the page: gains, means, ranks, z-scores and correlations against NumPy and SciPy on the stored results; what is left out is said."""

import json
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from simulated_study import Truth, simulated
from synthetic_study import PROBLEMS, Planted, write_study
from test_report import Page

import plasticity_jax as pj
from plasticity_jax.config import GridConfig
from plasticity_jax.errors import UserError
from plasticity_jax.evaluate.metrics import METRICS, metric_of, metrics, ordered_metrics, reward_metrics
from plasticity_jax.report.figures import draw_figure, figures
from plasticity_jax.report.page import Part, collect, described, numbers_of, render_page, table_rows
from plasticity_jax.report.results import Outcomes
from plasticity_jax.report.scores import MEAN, aggregate, aggregate_rows, correlation_rows, gain_rows, metric_measure

SEEDS, DECAYS = (0, 1, 2), (0.0, 0.1, 0.6, 1.0)
GRID = GridConfig(weight_decay=DECAYS, timescales=None, seeds=SEEDS)


def drawn(*means, scale=0.01, seed=0):
    """A number per λ, and for every seed another."""
    rng = np.random.default_rng(seed)
    return tuple(float(v) for v in np.tile(means, 3) + rng.normal(scale=scale, size=12))


NOISY = Planted(
    loss=drawn(3.3, 3.2, 3.1, 3.25, scale=0.02),
    before=drawn(0.1, 0.12, 0.11, 0.13, seed=1),
    after=drawn(0.60, 0.72, 0.70, 0.80, scale=0.03, seed=2),
    rank_qk=drawn(0.8, 0.7, 0.5, 0.4),
    rank_vo=drawn(0.8, 0.8, 0.8, 0.8),
    gap=drawn(0.5, 0.4, 0.2, 0.1),
    probe=drawn(0.6, 0.64, 0.7, 0.72),
    reward=drawn(0.5, 1.0, 0.2, 0.8, scale=0.3, seed=3),
    scorer="log-probability",
    grid=GRID,
)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("scores"), NOISY)


def stored(study):
    """(λ, seed, task, when) → metrics, and (λ, seed) → held-out loss, from the files."""
    scores, losses = {}, {}
    for run in json.loads((study / "study.json").read_text())["runs"]:
        file = study / run["id"] / "results.json"
        if run["stage"] not in ("evaluate", "reward", "pretrain") or not file.is_file():
            continue
        found, decay = json.loads(file.read_text()), float(run["member"].split("-")[0].removeprefix("wd"))
        seed = int(run["member"].partition("-s")[2] or 0)
        if run["stage"] == "pretrain":
            losses[decay, seed] = found["held_out"]["loss"]
        else:
            when = run["fields"].get("when", "after")
            scores.setdefault((decay, seed, run["task"], when), {}).update(found["metrics"])
    return scores, losses


COMPARED = ("pass@1", "maj@8", "rm@8", "pass@8", "correct_ratio@8", "orm_score")


def test_every_metric_is_declared_once():
    """What the evaluation and the rewards give has a declaration, and the paper's six are compared, in the paper's order."""
    right = np.array([[1, 0, 1, 0], [0, 0, 0, 1]], bool)
    given = [*metrics(right[:, 0], right, right[:, 1]), *reward_metrics(right, np.ones((2, 4))), "accuracy", "acc_norm", "acc_bytes"]
    declared = {metric.name for metric in METRICS}
    assert len(declared) == len(METRICS) and all(metric_of(name).name in declared for name in given)
    assert [name for name in ordered_metrics(given) if metric_of(name).compared] == [
        *("pass@1", "maj@4", "rm@4", "pass@4", "correct_ratio@4", "orm_score", "accuracy", "acc_norm")
    ]
    assert metric_of("correct_ratio@16").heading == "Correct Ratio@16" and metric_of("pass@1").heading == "Pass@1"
    assert metric_of("a plug-in's").heading == "a plug-in's" and not metric_of("a plug-in's").compared


def test_scores_and_gains_of_every_metric_are_means_of_the_stored_ones(study):
    scores, _ = stored(study)
    rows = {(row["metric"], row["task"], row["weight_decay"]): row for row in gain_rows(collect(study))}
    assert set(rows) == {(metric, task, decay) for metric in COMPARED for task in (*PROBLEMS, MEAN) for decay in DECAYS}
    for (metric, task, decay), row in rows.items():
        tasks = PROBLEMS if task == MEAN else (task,)
        after = np.array([np.mean([scores[decay, seed, t, "after"][metric] for t in tasks]) for seed in SEEDS])
        assert row["after"] == pytest.approx(after.mean(), abs=1e-12) and row["seeds"] == 3 and row["interval_over"] == "pretraining seeds"
        if metric in ("rm@8", "orm_score"):
            assert row["before"] is None and row["gain"] is None
            continue
        before = np.array([np.mean([scores[decay, seed, t, "before"][metric] for t in tasks]) for seed in SEEDS])
        assert row["before"] == pytest.approx(before.mean()) and row["gain"] == pytest.approx((after - before).mean(), abs=1e-12)
        if metric == "correct_ratio@8":  # one number per model: the t interval over seeds
            low, high = scipy.stats.t.interval(0.95, 2, after.mean(), scipy.stats.sem(after))
            assert (row["after_lower"], row["after_upper"]) == pytest.approx((low, high), abs=1e-6)
        assert row["after_lower"] <= row["after"] <= row["after_upper"]


def test_intervals_within_one_run_are_those_of_a_plain_loop_over_problems():
    """Pass@8 and the conditional ratio, averaged over two tasks whose problems are drawn apart."""
    rng = np.random.default_rng(0)
    results = simulated(Truth(seeds=1), 0)
    right = {task: rng.binomial(8, rng.beta(0.4, 0.6, size=300)).astype(float) for task in ("one", "two")}
    m = results.members[0]
    for task, found in right.items():
        outcome = Outcomes(m.after[task].greedy, found, None, 8, None, None)
        shown = {"pass@8": float((found > 0).mean()), "correct_ratio@8": float(found[found > 0].mean() / 8)}
        m.after[task] = replace(m.after[task], outcomes=(outcome,), metrics=m.after[task].metrics | shown)
    draws = {"pass@8": [], "correct_ratio@8": []}
    for _ in range(4000):
        samples = [found[rng.integers(300, size=300)] for found in right.values()]
        draws["pass@8"].append(np.mean([(found > 0).mean() for found in samples]))
        draws["correct_ratio@8"].append(np.mean([found[found > 0].mean() / 8 for found in samples]))
    results = replace(results, config=replace(results.config, report=replace(results.config.report, bootstrap_samples=4000)))
    for metric, values in draws.items():
        measure = metric_measure(("one", "two"), metric, gain=False)
        low, high = measure.interval(results, [(m, 1.0)])
        expected = np.quantile(values, [0.025, 0.975])
        assert (low, high) == pytest.approx(expected, abs=0.12 * (expected[1] - expected[0])), metric


def test_ranks_and_z_scores_are_scipys_within_each_seed(study):
    scores, _ = stored(study)
    rows = {(row["weight_decay"], row["seed"]): row for row in aggregate_rows(collect(study))}
    assert len(rows) == 12
    for seed in SEEDS:
        table = np.array([[scores[d, seed, task, "after"][metric] for metric in COMPARED for task in PROBLEMS] for d in DECAYS])
        kept = table[:, np.ptp(table, axis=0) > 1e-12]
        z, ranks = scipy.stats.zscore(kept).mean(axis=1), scipy.stats.rankdata(-kept.round(12), axis=0).mean(axis=1)
        for i, decay in enumerate(DECAYS):
            row = rows[decay, seed]
            assert (row["mean_rank"], row["mean_z"]) == pytest.approx((ranks[i], z[i])) and (row["scores"], row["models"]) == (kept.shape[1], 4)
    assert kept.shape[1] < table.shape[1], "Pass@8 is 1 for all"


def test_correlations_of_every_metric_are_scipys(study):
    scores, losses = stored(study)
    loss = np.array([np.mean([losses[d, s] for s in SEEDS]) for d in DECAYS])
    rows = {(row["metric"], row["task"]): row for row in correlation_rows(collect(study))}
    assert set(rows) == {(metric, task) for metric in COMPARED for task in (*PROBLEMS, MEAN)}
    for (metric, task), row in rows.items():
        of = np.array([[np.mean([scores[d, s, t, "after"][metric] for t in (PROBLEMS if task == MEAN else (task,))]) for s in SEEDS] for d in DECAYS])
        score = of.mean(axis=1)
        if np.ptp(score) < 1e-12:
            assert row["pearson"] is None and row["note"] == "the score is the same everywhere"
            continue
        without = [scipy.stats.pearsonr(np.delete(loss, i), np.delete(score, i)).statistic for i in range(4)]
        within = [scipy.stats.pearsonr([losses[d, s] for d in DECAYS], of[:, i]).statistic for i, s in enumerate(SEEDS)]
        assert row["pearson"] == pytest.approx(scipy.stats.pearsonr(loss, score).statistic)
        assert row["spearman"] == pytest.approx(scipy.stats.spearmanr(loss, score).statistic)
        assert (row["leave_one_out_lowest"], row["leave_one_out_highest"]) == pytest.approx((min(without), max(without)))
        assert (row["seeds_lowest"], row["seeds_highest"]) == pytest.approx((min(within), max(within))) and row["note"] == ""


@pytest.mark.slow
def test_figures_show_these_numbers_and_say_them(study):
    results = collect(study)
    rows = gain_rows(results)
    panels = {axes.get_label(): axes for axes in draw_figure(results, "scores").axes}
    assert set(panels) == {f"{metric_of(m).heading}{' (reward)' * (m == 'orm_score')}, {task}" for m in COMPARED for task in (*PROBLEMS, MEAN)}
    after = panels[f"Maj@8, {MEAN}"].containers[0][0].get_ydata()
    assert list(after) == [row["after"] for row in rows if (row["metric"], row["task"]) == ("maj@8", MEAN)]
    assert len([line for line in panels["Maj@8, topic"].lines if line.get_alpha() == 0.35]) == len(SEEDS), "a faint line for every seed"
    plane = draw_figure(results, "correlation").axes[1]
    assert sum(len(points.get_offsets()) for points in plane.collections) == 3 * 12, "a dot for every model, of each task and the mean"
    x, y = plane.lines[2].get_data()
    mean = {row["weight_decay"]: row["after"] for row in rows if (row["metric"], row["task"]) == ("maj@8", MEAN)}
    assert dict(zip(x, y)) == pytest.approx({results.losses[d]: mean[d] for d in DECAYS})
    text = described(figures()["scores"], results, {})
    assert (
        f"Maj@8, mean over the learned tasks: {mean[0.0]:.3g} at λ = 0, {mean[0.1]:.3g} at λ = 0.1" in text and "Faint: each pretraining seed" in text
    )
    ranks = {d: np.mean([r["mean_rank"] for r in aggregate_rows(results) if r["weight_decay"] == d]) for d in DECAYS}
    assert f"Mean rank: {ranks[0.0]:.3g} at λ = 0" in described(figures()["aggregate"], results, {})


def words(results) -> str:
    parts = [Part.of(part) for part in results.slices]
    return " ".join(Page(render_page(results, parts, numbers_of(results, parts))).text.split())


@pytest.mark.slow
def test_what_is_left_out_of_the_aggregate_is_said(tmp_path):
    planted = replace(NOISY, loss=(*NOISY.loss[:7], None, *NOISY.loss[8:]), reward=())  # λ = 1 diverged with the second seed
    study = write_study(tmp_path, planted)
    [run, *_] = sorted(study.glob("reward/wd0.1-topic*/DONE"))
    run.unlink()
    results = collect(study)
    found = aggregate(results)
    assert found.notes[0] == "Left out: λ = 1, not scored on every learned task with every pretraining seed."
    assert found.notes[1] == "Left out, because some models lack them: RM@8 on topic, ORM Score on topic."
    assert "RM@8 on sentiment" in found.notes[2] and found.notes[2].startswith(
        "Left out, because every model has the same score, which has no z-score: "
    )
    assert found.models == 3 and {m.point for m in results.members if m.name in found.ranks} == {0.0, 0.1, 0.6}
    text = words(results)
    assert "not scored on every learned task with every pretraining seed" in described(figures()["aggregate"], results, {})
    assert "the score is the same everywhere" in text


ALONE = {"rank_qk": (0.5,), "rank_vo": (0.5,), "gap": (0.1,), "probe": (0.5,)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("planted", "stages", "said"),
    [
        (
            Planted(loss=(3.3,), before=(0.1,), after=(0.9,), **ALONE),
            None,
            "A rank needs two λ whose models are scored on every learned task; there is 1.",
        ),
        (Planted(after=(0.15,) * 4), None, "No task was learned, so there is nothing to aggregate."),
        (Planted(), ("pretrain",), "No fine-tuned model has been scored yet, so there is nothing to aggregate."),
        (Planted(loss=(None,) * 4), None, "No fine-tuned model has been scored yet, so there is nothing to aggregate."),
        (Planted(after=(0.7,) * 4), None, "No score is left to aggregate."),
    ],
)
def test_a_page_without_an_aggregate_says_why(tmp_path, planted, stages, said):
    results = collect(write_study(tmp_path, planted, stages=stages))
    assert said in words(results)
    with pytest.raises(UserError, match="has nothing to show"):
        draw_figure(results, "aggregate")
    assert aggregate_rows(results) == []


@pytest.mark.slow
def test_two_points_have_no_correlation_and_it_is_said(tmp_path):
    text = words(collect(write_study(tmp_path, Planted(loss=(3.3, 3.2)))))
    assert "2 of the 3 λ that it needs have a loss and a score" in text


def test_scores_that_are_not_finite_are_left_out(study):
    results = collect(study)
    [m] = [m for m in results.members if m.name == "wd0.1"]
    m.after["topic"] = replace(m.after["topic"], metrics=m.after["topic"].metrics | {"maj@8": float("nan"), "pass@8": float("inf")})
    rows = {(row["metric"], row["task"], row["weight_decay"]): row for row in gain_rows(results)}
    assert rows["maj@8", "topic", 0.1]["seeds"] == rows["pass@8", "topic", 0.1]["seeds"] == 2 and rows["pass@1", "topic", 0.1]["seeds"] == 3
    assert "Maj@8 on topic, Pass@8 on topic" in aggregate(results).notes[0]
    for rows in (gain_rows(results), correlation_rows(results), aggregate_rows(results)):
        assert all(np.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    draw_figure(results, "scores")


def test_a_metric_of_compared_options_has_the_interval_of_its_own_verdicts():
    greedy = np.array([1.0, 0.0, 1.0, 1.0])
    by_length = Outcomes(greedy, None, None, 0, None, None, counts="acc_norm")
    assert by_length.metric("acc_norm")[0] is greedy and by_length.metric("accuracy") is None
    assert Outcomes(greedy, None, None, 0, None, None, counts="accuracy").metric("accuracy")[0] is greedy


@pytest.mark.parametrize("problems", [1, 2])
@pytest.mark.parametrize("seeds", [1, 3])
def test_a_task_of_one_or_two_rows_has_scores(problems, seeds):
    results = simulated(Truth(seeds=seeds, problems=problems), 0)
    assert len(gain_rows(results)) >= 2 * 4 and len(correlation_rows(results)) >= 2


@pytest.mark.slow
def test_perplexity_is_the_exponential_of_the_loss(study):
    rows = table_rows(collect(study), "members")
    assert [row["perplexity"] for row in rows] == pytest.approx(np.exp([row["held_out_loss"] for row in rows]))
    right = draw_figure(collect(study), "held_out_loss").axes[0].child_axes[0]
    assert right.get_ylabel() == "perplexity"


@pytest.mark.slow
def test_a_notebook_has_the_tables_and_figures_of_the_page(study):
    opened, results = pj.open_study(study.parent), collect(study)
    numbers = numbers_of(results, [Part.of(results)])
    for name in ("gains", "aggregate", "correlation", "verdicts"):
        assert numbers[name] and opened.table(name) == numbers[name]
    assert opened.table() == opened.table("summary")
    assert [axes.get_label() for axes in opened.figure("gains").axes][:1] == ["Pass@1, topic"]
    with pytest.raises(UserError, match="did you mean gains"):
        opened.table("gain")
