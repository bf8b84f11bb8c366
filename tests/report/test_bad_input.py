"""A page is written whatever a study lacks, and says what could not be computed and why."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from running import plasticity, status_rows
from simulated_study import Truth, simulated
from synthetic_study import Planted, write_study
from test_report import Page
from test_verdicts import SEEDS, noisy

from plasticity_jax.report.effects import pairwise_rows
from plasticity_jax.report.page import Part, collect, numbers_of, render_page, write_report
from plasticity_jax.report.sentences import warnings
from plasticity_jax.report.verdicts import CANNOT_TELL, ONE_RUN, verdicts
from plasticity_jax.runs.directory import add_warning
from plasticity_jax.runs.jsonfiles import read_json, write_json

pytestmark = pytest.mark.slow

NAN = float("nan")


def text_of(results) -> str:
    parts = [Part.of(part) for part in results.slices]
    return " ".join(Page(render_page(results, parts, numbers_of(results, parts))).text.split())


def written(study) -> tuple[str, list[dict[str, str]]]:
    """The page's words and the rows of verdicts.csv, by the public call."""
    page = write_report(collect(study))
    with open(page.parent / "tables" / "verdicts.csv", encoding="utf-8", newline="") as file:
        return " ".join(Page(page.read_text(encoding="utf-8")).text.split()), list(csv.DictReader(file))


def test_a_page_with_seeds_shows_p_alone_and_by_holm(tmp_path):
    text, rows = written(write_study(tmp_path, Planted(seeds=SEEDS)))
    assert "over 3 pretraining seeds" in text and "p, Holm" in text and "verdicts stand" in text
    assert {row["verdict"] for row in rows} == {"supports"}
    for row in rows:
        assert (row["p"] == "") == (row["p_holm"] == "") == (row["seeds"] == "0")
        assert row["p"] == "" or float(row["p"]) <= float(row["p_holm"]) and row["interval_over"] == "pretraining seeds"
    pairs = list(csv.DictReader((tmp_path / "planted" / "report" / "tables" / "pairwise.csv").open(encoding="utf-8")))
    assert len(pairs) == 7 * 6 and all(row["p_holm"] for row in pairs)


def test_numbers_that_are_not_finite_are_left_out_by_name(tmp_path):
    planted = noisy(
        rank_qk=[NAN, 0.7, 0.6, 0.5] + [0.8, 0.7, 0.6, 0.55] + [0.81, 0.7, 0.62, 0.5],
        gap=[NAN] * 12,
        probe=[0.6, NAN, 0.7, 0.74] + [0.6, 0.64, 0.7, 0.74] + [0.61, 0.63, 0.7, 0.73],
    )
    text, rows = written(write_study(tmp_path, planted))
    rank = next(row for row in rows if "W_QK" in row["claim"])
    assert "Not a finite number, so left out: wd0." in rank["evidence"] and rank["seeds"] == "2"
    gap = next(row for row in rows if row["claim"].startswith("The gap"))
    assert gap["verdict"] == CANNOT_TELL and "Fewer than two λ of the useful range have a gap. No result: wd0, " in gap["evidence"]
    assert not re.search(r"\bnan\b", text.replace("gap_nan", ""))


def test_a_seed_that_diverged_takes_its_weight_decay_out_of_the_useful_range(tmp_path):
    planted = noisy(loss=[3.2, 3.1, 3.15, 3.2] + [3.2, 3.1, 3.15, None] + [3.2, 3.1, 3.15, 3.2])
    results = collect(write_study(tmp_path, planted))
    text = text_of(results)
    assert "pretrain/wd2-s1 diverged" in text
    gain = next(v for v in verdicts(results) if "gain more" in v.claim)
    assert gain.seeds == 3 and "From λ=0 to λ=0.5" in gain.evidence


@pytest.mark.parametrize("seeds", [(0,), SEEDS])
def test_all_members_but_one_diverged(tmp_path, seeds):
    results = collect(write_study(tmp_path, Planted(loss=(3.2, None, None, None), seeds=seeds)))
    found = verdicts(results)
    assert {v.verdict for v in found} == {ONE_RUN if len(seeds) == 1 else CANNOT_TELL}
    assert "Fewer than two λ" in " ".join(v.evidence for v in found) and "Claims" in text_of(results)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("problems", [1, 2])
