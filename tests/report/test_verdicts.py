"""Each claim's rule reaches every word it can, on planted results."""

import numpy as np
import pytest
from synthetic_study import Planted, write_study

from plasticity_jax.report import verdicts as rules
from plasticity_jax.report.comparisons import score_difference
from plasticity_jax.report.results import collect
from plasticity_jax.report.verdicts import CANNOT_TELL, CONSISTENT, INCONSISTENT
from plasticity_jax.stages.gap import gap_difference

pytestmark = pytest.mark.slow

EVEN = (0.5, 0.5, 0.5, 0.5)

CASES = [
    ("loss_is_u_shaped", Planted(loss=(3.30, 3.20, 3.10, 3.15)), CONSISTENT),
    ("loss_is_u_shaped", Planted(loss=(3.30, 3.20, 3.15, 3.10)), INCONSISTENT),
    ("loss_is_u_shaped", Planted(loss=(3.109, 3.105, 3.10, 3.30)), CANNOT_TELL),  # the lower end ties
    ("loss_is_u_shaped", Planted(loss=(3.30, 3.20, 3.10, None)), CANNOT_TELL),  # the last one diverged: beyond 0.5 the loss may rise
    ("downstream_prefers_more", Planted(after=(0.60, 0.65, 0.75, 0.80)), CONSISTENT),
    ("downstream_prefers_more", Planted(after=(0.85, 0.80, 0.70, 0.65)), INCONSISTENT),
    ("downstream_prefers_more", Planted(after=(0.70, 0.70, 0.70, 0.70)), CANNOT_TELL),
    ("downstream_prefers_more", Planted(loss=(3.1, 3.2, 3.3, 3.4)), CANNOT_TELL),  # nothing below the loss-best λ
    ("downstream_prefers_more", Planted(loss=(3.3, 3.1, 3.105, 3.4), after=(0.6, 0.85, 0.7, 0.65)), CANNOT_TELL),  # two loss-best λ that disagree
    ("downstream_prefers_more", Planted(after=(0.15, 0.15, 0.15, 0.15)), CANNOT_TELL),  # no task learned
    ("query_key_rank_falls", Planted(rank_qk=(0.80, 0.70, 0.50, 0.30)), CONSISTENT),
    ("query_key_rank_falls", Planted(rank_qk=(0.30, 0.50, 0.70, 0.80)), INCONSISTENT),
    ("query_key_rank_falls", Planted(rank_qk=(0.80, 0.75, 0.72, 0.70), rank_vo=(0.8, 0.6, 0.4, 0.2)), INCONSISTENT),  # W_VO falls more
    ("query_key_rank_falls", Planted(rank_qk=(0.80, 0.50, 0.70, 0.30)), CANNOT_TELL),  # not monotone
    ("query_key_rank_falls", Planted(rank_qk=(0.80, 0.80, 0.80, 0.80), rank_vo=(0.8, 0.8, 0.8, 0.8)), CANNOT_TELL),
    ("gap_falls", Planted(gap=(0.50, 0.40, 0.20, 0.05)), CONSISTENT),
    ("gap_falls", Planted(gap=(0.05, 0.20, 0.40, 0.50)), INCONSISTENT),
    ("gap_falls", Planted(gap=(0.50, 0.30, 0.45, 0.05)), CANNOT_TELL),  # not monotone
    ("gap_falls", Planted(gap=(0.50, 0.40, 0.20, 0.05), control_passes=False), CANNOT_TELL),
    ("probes_improve", Planted(probe=(0.60, 0.64, 0.70, 0.74)), CONSISTENT),
    ("probes_improve", Planted(probe=(0.74, 0.70, 0.64, 0.60)), INCONSISTENT),
    ("probes_improve", Planted(probe=(0.70, 0.70, 0.70, 0.70)), CANNOT_TELL),
    ("probes_improve", Planted(probe=(0.15, 0.16, 0.18, 0.20)), CANNOT_TELL),  # both ends at the majority class
    ("probes_improve", Planted(loss=(3.1, 3.3, 3.4, 3.5)), CANNOT_TELL),  # the useful range is one λ
    ("gain_rises", Planted(after=(0.60, 0.65, 0.75, 0.80)), CONSISTENT),
    ("gain_rises", Planted(after=(0.80, 0.75, 0.70, 0.65)), INCONSISTENT),
    ("gain_rises", Planted(before=(0.10, 0.20, 0.30, 0.30), after=(0.60, 0.70, 0.80, 0.80)), CANNOT_TELL),  # score rises, gain does not
    ("gain_rises", Planted(loss=(3.1, 3.3, 3.4, 3.5)), CANNOT_TELL),
    ("optima_move", Planted(), CANNOT_TELL),
]


