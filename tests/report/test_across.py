"""Figures and tables that rest on several stages: forgetting against gain, learning rates, fine-tuning sweeps, seeds. Against the planted numbers."""

from dataclasses import replace

import numpy as np
import pytest
from synthetic_study import Planted, write_study
from test_report import Page
from test_scores import DECAYS, NOISY, SEEDS
from test_selection import SWEPT
from test_swept_report import BY_RATE, RATES

import plasticity_jax as pj
from plasticity_jax.config import GridConfig, StudyConfig
from plasticity_jax.errors import UserError
from plasticity_jax.report.across import FIGURES, spread_rows, stability_rows
from plasticity_jax.report.figures import draw_figure, figures
from plasticity_jax.report.page import collect, described, write_report
from plasticity_jax.report.selection import sweep_rows, win_rows

# ------------------------------------------------------------------------------------------------------------------------- forgetting

RISES = tuple(float(v) for v in np.linspace(0.1, 0.65, 12))
FORGETS = replace(NOISY, forgetting=RISES, zero_shot=("piqa", "arc_easy"), scorer="none")


@pytest.fixture(scope="module")
def forgets(tmp_path_factory):
    return collect(write_study(tmp_path_factory.mktemp("forgets"), FORGETS))


def test_the_plane_holds_the_planted_rise_and_drop_and_the_gain(forgets):
    rows = stability_rows(forgets)
    assert len(rows) == 12 * 2 and {row["zero_shot_drop"] for row in rows} == {0.25}
    for m in forgets.members:
        found = [row for row in rows if row["member"] == m.name]
        place = [n.name for n in forgets.members].index(m.name)
        for row in found:
            assert row["loss_rise"] == pytest.approx(RISES[place])
            assert row["gain"] == pytest.approx(m.after[row["task"]].greedy.mean() - m.before[row["task"]].greedy.mean())


@pytest.mark.slow
def test_the_plane_has_a_line_per_task_and_the_mean_of_the_learned(forgets):
    rises, drops = draw_figure(forgets, "stability").axes
    x, y = rises.lines[-1].get_data()
    rows = stability_rows(forgets)
    for i, decay in enumerate(DECAYS):
        of = [row for row in rows if row["weight_decay"] == decay]
        assert (x[i], y[i]) == pytest.approx((np.mean([row["loss_rise"] for row in of]), np.mean([row["gain"] for row in of])))
    assert [line.get_label() for line in rises.lines] == ["topic", "sentiment", "mean (learned)"] and np.ptp(drops.lines[-1].get_xdata()) == 0
    assert sum(len(dots.get_offsets()) for dots in rises.collections) == 3 * 12
    text = described(figures()["stability"], forgets, {})
    assert f"mean over the learned tasks: {x[0]:.3g} and {y[0]:.3g} at λ = 0" in text


@pytest.mark.slow
def test_the_plane_says_what_it_lacks_where_it_applies(tmp_path):
    study = write_study(tmp_path, Planted(forgetting=0.1), stages=("pretrain", "evaluate"))
    page = Page(write_report(collect(study)).read_text(encoding="utf-8"))
    assert "figure-stability" in page.ids and "Nothing to show yet: no model has a gain and a held-out loss or a zero-shot accuracy" in page.text
    assert not FIGURES["stability"].applies(collect(write_study(tmp_path / "without", Planted(), stages=())).config)


# --------------------------------------------------------------------------------------------------------------------- learning rates


@pytest.fixture(scope="module")
def rates(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("rates"), BY_RATE)


def texts(axes):
    return {(round(t.get_position()[0]), round(t.get_position()[1])): t.get_text() for t in axes.texts}


@pytest.mark.slow
def test_the_heat_map_holds_the_planted_cells_and_frames_the_best(rates):
    results = collect(rates)
    panels = {axes.get_label(): axes for axes in draw_figure(results, "heat_map").axes}
    cells = {(j, i): BY_RATE.loss[4 * j + i] for j in range(3) for i in range(4)}
    assert texts(panels["held-out loss"]) == {key: "div." if loss is None else f"{loss:.3f}" for key, loss in cells.items()}
    scores = {(j, i): np.mean([results.members[k].after[t].greedy.mean() for t in results.learned]) for (j, i) in cells if (k := 4 * j + i) != 11}
    assert texts(panels["Pass@1"]) == {(j, i): f"{scores[j, i]:.3f}" if (j, i) in scores else "div." for (j, i) in cells}
    for name, best in (("held-out loss", (1, 2)), ("Pass@1", max(scores, key=lambda key: (round(scores[key], 9), -key[1])))):
        frame = panels[name].lines[-1]
        assert (round(np.mean(frame.get_xdata()[:4])), round(np.mean(frame.get_ydata()[:4]))) == best, name
    text = described(figures()["heat_map"], results, {})
    assert "3.05 at λ = 0.6, peak lr = 0.0004" in text and "The same in every cell, so none is the best: Pass@8." in text


@pytest.mark.slow
def test_the_collapse_is_over_the_timescale_of_every_model(rates):
    results = collect(rates)
    panels = {axes.get_label(): axes for axes in draw_figure(results, "collapse").axes}
    of_rate = [[m for m in results.members if dict(m.member.overrides)["train.peak_lr"] == rate] for rate in RATES]
    for line, members in zip(panels["held-out loss, timescale, share of run"].lines, of_rate):
        expected = sorted(
            (1 / (dict(m.member.overrides)["train.peak_lr"] * m.member.weight_decay * results.config.train.steps), m.loss)
            for m in members
            if m.member.weight_decay and m.loss
        )
        assert list(zip(*line.get_data())) == [pytest.approx(pair) for pair in expected]
    assert FIGURES["collapse"].notes(results) == [
        "Lowest held-out loss: "
        + "; ".join(
            f"peak lr = {rate:g} at λ = {decay:g} (timescale {1 / (rate * decay * results.config.train.steps):.2g})"
            for rate, decay in zip(RATES, (0.6, 0.6, 0.1))
        )
        + "."
    ]