def test_a_task_of_one_or_two_rows(seeds, problems):
    results = simulated(Truth(seeds=seeds, problems=problems), 0)
    assert "claims" in text_of(results)
    assert all(v.evidence for v in verdicts(results)) and pairwise_rows(results)


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_score_that_is_the_same_for_all_is_said_to_be(seeds):
    results = simulated(Truth(seeds=seeds), 0)

    def constant(score, value):
        rows = tuple(replace(outcome, greedy=np.full_like(outcome.greedy, value)) for outcome in score.outcomes)
        return replace(score, greedy=np.full_like(score.greedy, value), outcomes=rows)

    members = tuple(
        replace(m, before={t: constant(s, 0.0) for t, s in m.before.items()}, after={t: constant(s, 1.0) for t, s in m.after.items()})
        for m in results.members
    )
    results = replace(results, members=members)
    gain = next(v for v in verdicts(results) if "gain more" in v.claim)
    assert gain.verdict == (ONE_RUN if seeds == 1 else CANNOT_TELL) and "the same number for every model" in gain.evidence and gain.p is None
    best = next(v for v in verdicts(results) if "best after fine-tuning" in v.claim)
    assert best.verdict == (ONE_RUN if seeds == 1 else CANNOT_TELL)
    assert "claims" in text_of(results)


def test_models_of_a_seed_scored_on_other_problems_are_not_paired():
    results = simulated(Truth(seeds=3), 0)
    score = results.members[0].after["one"]
    shorter = replace(score, greedy=score.greedy[:-1], outcomes=tuple(replace(o, greedy=o.greedy[:-1]) for o in score.outcomes))
    results.members[0].after["one"] = shorter
    gain = next(v for v in verdicts(results) if "gain more" in v.claim)
    assert gain.seeds == 2


def test_the_page_leaves_out_the_numbers_of_a_changed_run_and_says_so(tmp_path):
    study = write_study(tmp_path, Planted())
    [path, *_] = sorted(study.glob("gap/*/results.json"))
    before = (write_report(collect(study)).parent / "tables" / "gap.csv").read_text().splitlines()
    results = json.loads(path.read_text())
    path.write_text(json.dumps(results | {"gap": results["gap"] + 1.0}))
    page = write_report(collect(study))
    assert "since the run finished" in page.read_text(encoding="utf-8")
    left = (page.parent / "tables" / "gap.csv").read_text().splitlines()
    assert len(left) == len(before) - 1 and set(left) < set(before)


def test_verify_ends_with_one_where_a_run_is_damaged(tmp_path):
    write_study(tmp_path, Planted())
    assert plasticity("status", "--verify", "--workdir", tmp_path).returncode == 0
    [path, *_] = sorted(tmp_path.glob("*/evaluate/*/problems.jsonl"))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert plasticity("status", "--verify", "--workdir", tmp_path).returncode == 1
    assert [row["id"] for row in status_rows(tmp_path) if row["state"] == "damaged"] == [], "without --verify nothing is read"


def test_runs_that_were_made_apart_and_checkpoints_that_were_passed_over_are_on_the_page(tmp_path):
    folder = write_study(tmp_path, Planted())
    first, second = sorted((folder / "pretrain").iterdir())[:2]
    for path, kind in ((first, "cpu"), (second, "H100")):
        provenance = read_json(path / "provenance.json")
        write_json(path / "provenance.json", provenance | {"environments": [{"device_kind": kind}]})
        write_json(path / "DONE", {"diverged": ""})
    add_warning(second, "checkpoint 16 cannot be read; it went on from step 8, and trained the steps after it again")
    said = " ".join(warnings(collect(folder)))
    assert "Not all pretrain runs were made alike: device_kind was cpu for" in said and f"H100 for {second.name.rsplit('-', 1)[0]}." in said
    assert f"pretrain/{second.name.rsplit('-', 1)[0]}: checkpoint 16 cannot be read; it went on from step 8" in said
