"""The reproduction's own analysis of the CSV files agrees with what was planted, and with the report."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from synthetic_study import Planted, write_study

from plasticity_jax.config.schema import FinetuneConfig, GridConfig
from plasticity_jax.report.page import collect, table_rows
from plasticity_jax.report.tables import to_csv

PRIMARY = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "reproduction" / "primary.py"))
SEEDS, RATES, LOSS = (10, 11, 12), (1e-3, 3e-3), (3.30, 3.31, 3.32)
NUMBER = r"([+-]\d\.\d+)"

# Of each seed, size, rate and λ, in the order of the grid. Validation rows choose the second rate, and test rows would the first.
RISE = {10: 0.02, 11: 0.04, 12: 0.09}
AFTER = tuple(0.5 + (RISE[seed] * step * (1 if rate == RATES[1] else 3)) for seed in SEEDS for _ in range(2) for rate in RATES for step in range(3))
VALIDATION = tuple(0.7 if rate == RATES[1] else 0.4 for _ in SEEDS for _ in range(2) for rate in RATES for _ in range(3))


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    grid = GridConfig(timescales=(None, 0.8, 0.4), seeds=SEEDS, fields=(("train.steps", (100, 200)), ("finetune.peak_lr", RATES)))
    cells = len(AFTER) // 3
    same = {name: getattr(Planted(), name)[:3] * cells for name in ("rank_qk", "rank_vo", "norm_qk", "gap", "probe")}
    planted = Planted(
        loss=LOSS * cells,
        before=(0.1,) * len(AFTER),
        after=AFTER,
        validation=VALIDATION,
        grid=grid,
        finetune=FinetuneConfig(select="validation"),
        **same,
    )
    results = collect(write_study(tmp_path_factory.mktemp("work"), planted))
    folder = tmp_path_factory.mktemp("tables")
    for name in ("scores", "selected", "members", "verdicts"):
        (folder / f"{name}.csv").write_text(to_csv(table_rows(results, name)), encoding="utf-8")
    return folder


def test_the_primary_analysis_finds_what_was_planted_and_what_the_report_says(tables, capsys):
    PRIMARY["main"](tables)
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
    PRIMARY["main"](tmp_path)
    assert capsys.readouterr().out.count("Useful range: λ from 0 to ") == 2
    PRIMARY["main"](tables)
    whole = re.findall(r"λ from 0 to (\S+)\.\n", capsys.readouterr().out)
    PRIMARY["main"](tmp_path)
    assert all(float(a) < float(b) for a, b in zip(re.findall(r"λ from 0 to (\S+)\.\n", capsys.readouterr().out), whole, strict=True))


@pytest.mark.parametrize("p, corrected", [([0.01, 0.04], [0.02, 0.04]), ([0.04, 0.03], [0.06, 0.06]), ([0.9, 0.8], [1.0, 1.0])])
def test_holm(p, corrected):
    assert PRIMARY["holm"](p) == pytest.approx(corrected)