@pytest.mark.parametrize(("rule", "planted", "word"), CASES, ids=[f"{rule}-{word}-{i}" for i, (rule, _, word) in enumerate(CASES)])
def test_each_rule_says_what_was_planted(tmp_path, rule, planted, word):
    [decide] = [one for one in rules.rules() if one.__name__ == rule]
    verdict = decide(collect(write_study(tmp_path, planted)))
    assert verdict.verdict == word, verdict.evidence
    assert verdict.claim and verdict.rule and verdict.evidence and verdict.source


@pytest.mark.parametrize("stages", [(), ("prepare", "init"), ("pretrain",), ("pretrain", "spectra"), ("pretrain", "evaluate")])
def test_every_rule_answers_on_a_partial_study(tmp_path, stages):
    found = rules.verdicts(collect(write_study(tmp_path, stages=stages)))
    assert len(found) == 7
    assert {v.verdict for v in found} <= {CONSISTENT, INCONSISTENT, CANNOT_TELL}
    if not stages:
        assert {v.verdict for v in found} == {CANNOT_TELL}


def test_useful_range_ends_at_the_loss_margin(tmp_path):
    results = collect(write_study(tmp_path, Planted(loss=(3.50, 3.10, 3.19, 3.21))))
    assert rules.useful_range(results) == pytest.approx([0.0, 0.1, 0.5])


def test_score_difference_is_paired_and_weights_tasks_alike(tmp_path):
    results = collect(write_study(tmp_path))
    low, high = results.points[0], results.points[-1]
    mean, lower, upper = score_difference(results, low, high, ("topic", "sentiment"), gain=False)
    after = {(m.point, t): m.after[t].greedy for m in results.members for t in m.after}
    expected = np.mean([after[high, t].mean() - after[low, t].mean() for t in ("topic", "sentiment")])
    # 0.6 to 0.8 on nested problems: a difference of 1 on 20% of the items, so its standard error is known.
    error = np.sqrt(0.2 * 0.8 * (1 / 300 + 1 / 200)) / 2
    assert mean == pytest.approx(expected, abs=1e-12)
    assert (lower, upper) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.012)


def test_gap_difference_pairs_blocks(tmp_path):
    results = collect(write_study(tmp_path))
    mean, lower, upper = gap_difference(results, results.points[0], results.points[-1])
    assert mean == pytest.approx(0.45, abs=0.01)
    # Blocks differ by 0.3 nats among themselves; unpaired, the interval would be ten times as wide.
    assert upper - lower < 0.05


def test_gap_difference_needs_the_same_blocks(tmp_path):
    results = collect(write_study(tmp_path))
    results.members[0].record("gap").blocks["seen"][0]["document"] = 12345
    assert gap_difference(results, results.points[0], results.points[-1]) is None


def test_seeds_are_paired(tmp_path):
    results = collect(write_study(tmp_path, Planted(seeds=(0, 1))))
    low, high = results.points[0], results.points[-1]
    results.members[0].after.clear()  # seed 0 has no score at the smallest λ
    pair = results.pair(low, high, lambda m: m.after_task("topic"))
    only = {m.point: m for m in results.members if m.member.seed == 1}
    np.testing.assert_array_equal(pair[0], only[low].after["topic"].greedy)
    np.testing.assert_array_equal(pair[1], only[high].after["topic"].greedy)
