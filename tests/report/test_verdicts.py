"""Each claim's rule reaches every word it can, on planted results; one pretraining run reaches none."""

from dataclasses import replace

import numpy as np
import pytest
from synthetic_study import Planted, write_study

from plasticity_jax.config import GridConfig
from plasticity_jax.report import verdicts as rules
from plasticity_jax.report.effects import difference, pairwise_rows
from plasticity_jax.report.results import collect
from plasticity_jax.report.sentences import warnings
from plasticity_jax.report.tables import summary_rows, tables
from plasticity_jax.report.verdicts import CANNOT_TELL, CONTRADICTS, NO_EFFECT, ONE_RUN, SUPPORTS, score_measure
from plasticity_jax.stages.gap import gap_measure

pytestmark = pytest.mark.slow

SEEDS = (0, 1, 2)

CASES = [
    ("loss_is_u_shaped", Planted(loss=(3.30, 3.20, 3.10, 3.15)), SUPPORTS),
    ("loss_is_u_shaped", Planted(loss=(3.30, 3.20, 3.15, 3.10)), CONTRADICTS),
    ("loss_is_u_shaped", Planted(loss=(3.109, 3.105, 3.10, 3.30)), CANNOT_TELL),  # the lower end ties
    ("loss_is_u_shaped", Planted(loss=(3.104, 3.105, 3.10, 3.102)), NO_EFFECT),
    ("loss_is_u_shaped", Planted(loss=(3.30, 3.20, 3.10, None)), CANNOT_TELL),  # the last one diverged: beyond 0.5 the loss may rise
    ("downstream_prefers_more", Planted(after=(0.60, 0.65, 0.75, 0.80)), SUPPORTS),
    ("downstream_prefers_more", Planted(after=(0.85, 0.80, 0.70, 0.65)), CONTRADICTS),
    ("downstream_prefers_more", Planted(after=(0.70, 0.70, 0.70, 0.70)), NO_EFFECT),
    ("downstream_prefers_more", Planted(loss=(3.1, 3.2, 3.3, 3.4)), CANNOT_TELL),  # nothing below the loss-best λ
    ("downstream_prefers_more", Planted(loss=(3.3, 3.1, 3.105, 3.4), after=(0.6, 0.85, 0.7, 0.65)), CANNOT_TELL),  # two loss-best λ that disagree
    ("downstream_prefers_more", Planted(after=(0.15, 0.15, 0.15, 0.15)), CANNOT_TELL),  # no task learned
    ("query_key_rank_falls", Planted(rank_qk=(0.80, 0.70, 0.50, 0.30)), SUPPORTS),
    ("query_key_rank_falls", Planted(rank_qk=(0.30, 0.50, 0.70, 0.80)), CONTRADICTS),
    ("query_key_rank_falls", Planted(rank_qk=(0.80, 0.75, 0.72, 0.70), rank_vo=(0.8, 0.6, 0.4, 0.2)), CONTRADICTS),  # W_VO falls more
    ("query_key_rank_falls", Planted(rank_qk=(0.80, 0.50, 0.70, 0.30)), CANNOT_TELL),  # not monotone
    ("query_key_rank_falls", Planted(rank_qk=(0.80, 0.80, 0.80, 0.80), rank_vo=(0.8, 0.8, 0.8, 0.8)), NO_EFFECT),
    # The last λ is ruined, and what is left of its W_QK has full rank: it does not count.
    ("query_key_rank_falls", Planted(loss=(3.20, 3.15, 3.18, 4.5), rank_qk=(0.80, 0.70, 0.50, 0.95)), SUPPORTS),
    # So it is within the useful range, where W_QK has vanished.
    ("query_key_rank_falls", Planted(rank_qk=(0.80, 0.70, 0.50, 0.95), norm_qk=(4.0, 3.0, 2.0, 0.1)), SUPPORTS),
    ("query_key_rank_falls", Planted(rank_qk=(0.80, 0.70, 0.50, 0.95), norm_qk=(4.0, 3.0, 2.0, 0.11)), CONTRADICTS),
    ("query_key_rank_falls", Planted(norm_qk=(4.0, 0.1, 0.1, 0.1)), CANNOT_TELL),  # one λ is left
    ("gap_falls", Planted(gap=(0.50, 0.40, 0.20, 0.05)), SUPPORTS),
    ("gap_falls", Planted(gap=(0.05, 0.20, 0.40, 0.50)), CONTRADICTS),
    ("gap_falls", Planted(gap=(0.50, 0.30, 0.45, 0.05)), CANNOT_TELL),  # not monotone
    ("gap_falls", Planted(gap=(0.50, 0.40, 0.20, 0.05), control_passes=False), CANNOT_TELL),
    ("probes_improve", Planted(probe=(0.60, 0.64, 0.70, 0.74)), SUPPORTS),
    ("probes_improve", Planted(probe=(0.74, 0.70, 0.64, 0.60)), CONTRADICTS),
    ("probes_improve", Planted(probe=(0.70, 0.70, 0.70, 0.70)), NO_EFFECT),
    ("probes_improve", Planted(probe=(0.15, 0.16, 0.18, 0.20)), CANNOT_TELL),  # every model at the majority class
    ("probes_improve", Planted(loss=(3.1, 3.3, 3.4, 3.5)), CANNOT_TELL),  # the useful range is one λ
    ("gain_rises", Planted(after=(0.60, 0.65, 0.75, 0.80)), SUPPORTS),
    ("gain_rises", Planted(after=(0.80, 0.75, 0.70, 0.65)), CONTRADICTS),
    ("gain_rises", Planted(before=(0.10, 0.20, 0.30, 0.40), after=(0.40, 0.50, 0.60, 0.70)), CANNOT_TELL),  # score rises, gain does not
    ("gain_rises", Planted(after=(0.70, 0.70, 0.70, 0.70)), NO_EFFECT),
    ("gain_rises", Planted(after=(0.70, 0.80, 0.80, 0.70)), CANNOT_TELL),  # a hump has no trend, and is an effect
    ("gain_rises", Planted(loss=(3.1, 3.3, 3.4, 3.5)), CANNOT_TELL),
]


