"""The reproduction's own analysis and figures of the CSV files agree with what was planted, and with the report."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from synthetic_study import Planted, write_study

from plasticity_jax.config.schema import FinetuneConfig, GridConfig
from plasticity_jax.report.page import collect, table_rows
from plasticity_jax.report.tables import to_csv

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "reproduction"))
import figures  # noqa: E402
import primary  # noqa: E402
import readme  # noqa: E402

SEEDS, RATES, LOSS = (10, 11, 12), (1e-3, 3e-3), (3.30, 3.31, 3.32)
NUMBER = r"([+-]\d\.\d+)"

# Of each seed, size, rate and λ, in the order of the grid. Validation rows choose the second rate, and test rows would the first.
RISE = {10: 0.02, 11: 0.04, 12: 0.09}
AFTER = tuple(0.5 + (RISE[seed] * step * (1 if rate == RATES[1] else 3)) for seed in SEEDS for _ in range(2) for rate in RATES for step in range(3))
VALIDATION = tuple(0.7 if rate == RATES[1] else 0.4 for _ in SEEDS for _ in range(2) for rate in RATES for _ in range(3))


TABLES = ("scores", "selected", "members", "verdicts", "ranks", "probes", "gap")


def of_study(folder, steps):
    """Tables of a planted study of these lengths, and of no swept length if there is one."""
    axes = () if len(steps) == 1 else (("train.steps", steps),)
    grid = GridConfig(timescales=(None, 0.8, 0.4), seeds=SEEDS, fields=(*axes, ("finetune.peak_lr", RATES)))
    cells = len(SEEDS) * len(steps) * len(RATES)
    # In the order of the grid: seeds, sizes, rates, λ. The planted numbers are those of two sizes, of which the first half of each seed is the first.
    kept = [i for i in range(len(AFTER)) if i // 6 % 2 < len(steps)]
    same = {name: getattr(Planted(), name)[:3] * cells for name in ("rank_qk", "rank_vo", "norm_qk", "gap", "probe")}
    planted = Planted(
        loss=LOSS * cells,
        before=(0.1,) * len(kept),
        after=tuple(AFTER[i] for i in kept),
        validation=tuple(VALIDATION[i] for i in kept),
        grid=grid,
        finetune=FinetuneConfig(select="validation"),
        train={"steps": steps[0]},
        **same,
    )
    results = collect(write_study(folder / "work", planted))
    out = folder / "tables"
    out.mkdir()
    for name in TABLES:
        (out / f"{name}.csv").write_text(to_csv(table_rows(results, name)), encoding="utf-8")
    return out


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return of_study(tmp_path_factory.mktemp("main"), (728, 1306))


def test_the_primary_analysis_finds_what_was_planted_and_what_the_report_says(tables, capsys):
    primary.main(tables)
    said = capsys.readouterr().out
    assert "2 tasks, 18 models" in said and said.count("## ") == 2
    by_hand = re.findall(rf"by hand: {NUMBER} \[{NUMBER}, {NUMBER}\], p = (\S+)\.\n", said)
    reported = re.findall(rf"problems drawn too: {NUMBER} ", said)
    contrasts = re.findall(rf"Timescale 0.4 less none: {NUMBER} ", said)
    # The problems of a task are whole, so a planted score is kept to within half a problem.
    rises = np.array([2 * rise for rise in RISE.values()])
    low, high = rises.mean() - 4.3027 * rises.std(ddof=1) / 3**0.5, rises.mean() + 4.3027 * rises.std(ddof=1) / 3**0.5
    for effect, lower, upper, p in by_hand:
        assert np.allclose([float(effect), float(lower), float(upper)], [rises.mean(), low, high], atol=0.006)
        assert 0.05 < float(p) < 0.2
    assert len(by_hand) == 2 and np.allclose([float(text) for text in (*reported, *contrasts)], rises.mean(), atol=0.003)


def test_the_useful_range_ends_where_pretraining_is_ruined(tables, tmp_path, capsys):
    for path in tables.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    members = tmp_path / "members.csv"
    members.write_text(members.read_text(encoding="utf-8").replace("3.32", "3.45"), encoding="utf-8")
    primary.main(tmp_path)
    assert capsys.readouterr().out.count("Useful range: λ from 0 to ") == 2
    primary.main(tables)
    whole = re.findall(r"λ from 0 to (\S+)\.\n", capsys.readouterr().out)
    primary.main(tmp_path)
    assert all(float(a) < float(b) for a, b in zip(re.findall(r"λ from 0 to (\S+)\.\n", capsys.readouterr().out), whole, strict=True))


@pytest.mark.parametrize("p, corrected", [([0.01, 0.04], [0.02, 0.04]), ([0.04, 0.03], [0.06, 0.06]), ([0.9, 0.8], [1.0, 1.0])])
def test_holm(p, corrected):
    assert primary.holm(p) == pytest.approx(corrected)


def test_the_figures_show_what_was_planted(tables, tmp_path):
    folder = tmp_path / "tables"
    shutil.copytree(tables, folder / figures.MAIN)
    for name, steps in ((figures.MATRICES, (728,)), (figures.TOKENS, (431, 3020))):
        (tmp_path / name).mkdir()
        shutil.copytree(of_study(tmp_path / name, steps), folder / name)
    figures.main(folder, tmp_path / "figures")
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"{name}.{kind}" for name in ("gain", "tasks", "rates", "inside", "arms") for kind in ("svg", "png")
    }
    gains = [0.4 + step * np.mean(list(RISE.values())) for step in range(3)]
    for axes in figures.draw_gain(tables).axes[:2]:
        (found,) = axes.containers
        np.testing.assert_allclose(found[0].get_ydata(), gains, atol=0.003)
        assert [text.get_text() for text in axes.get_xticklabels()] == ["none", "0.8", "0.4"]
    rates = figures.draw_rates(tables).axes[0].containers
    ends = [container[0].get_ydata()[-1] for container in rates]  # at each rate, and as chosen
    np.testing.assert_allclose(ends, [np.mean([min(1, 0.5 + 6 * rise) for rise in RISE.values()]), gains[-1] + 0.1, gains[-1] + 0.1], atol=0.003)
    inside = figures.draw_inside(tables).axes[0].containers
    np.testing.assert_allclose([container[0].get_ydata() for container in inside], [Planted().rank_qk[:3], Planted().rank_vo[:3]], atol=0.02)
    for panel in figures.draw_arms(*(folder / name for name in (figures.MAIN, figures.MATRICES, figures.TOKENS))).axes[:2]:
        for container in panel.containers:
            np.testing.assert_allclose(container[0].get_ydata(), gains, atol=0.003)


def test_the_tables_of_the_text_are_those_of_the_files():
    """But for how wide columns are, which a formatter decides."""

    def words(text):
        return re.sub(r"[ \n]+", " ", re.sub(r"-{2,}", "-", text))

    text = readme.README.read_text(encoding="utf-8")
    assert words(readme.filled(text)) == words(text)
