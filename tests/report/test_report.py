"""The page holds every section, loads nothing, shows no number for what has none, and its CSV files equal the stages' results."""

import base64
import csv
import hashlib
import html.parser
import json
import os
import re

import numpy as np
import pytest
from synthetic_study import PROBLEMS, Planted, write_study

from plasticity_jax.errors import UserError
from plasticity_jax.report.drawing import render
from plasticity_jax.report.figures import figures
from plasticity_jax.report.frame import inline_svg
from plasticity_jax.report.page import (
    Part,
    collect,
    draw_figure,
    format_summary,
    numbers_of,
    render_page,
    write_report,
)
from plasticity_jax.report.tables import summary_rows, to_tex
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.runs.jsonfiles import read_json

pytestmark = pytest.mark.slow

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
SECTIONS = {"answer", "warnings", "verdicts", "pretraining", "finetuning", "inside", "members", "tasks", "samples", "config", "provenance"}


class Page(html.parser.HTMLParser):
    """Ids, texts and resource loads of a page; complains about tags that do not match."""

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.loads, self.links, self.scripts, self.text, self.script, self.open, self.policy = [], [], [], [], "", "", [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "srcset", "poster", "data") or name in ("href", "xlink:href") and tag not in ("a", "use"):
                self.loads.append(value)
            if name == "href" and tag == "a":
                self.links.append(value)
        if tag == "script":
            assert not attributes and "script" not in self.scripts  # one, inline
            self.scripts.append(tag)
        if ("http-equiv", "Content-Security-Policy") in attributes:
            self.policy = dict(attributes)["content"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.script += data
        elif self.open and self.open[-1] not in ("style", "title"):
            self.text += data


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def page(study):
    return Page(write_report(collect(study)).read_text(encoding="utf-8"))


def words(study) -> str:
    """Text of the page without its figures, which take most of the time."""
    results = collect(study)
    parts = [Part.of(part) for part in results.slices]
    return Page(render_page(results, parts, numbers_of(results, parts))).text


def shown_figures(study) -> list[str]:
    """Those that a study of one part may have."""
    config = collect(study).config
    return [name for name, figure in figures().items() if figure.applies(config) and not figure.of_study]


def test_every_section_and_figure_is_there(study, page):
    assert SECTIONS <= set(page.ids)
    assert "table-regraded" not in page.ids, "nothing was graded again"
    assert {f"figure-{name}" for name in shown_figures(study)} <= set(page.ids)
    assert "figure-heat_map" not in page.ids and "figure-stability" not in page.ids, "neither learning rates nor forgetting are part of the study"
    assert len(page.ids) == len(set(page.ids)), "two figures share an id"
    for word in (
        "Four language models",
        "Tiny model",
        "Single pretraining seed",
        "in use: sentiment (test rows from the published validation split). They",
        "one pretraining run: no verdict",
        "uncertainty over problems only",
        "W_QK",
        "peak lr",
        "Pass@8",
        "c0ffee",
    ):
        assert word in page.text, word


def test_page_is_self_contained(study, page):
    assert page.loads == ["data:,"]
    text = (study / "report" / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"url\((?!#)", text) and "@import" not in text
    assert len(text) < 3_000_000
    for link in page.links:
        assert (link[1:] in page.ids) if link.startswith("#") else (study / "report" / link).is_file(), link


def test_the_policy_allows_the_pages_own_script_and_nothing_from_elsewhere(page):
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert page.policy.split("; ") == ["default-src 'none'", "img-src data:", "style-src 'unsafe-inline'", f"script-src 'sha256-{digest}'"]


def test_numbers_lead_to_their_completions(study, page):
    files = [link for link in page.links if link.endswith("completions.jsonl")]
    assert len(files) == len(set(files)) == 4 * 2 * len(PROBLEMS)
    assert all("/evaluate/" in os.fspath((study / "report" / link).resolve()) for link in files)


def test_markers_show_their_value_on_hover(study, page):
    text = (study / "report" / "index.html").read_text(encoding="utf-8")
    figure = text[text.index('id="figure-scores"') :]
    titles = re.findall(r"<use [^>]*><title>([^<]*)</title></use>", figure[: figure.index("</figure>")])
    for name, values in (("after", (0.6, 0.65, 0.75, 0.8)), ("before", (0.1,) * 4)):
        expected = [f"{name}: {y:.4g} at weight decay λ {x}" for x, y in zip((0, 0.1, 0.5, 2), values)]
        for panel in ("Pass@1, topic, ", "Pass@1, mean (learned), ", "Maj@8, sentiment, "):
            assert [title for title in titles if title.startswith(panel + name)] == [panel + text for text in expected]


def test_latex_has_every_special_character_escaped():
    special = r"a_b & 5% #1 $x$ {y} ~ ^ \alpha <b> | λ → − “q” it's"
    text = to_tex([{"na_me": special, "n": 3, "x": -1.25e-7, "y": 0.5}, {"na_me": "two\nlines", "n": None, "x": 2.0}])
    assert text.splitlines() == [
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r"na\_me & n & x & y \\",
        r"\midrule",
        r"a\_b \& 5\% \#1 \$x\$ \{y\} \textasciitilde{} \textasciicircum{} \textbackslash{}alpha \textless{}b\textgreater{} \textbar{} "
        r"$\lambda$ $\to$ $-$ ``q'' it\textquotesingle{}s & 3 & $-1.25 \times 10^{-7}$ & 0.5 \\",
        r"two lines & -- & 2 & -- \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    assert to_tex([]) == "% no rows\n"
    long = to_tex([{"n": i} for i in range(41)])
    assert long.startswith(r"\begin{longtable}{r}") and long.count(r"\bottomrule") == 1 and len(re.findall(r"^\d+ \\\\$", long, re.M)) == 41


def test_every_csv_file_has_its_latex(study, page):
    names = {file.stem for file in (study / "report" / "tables").glob("*.csv")}
    assert names and names == {file.stem for file in (study / "report" / "tables").glob("*.tex")}


def test_references_inside_figures_resolve(study, page):
    text = (study / "report" / "index.html").read_text(encoding="utf-8")
    used = set(re.findall(r'xlink:href="#([^"]+)"|url\(#([^)]+)\)', text))
    assert used and {a or b for a, b in used} <= set(page.ids)


def test_text_of_a_model_is_escaped(page):
    assert "<script>alert(1)</script>" in page.text and "Which <b>word</b> & why?" in page.text


def _rows(study, name):
    with open(study / "report" / "tables" / f"{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _results(study, stage):
    runs = [run for run in read_json(study / "study.json")["runs"] if run["stage"] == stage]
    return {run["id"]: (run, RunDirectory(study / run["id"]).results()) for run in runs}


def test_csv_equals_the_results(study, page):
    held_out = {row["member"]: row for row in _rows(study, "held_out") if row["domain"] == "all"}
    for run, found in _results(study, "pretrain").values():
        assert float(held_out[run["member"]]["loss"]) == found["held_out"]["loss"]
    scores = {(row["member"], row["task"], row["when"]): row for row in _rows(study, "scores")}
    evaluated = _results(study, "evaluate").values()
    assert len(scores) == len(evaluated) == 4 * 2 * len(PROBLEMS)
    for run, found in evaluated:
        row = scores[run["member"], run["task"], run["fields"]["when"]]
        assert {name: float(row[name]) for name in found["metrics"]} == found["metrics"]
    ranks = {(row["member"], row["product"], row["layer"], row["head"]): float(row["pseudo_rank"]) for row in _rows(study, "pseudo_rank")}
    for run, found in _results(study, "spectra").values():
        assert ranks[run["member"], "W_VO", "2", "3"] == found["W_VO"]["pseudo_rank"][1][2]
    probes = {(row["member"], row["layer"]): float(row["accuracy"]) for row in _rows(study, "probes")}
    for run, found in _results(study, "probe").values():
        assert probes[run["member"], "block2"] == found["sets"]["topic"]["accuracy"][2]
    gaps = {row["member"]: row for row in _rows(study, "gap")}
    for run, found in _results(study, "gap").values():
        row = gaps[run["member"]]
        assert [float(row[k]) for k in ("gap", "gap_lower", "gap_upper")] == [found["gap"], *found["interval"]]
        assert row["seen_late"] == ""


def test_gains_are_after_less_before(study, page):
    for row in _rows(study, "gains"):
        assert float(row["gain"]) == pytest.approx(float(row["after"]) - float(row["before"]), abs=1e-12)
        assert float(row["gain_lower"]) <= float(row["gain"]) <= float(row["gain_upper"])
        assert float(row["reference_weight_decay"]) == 0.0
        assert (row["after_difference"] == "") == (float(row["weight_decay"]) == 0.0)


def test_summary_rows(study):
    rows = summary_rows(collect(study))
    assert [row["member"] for row in rows] == ["wd0", "wd0.1", "wd0.5", "wd2"]
    last = rows[-1]
    assert last["held_out_loss"] == 3.15 and last["timescale"] == 0.2 and last["gap"] == 0.05 and last["state"] == "done"
    assert last["topic after"] - last["topic before"] == pytest.approx(last["topic gain"])
    text = format_summary(rows)
    assert len(text.splitlines()) == 5 and "0.100→0.800" in text and "none" in text


def test_diverged_member_has_no_number(tmp_path):
    study = write_study(tmp_path, Planted(loss=(3.3, 3.2, 3.1, None)))
    page = Page(write_report(collect(study)).read_text(encoding="utf-8"))
    row = summary_rows(collect(study))[-1]
    assert row["state"] == "diverged" and {v for k, v in row.items() if k not in ("member", "weight_decay", "timescale", "state")} == {None}
    assert "pretrain/wd2 diverged: loss nan at step" in page.text
    legend = draw_figure(collect(study), "loss_curves").axes[0].get_legend().get_texts()
    assert [entry.get_text() for entry in legend] == ["λ = 0", "λ = 0.1", "λ = 0.5", "λ = 2 (diverged)"]
    assert not re.search(r"\bnan\b|\binf\b", page.text.replace("loss nan at step", ""))
    assert [r["member"] for r in _rows(study, "held_out") if r["domain"] == "all"] == ["wd0", "wd0.1", "wd0.5"]


def test_failed_run_is_named(tmp_path):
    study = write_study(tmp_path, stages=("prepare", "init", "pretrain"))
    run = next(run for run in read_json(study / "study.json")["runs"] if run["stage"] == "gap")
    (study / run["id"]).mkdir(parents=True)
    (study / run["id"] / "FAILED").write_text('{"reason": "OSError: disk full"}')
    assert "gap/wd0 failed: OSError: disk full" in words(study)


@pytest.mark.parametrize("stages", [(), ("prepare", "init", "pretrain"), ("evaluate",), ("probe", "gap")])
def test_partial_study_has_a_page(tmp_path, stages):
    study = write_study(tmp_path, stages=stages)
    page = Page(write_report(collect(study)).read_text(encoding="utf-8"))
    assert SECTIONS <= set(page.ids)
    assert "Partial study" in page.text and "Nothing to show yet" in page.text


def test_one_member_and_no_task_have_a_page(tmp_path):
    study = write_study(tmp_path, Planted(loss=(3.3,), before=(0.1,), after=(0.9,), rank_qk=(0.5,), rank_vo=(0.5,), gap=(0.1,), probe=(0.5,)))
    assert "without a second there is nothing to compare" in Page(write_report(collect(study)).read_text(encoding="utf-8")).text
    tree = read_json(study / "study.json")
    tree["config"]["tasks"], tree["runs"] = {}, [run for run in tree["runs"] if not run["task"]]
    (study / "study.json").write_text(json.dumps(tree))
    assert "No fine-tuned model has been scored yet" in words(study)


def test_warnings_of_control_and_unlearned_task(tmp_path):
    study = write_study(tmp_path, Planted(control_passes=False, after=(0.45, 0.45, 0.50, 0.50)))
    text = words(study)
    assert "unigram control of the seen / held-out gap fails for wd0, wd0.1, wd0.5, wd2" in text
    assert "No member learned sentiment" in text and "No member learned topic" not in text


def test_a_page_by_itself_links_to_nothing_but_itself(tmp_path):
    whole = write_report(collect(write_study(tmp_path / "work")), tmp_path / "sent" / "planted.html")
    beside, alone = (Page(path.read_text(encoding="utf-8")) for path in (whole, tmp_path / "sent" / "planted.html"))
    assert beside.ids == alone.ids and any("." in link for link in beside.links)
    assert alone.links == [link for link in beside.links if link.startswith("#")]
    assert "lie beside" in beside.text and "lie beside" not in alone.text


def test_completions_that_the_limit_cuts_are_a_warning(tmp_path):
    assert "before they ended" not in words(write_study(tmp_path / "few", Planted(unended=0.4)))
    text = words(write_study(tmp_path / "many", Planted(unended=0.75)))
    assert "After fine-tuning, 75% of the completions of topic were cut by evaluate.max_length = 2048 before they ended" in text


def test_seeds_are_averaged(tmp_path):
    study = write_study(tmp_path, Planted(seeds=(0, 1)))
    results = collect(study)
    assert [m.name for m in results.at(2.0)] == ["wd2", "wd2-s1"] and results.losses[2.0] == pytest.approx(3.15)
    text = words(study)
    assert "Single pretraining seed" not in text and "with 2 seeds" in text


def test_report_is_replaced_and_leaves_no_old_figures(tmp_path):
    study = write_study(tmp_path, stages=("spectra",))
    stale = study / "report" / "figures" / "gone.png"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"old")
    drawn = study / "report" / "figures" / "pseudo_rank.svg"
    first = write_report(collect(study)).read_bytes(), drawn.read_bytes()
    assert not stale.exists()
    assert (write_report(collect(study)).read_bytes(), drawn.read_bytes()) == first, "the same results give the same files"
    assert not [p for p in (study / "report").rglob("*") if "partial" in p.name]


def test_interrupted_report_keeps_the_old_page(tmp_path, monkeypatch):
    study = write_study(tmp_path, stages=("spectra",))
    page = write_report(collect(study))
    old, replace = page.read_bytes(), os.replace

    def full_disk(partial, path):
        if path.name == "index.html":
            raise OSError("No space left on device")
        replace(partial, path)

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_report(collect(study))
    assert page.read_bytes() == old and [path.name for path in page.parent.iterdir() if path.is_file()] == ["index.html"]


def test_figures_by_name(study):
    results = collect(study)
    assert render(draw_figure(results, "gap"), "png").startswith(b"\x89PNG")
    with pytest.raises(UserError, match="did you mean loss_curves"):
        draw_figure(results, "loss_curve")


def test_figure_without_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing to show yet"):
        draw_figure(collect(write_study(tmp_path, stages=("pretrain",))), "gap")


def test_study_json_is_required(tmp_path):
    with pytest.raises(UserError, match=r"holds no study\.json"):
        write_report(collect(tmp_path))


def test_inline_svg_prefixes_every_id_and_reference():
    body = '<defs><path id="{0}a"/></defs><use xlink:href="#{0}a" clip-path="url(#{0}a)"/></svg>'
    svg = '<?xml version="1.0"?><svg width="3pt" height="4pt" viewBox="0 0 3 4">' + body.format("")
    inline = str(inline_svg(svg, "one", 'say "x"'))
    assert inline == '<svg viewBox="0 0 3 4" role="img" aria-label="say &#34;x&#34;">' + body.format("one-")


# ---------------------------------------------------------------------------------------------------- rewards, intervals, forgetting


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    study = write_study(tmp_path_factory.mktemp("full"), Planted(scorer="log-probability", zero_shot=("piqa", "arc_easy"), forgetting=0.25))
    write_report(collect(study))
    return study


def test_the_rise_of_the_held_out_loss_is_after_less_before_by_domain(full):
    """As planted: 0.25 nats in every domain; a row per fine-tuned member, task, and domain."""
    rows, base = _rows(full, "held_out_rise"), {(row["member"], row["domain"]): float(row["loss"]) for row in _rows(full, "held_out")}
    assert rows and all(float(row["loss_rise"]) == pytest.approx(0.25) for row in rows)
    assert all(float(row["loss_before"]) == base[row["member"], row["domain"]] for row in rows)
    assert len(rows) == len(collect(full).tasks) * len(base)


def test_rewards_stand_beside_the_metrics_and_are_named(full):
    page = Page((full / "report" / "index.html").read_text(encoding="utf-8"))
    assert "come from: a planted scorer" in page.text and "Skywork" not in page.text
    for row in (row for row in _rows(full, "scores") if row["when"] == "after"):
        assert row["scorer"] == "a planted scorer" and float(row["rm@8"]) == 0.5 and abs(float(row["orm_score"])) < 1e-12


def test_intervals_of_every_metric_cover_what_resampling_problems_gives(full):
    """Against a plain loop over draws, for a mean, a conditional mean and a difference."""
    results = collect(full)
    rows = {(r["member"], r["task"], r["when"], r["metric"]): r for r in _rows(full, "metrics")}
    first, last = results.members[0], results.members[-1]
    rng = np.random.default_rng(1)
    of = {m.name: m.after["topic"].outcomes[0] for m in (first, last)}
    draws = {"pass@8": [], "correct_ratio@8": [], "mean@8": [], "difference": []}
    for _ in range(2000):
        at = rng.integers(300, size=300)
        right = of[last.name].right[at]
        draws["pass@8"].append((right > 0).mean())
        draws["mean@8"].append(right.mean() / 8)
        draws["correct_ratio@8"].append(right[right > 0].mean() / 8)
        draws["difference"].append(of[last.name].greedy[at].mean() - of[first.name].greedy[at].mean())
    for metric in ("pass@8", "correct_ratio@8", "mean@8"):
        row = rows[last.name, "topic", "after", metric]
        ends = [float(row["value_lower"]), float(row["value_upper"])]
        assert ends == pytest.approx(np.quantile(draws[metric], [0.025, 0.975]), abs=0.012)
    row = rows[last.name, "topic", "after", "pass@1"]
    assert [float(row["difference_lower"]), float(row["difference_upper"])] == pytest.approx(
        np.quantile(draws["difference"], [0.025, 0.975]), abs=0.015
    )
    # Paired: the members find the same problems hard, so the difference is surer than its parts.
    spread = float(row["value_upper"]) - float(row["value_lower"])
    assert float(row["difference_upper"]) - float(row["difference_lower"]) < 1.2 * spread
    assert row["reference"] == first.name and rows[first.name, "topic", "after", "pass@1"]["difference"] == ""


def test_the_mean_over_tasks_weighs_every_task_alike(full):
    scores = {(r["member"], r["task"], r["when"]): r for r in _rows(full, "scores")}
    for row in _rows(full, "macro"):
        assert float(row["pass@1"]) == pytest.approx(np.mean([float(scores[row["member"], task, row["when"]]["pass@1"]) for task in PROBLEMS]))


def test_a_task_of_several_test_sets_is_shown_by_set_and_by_their_mean(full):
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", (full / "report" / "index.html").read_text(encoding="utf-8"))
    words = " ".join(cells)
    for line in ("easy 150 0.600 0.650 0.750 0.800", "hard 50 0.300 0.325 0.375 0.400", "mean of the sets 200 0.450 0.488 0.562 0.600"):
        assert line in words, line
    sets = {
        (r["test_set"], r["member"]): float(r["value"])
        for r in _rows(full, "metrics")
        if r["test_set"] and r["when"] == "after" and r["metric"] == "pass@1"
    }
    assert len(sets) == 8 and sets["hard", "wd0.5"] == 0.375


def test_forgetting_is_before_less_after(full):
    page = Page((full / "report" / "index.html").read_text(encoding="utf-8"))
    assert "forgetting" in page.ids and "0.500→0.250" in page.text
    rows = _rows(full, "forgetting")
    assert len(rows) == 4 * 2 * 2 and {row["acc_drop"] for row in rows} == {"0.25"} and {row["acc_norm_drop"] for row in rows} == {""}