def decided(tmp_path, rule, planted):
    [decide] = [one for one in rules.rules() if one.__name__ == rule]
    return decide(collect(write_study(tmp_path, planted)))


@pytest.mark.parametrize(("rule", "planted", "word"), CASES, ids=[f"{rule}-{word}-{i}" for i, (rule, _, word) in enumerate(CASES)])
def test_each_rule_says_what_was_planted(tmp_path, rule, planted, word):
    verdict = decided(tmp_path, rule, replace(planted, seeds=SEEDS))
    assert verdict.verdict == word, verdict.evidence
    assert verdict.claim and verdict.rule and verdict.evidence and verdict.source
    assert (verdict.p is not None and verdict.p < 0.05) == (word in (SUPPORTS, CONTRADICTS)) or word == NO_EFFECT


@pytest.mark.parametrize("rule", sorted({rule for rule, _, _ in CASES}))
def test_one_pretraining_run_has_effects_and_no_verdict(tmp_path, rule):
    verdict = decided(tmp_path, rule, Planted())
    assert verdict.verdict == ONE_RUN and verdict.p is None
    assert verdict.effect is not None and verdict.seeds == 1
    over = {
        "gain_rises": "problems only",
        "downstream_prefers_more": "problems only",
        "probes_improve": "test texts only",
        "gap_falls": "documents only",
    }
    assert verdict.interval_over == over.get(rule, "") and ("uncertainty over" in verdict.evidence) == (rule in over)


def test_a_second_seed_that_has_not_finished_leaves_one_run(tmp_path):
    grid = GridConfig(timescales=(None, 4.0, 0.8, 0.2), seeds=(0, 1))
    twice = {name: getattr(Planted(), name) * 2 for name in ("before", "rank_qk", "rank_vo", "gap", "probe")}
    planted = Planted(loss=(3.30, 3.20, 3.10, 3.15) * 2, after=(0.60, 0.65, 0.75, 0.80) + (None,) * 4, grid=grid, **twice)
    assert decided(tmp_path, "gain_rises", planted).verdict == ONE_RUN