@pytest.mark.slow
def test_figures_of_a_whole_study_are_not_those_of_a_part(rates):
    study = pj.open_study(rates.parent)
    assert len(study.figure("heat_map").axes) > 1
    with pytest.raises(UserError, match="for a whole study, not for its part peak lr = 0.0004; leave the part out"):
        study.figure("heat_map", part="peak lr = 0.0004")
    with pytest.raises(UserError, match="one part of this study at a time"):
        study.figure("scores")


@pytest.mark.parametrize(
    ("grid", "applies"),
    [
        (GridConfig(weight_decay=DECAYS, timescales=None, fields=(("train.peak_lr", RATES),)), True),
        (GridConfig(timescales=(None, 4.0), fields=(("train.peak_lr", RATES),)), True),
        (GridConfig(weight_decay=(0.1,), timescales=None, fields=(("train.peak_lr", RATES),)), False),
        (GridConfig(weight_decay=DECAYS, timescales=None, fields=(("train.peak_lr", RATES[:1]),)), False),
        (GridConfig(weight_decay=DECAYS, timescales=None, fields=(("model.d_model", (64, 96)),)), False),
        (GridConfig(weight_decay=DECAYS, timescales=None), False),
    ],
)
def test_learning_rates_are_shown_where_they_and_the_decay_are_swept(grid, applies):
    config = StudyConfig(grid=grid)
    assert FIGURES["heat_map"].applies(config) == FIGURES["collapse"].applies(config) == applies


@pytest.mark.slow
def test_a_grid_of_timescales_has_them_as_rows(tmp_path):
    grid = GridConfig(timescales=(None, 4.0, 0.4), fields=(("train.peak_lr", RATES[:2]), ("model.d_ff", (64, 96))))
    planted = {name: getattr(Planted(), name)[:3] * 4 for name in ("loss", "before", "after", "rank_qk", "rank_vo", "gap", "probe")}
    results = collect(write_study(tmp_path, Planted(**planted, grid=grid)))
    panels = {axes.get_label(): axes for axes in draw_figure(results, "heat_map").axes}
    axes = panels["held-out loss, d_ff = 64"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.4", "4", "∞"] and "held-out loss, d_ff = 96" in panels
    draw_figure(results, "collapse")


# -------------------------------------------------------------------------------------------------------------------------- the sweep


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    return collect(write_study(tmp_path_factory.mktemp("swept"), SWEPT))


@pytest.mark.slow
def test_the_sweep_is_summed_up_by_value(swept):
    for row in sweep_rows(swept):
        of = [m for m in swept.members if m.point == row["weight_decay"]]
        tests, picked = {}, []
        for m in of:
            tests.setdefault(dict(m.member.overrides)["finetune.peak_lr"], []).append(m.after[row["task"]].greedy.mean())
        for seed in (0, 1):
            picked.append(max((m for m in of if m.member.seed == seed), key=lambda m: m.validation[row["task"]].greedy.mean()))
        means = [np.mean(found) for found in tests.values()]
        assert (row["settings"], row["scored"]) == (2, 2)
        assert [row[name] for name in ("lowest", "median", "highest")] == pytest.approx([min(means), np.median(means), max(means)])
        assert row["chosen"] == pytest.approx(np.mean([m.after[row["task"]].greedy.mean() for m in picked]))
    assert len(sweep_rows(swept)) == 2 * 2
    text = described(figures()["sweep"], swept, {})
    for win in win_rows(swept):
        assert f"{win['task']}: λ = 1 is ahead of λ = 0 in {win['later_wins']} of 2 settings." in text
    panel = draw_figure(swept, "sweep").axes[0]
    assert list(panel.lines[3].get_ydata()) == [row["chosen"] for row in sweep_rows(swept) if row["task"] == "topic"]


def test_without_validation_rows_nothing_is_chosen_and_it_is_said(swept):
    results = replace(swept, members=tuple(replace(m, validation={}) for m in swept.members))
    assert {row["chosen"] for row in sweep_rows(results)} == {None} and min(row["highest"] for row in sweep_rows(results)) > 0.5
    assert "Where no choice is shown" in described(figures()["sweep"], results, {})


# -------------------------------------------------------------------------------------------------------------------------------- seeds


def test_the_spread_is_numpys(forgets):
    rows = spread_rows(forgets)
    assert {row["measure"] for row in rows} >= {"held-out loss", "score after", "gain"}
    for row in (row for row in rows if row["measure"] == "held-out loss"):
        losses = [m.loss for m in forgets.at(row["weight_decay"])]
        assert row["seeds"] == len(losses) == len(SEEDS) and row["finetune_deviation"] is None
        assert [row[n] for n in ("mean", "deviation", "lowest", "highest")] == pytest.approx(
            [np.mean(losses), np.std(losses, ddof=1), min(losses), max(losses)]
        )


@pytest.mark.slow
def test_one_seed_has_no_spread_and_the_page_says_so(tmp_path):
    results = collect(write_study(tmp_path, Planted()))
    assert spread_rows(results) == []
    assert "One pretraining seed, so no spread between seeds." in figures()["scores"].text(results)