def test_a_product_that_has_vanished_is_named_and_has_no_rank(tmp_path):
    results = collect(write_study(tmp_path, Planted(rank_qk=(0.80, 0.70, 0.50, 0.95), norm_qk=(4.0, 3.0, 2.0, 0.05), seeds=SEEDS)))
    [decide] = [one for one in rules.rules() if one.__name__ == "query_key_rank_falls"]
    evidence = decide(results).evidence
    assert "Left out: wd2 (W_QK has vanished: 12 of 12 heads at the noise floor, mean norm 0.05, floor 0.1); wd2-s1" in evidence
    assert "0.95" not in evidence and "No result" not in evidence
    assert "W_QK has vanished in wd2, wd2-s1, wd2-s2: its norm" in " ".join(warnings(results))
    assert [row["W_QK pseudo-rank"] is None for row in summary_rows(results)[:4]] == [False, False, False, True]
    ranks = [row for row in tables()["ranks"].rows(results) if row["product"] == "W_QK"]
    assert {(row["weight_decay"], row["vanished"]) for row in ranks} == {(0.0, "no"), (0.1, "no"), (0.5, "no"), (2.0, "yes")}
    assert all((row["pseudo_rank"] is None) == (row["vanished"] == "yes") for row in ranks)
    assert {row["finetuned_on"] for row in ranks} == {"(base)", "topic", "sentiment"}


def noisy(**changed):
    """Three seeds of four λ, whose numbers differ by seed; `changed` holds tuples of 12, seed by seed."""
    wobble = (0.0, 0.02, -0.01, 0.01) + (0.01, -0.02, 0.02, 0.0) + (-0.02, 0.0, 0.01, 0.02)
    base = {
        "loss": [3.2 + d / 10 for d in wobble],
        "before": [0.1] * 12,
        "after": [0.7 + d for d in wobble],
        "rank_qk": [0.8 + d for d in wobble],
        "rank_vo": [0.8] * 12,
        "gap": [0.1 + d / 4 for d in wobble],
        "probe": [0.6 + d for d in wobble],
    }
    grid = GridConfig(timescales=(None, 4.0, 0.8, 0.2), seeds=SEEDS)
    return Planted(grid=grid, **{name: tuple(values) for name, values in (base | changed).items()})


def test_the_interval_of_a_trend_is_a_t_interval_of_the_slopes_of_the_seeds(tmp_path):
    import scipy.stats

    planted = noisy()
    verdict = decided(tmp_path, "gap_falls", planted)
    slopes = [-scipy.stats.linregress(np.linspace(0, 1, 4), planted.gap[i : i + 4]).slope for i in (0, 4, 8)]
    test = scipy.stats.ttest_1samp(slopes, 0.0)
    interval = test.confidence_interval(0.95)
    assert (verdict.effect, verdict.effect_lower, verdict.effect_upper) == pytest.approx((np.mean(slopes), interval.low, interval.high), abs=1e-6)
    assert verdict.p == pytest.approx(test.pvalue, abs=1e-6) and verdict.seeds == 3 and verdict.verdict == CANNOT_TELL


def test_holm_is_over_the_claims_and_over_the_pairs(tmp_path):
    results = collect(write_study(tmp_path, noisy(after=[0.6 + 0.05 * (i % 4) + 0.01 * (i % 3) for i in range(12)])))
    found = rules.verdicts(results)
    p = sorted(v.p for v in found if v.p is not None)
    assert len(p) == 6 and sorted(v.p_holm for v in found if v.p is not None)[0] == pytest.approx(min(1, 6 * p[0]))
    rows = [row for row in pairwise_rows(results) if row["measure"] == "gain"]
    assert len(rows) == 6 and min(row["p_holm"] for row in rows) == pytest.approx(min(1, 6 * min(row["p"] for row in rows)))
    assert {row["measure"] for row in pairwise_rows(results)} == {
        "held-out loss",
        "score after",
        "gain",
        "W_QK pseudo-rank",
        "W_VO pseudo-rank",
        "gap",
        "probe accuracy",
    }


@pytest.mark.parametrize("stages", [(), ("prepare", "init"), ("pretrain",), ("pretrain", "spectra"), ("pretrain", "evaluate")])
@pytest.mark.parametrize("seeds", [(0,), SEEDS])
def test_every_rule_answers_on_a_partial_study(tmp_path, stages, seeds):
    found = rules.verdicts(collect(write_study(tmp_path, Planted(seeds=seeds), stages=stages)))
    assert len(found) == 6 and all(v.evidence for v in found)
    words = {v.verdict for v in found}
    assert words == {ONE_RUN} if len(seeds) == 1 else words <= {SUPPORTS, CANNOT_TELL}
    if not stages and len(seeds) > 1:
        assert words == {CANNOT_TELL}


def test_useful_range_ends_at_the_loss_margin_and_leaves_out_what_diverged(tmp_path):
    results = collect(write_study(tmp_path / "margin", Planted(loss=(3.50, 3.10, 3.19, 3.21))))
    assert rules.useful_range(results) == pytest.approx([0.0, 0.1, 0.5])
    losses = [3.2, 3.2, 3.2, 3.2] + [3.2, 3.2, 3.2, None] + [3.2, 3.2, 3.2, 3.2]
    results = collect(write_study(tmp_path / "diverged", noisy(loss=losses)))
    assert rules.useful_range(results) == pytest.approx([0.0, 0.1, 0.5]), "one seed of the last λ diverged"


def test_score_difference_is_paired_and_weights_tasks_alike(tmp_path):
    results = collect(write_study(tmp_path))
    low, high = results.points[0], results.points[-1]
    found = difference(results, score_measure(("topic", "sentiment"), gain=False), low, high)
    after = {(m.point, t): m.after[t].greedy for m in results.members for t in m.after}
    expected = np.mean([after[high, t].mean() - after[low, t].mean() for t in ("topic", "sentiment")])
    # 0.6 to 0.8 on nested problems: a difference of 1 on 20% of the items, so its standard error is known.
    error = np.sqrt(0.2 * 0.8 * (1 / 300 + 1 / 200)) / 2
    assert found.value == pytest.approx(expected, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((found.value - 1.96 * error, found.value + 1.96 * error), abs=0.012)


def test_problems_count_as_drawn_where_seeds_agree(tmp_path):
    """The same answers with every seed: the problems are what is left to chance, and their standard error is known."""
    results = collect(write_study(tmp_path, Planted(seeds=SEEDS)))
    found = difference(results, score_measure(("topic",), gain=False), results.points[0], results.points[-1])
    error = np.sqrt(0.2 * 0.8 / 300)
    assert (found.low, found.high) == pytest.approx((found.value - 1.96 * error, found.value + 1.96 * error), abs=0.001)


def test_gap_difference_pairs_blocks(tmp_path):
    results = collect(write_study(tmp_path))
    found = difference(results, gap_measure(), results.points[-1], results.points[0])
    assert found.value == pytest.approx(0.45, abs=0.01)
    # Blocks differ by 0.3 nats among themselves; unpaired, the interval would be ten times as wide.
    assert found.high - found.low < 0.05


def test_gap_interval_within_a_run_needs_the_same_blocks(tmp_path):
    results = collect(write_study(tmp_path))
    results.members[0].record("gap").blocks["seen"][0]["document"] = 12345
    found = difference(results, gap_measure(), results.points[0], results.points[-1])
    assert found.value is not None and found.low is None


def test_seeds_are_paired(tmp_path):
    results = collect(write_study(tmp_path, noisy()))
    low, high = results.points[0], results.points[-1]
    results.members[0].after.clear()  # seed 0 has no score at the smallest λ
    found = difference(results, score_measure(("topic",), gain=False), low, high)
    of = {(m.member.seed, m.point): m.after["topic"].greedy.mean() for m in results.members if m.after}
    assert found.seeds == 2 and found.value == pytest.approx(np.mean([of[seed, high] - of[seed, low] for seed in (1, 2)]))
    assert "No result: wd0." in next(v for v in rules.verdicts(results) if v.claim.startswith("Models pretrained")).evidence
