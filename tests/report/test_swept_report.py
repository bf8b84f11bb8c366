"""The report of a study over another field than weight decay, and over several: right axes, parts that stand apart, no claim that is not the paper's."""

import csv
from dataclasses import replace

import pytest
from synthetic_study import Planted, write_study
from test_report import Page, shown_figures

import plasticity_jax as pj
from plasticity_jax.config import GridConfig
from plasticity_jax.errors import UserError
from plasticity_jax.report.drawing import positions
from plasticity_jax.report.effects import difference
from plasticity_jax.report.page import Part, collect, draw_figure, format_summary, numbers_of, render_page, write_report
from plasticity_jax.report.tables import summary_rows
from plasticity_jax.report.verdicts import score_measure
from plasticity_jax.stages.evaluate import correlation_rows, gain_rows

pytestmark = pytest.mark.slow

RATES = (2e-4, 4e-4, 8e-4)
DECAYS = (0.0, 0.1, 0.6, 1.0)
# Decay by decay within each rate: its best loss moves from 0.6 to 0.1, and the last member diverges.
BY_RATE = Planted(
    loss=(3.30, 3.20, 3.10, 3.15) + (3.25, 3.15, 3.05, 3.20) + (3.20, 3.10, 3.20, None),
    before=(0.10,) * 12,
    after=(0.60, 0.65, 0.75, 0.80) + (0.65, 0.70, 0.75, 0.72) + (0.80, 0.75, 0.60, 0.50),
    rank_qk=(0.80, 0.70, 0.50, 0.30) * 3,
    rank_vo=(0.85, 0.84, 0.83, 0.80) * 3,
    gap=(0.50, 0.40, 0.20, 0.05) * 3,
    probe=(0.60, 0.64, 0.70, 0.74) * 3,
    grid=GridConfig(weight_decay=DECAYS, timescales=None, fields=(("train.peak_lr", RATES),), changes=(("^wd1-", {"train.batch_size": 64}),)),
)


def along(field, *values, decay=(0.1,), timescales=None):
    return Planted(grid=GridConfig(weight_decay=None if timescales else decay, timescales=timescales, fields=((field, values),)))


def words(study) -> str:
    results = collect(study)
    parts = [Part.of(part) for part in results.slices]
    return " ".join(Page(render_page(results, parts, numbers_of(results, parts))).text.split())


def rows(study, name):
    with open(study / "report" / "tables" / f"{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def faceted(tmp_path_factory):
    study = write_study(tmp_path_factory.mktemp("faceted"), BY_RATE)
    write_report(collect(study))
    return study


def test_each_part_is_the_study_of_its_members_alone(faceted, tmp_path):
    """A part of the product says the same as a study over weight decay only with the same numbers."""
    results = collect(faceted)
    part = results.slices[0]
    pick = {name: getattr(BY_RATE, name)[:4] for name in ("loss", "before", "after", "rank_qk", "rank_vo", "gap", "probe")}
    alone = collect(write_study(tmp_path, replace(BY_RATE, **pick, grid=replace(BY_RATE.grid, fields=(), changes=()))))
    assert part.losses == alone.losses and part.points == alone.points == DECAYS and part.learned == alone.learned
    assert [(v.verdict, v.evidence) for v in Part.of(part).verdicts] == [(v.verdict, v.evidence) for v in Part.of(alone).verdicts]
    assert correlation_rows(part) == [{"train.peak_lr": 2e-4, **row} for row in correlation_rows(alone)]
    for row, expected in zip([row for row in gain_rows(results) if row["train.peak_lr"] == 2e-4], gain_rows(alone), strict=True):
        assert {k: v for k, v in row.items() if k not in ("train.peak_lr", "timescale_share")} == {
            k: v for k, v in expected.items() if k != "timescale_share"
        }


def test_faceted_page_holds_every_part(faceted):
    page = Page((faceted / "report" / "index.html").read_text(encoding="utf-8"))
    assert len(page.ids) == len(set(page.ids))
    for rate in RATES:
        assert {f"peak_lr{rate:g}-{section}" for section in ("part", "verdicts", "pretraining", "finetuning", "inside")} <= set(page.ids)
        assert {f"figure-peak_lr{rate:g}-{name}" for name in shown_figures(faceted)} <= set(page.ids)
    assert {"figure-heat_map", "figure-collapse"} <= set(page.ids)
    for link in page.links:
        assert (link[1:] in page.ids) if link.startswith("#") else (faceted / "report" / link).is_file(), link
    assert len(list((faceted / "report" / "figures").glob("*.png"))) == 3 * len(shown_figures(faceted)) + 2


def test_faceted_page_says_what_differs(faceted):
    text = words(faceted)
    assert (
        "12 language models" in text
        and "they differ in two settings, AdamW’s weight decay λ (0, 0.1, 0.6, 1) and the peak learning rate (0.0002, 0.0004, 0.0008)" in text
    )
    assert "from the same initial parameters;" in text and "on the same batches" not in text, "some have another batch size"
    assert "Members differ in more than what is swept: train.batch_size = 64 for wd1-peak_lr0.0002, wd1-peak_lr0.0004, wd1-peak_lr0.0008." in text
    assert "lowest at λ = 0.6 (3.100" in text and "lowest at λ = 0.6 (3.050" in text and "lowest at λ = 0.1 (3.100" in text
    assert "changed for wd1-peak_lr0.0004" in text
    assert "λ = 0.1, peak lr = 0.0004" in text, "samples name both"


def test_tables_have_a_column_per_swept_field(faceted):
    for name in ("members", "curves", "held_out", "scores", "probes", "pseudo_rank", "gap", "gains", "summary", "correlation", "verdicts"):
        found = rows(faceted, name)
        assert {float(row["train.peak_lr"]) for row in found} == set(RATES), name
        if name not in ("correlation", "verdicts"):
            assert {float(row["weight_decay"]) for row in found} == set(DECAYS), name
    (row,) = [row for row in rows(faceted, "held_out") if row["member"] == "wd0.6-peak_lr0.0004" and row["domain"] == "all"]
    assert float(row["loss"]) == 3.05
    about = ("pass@1", "topic", 0.0, 8e-4)
    (gain,) = [r for r in rows(faceted, "gains") if (r["metric"], r["task"], float(r["weight_decay"]), float(r["train.peak_lr"])) == about]
    assert gain["gain_difference"] == "" and float(gain["reference_weight_decay"]) == 0.0, "the reference lies in the same part"
    member = next(line for line in format_summary(summary_rows(collect(faceted))).splitlines() if line.startswith("wd0.6-peak_lr0.0004 "))
    assert member.split()[:3] == ["wd0.6-peak_lr0.0004", "0.6", "0.0004"]


def test_a_notebook_draws_one_part_at_a_time(faceted):
    study = pj.open_study(faceted.parent)
    legend = study.figure("loss_curves", part="peak lr = 0.0008").axes[0].get_legend().get_texts()
    assert [entry.get_text() for entry in legend] == ["λ = 0", "λ = 0.1", "λ = 0.6", "λ = 1 (diverged)"]
    for part in (None, "peak lr = 3"):
        with pytest.raises(UserError, match="name one of peak lr = 0.0002, peak lr = 0.0004, peak lr = 0.0008"):
            study.figure("loss_curves", part=part)


def ticks(results, name="held_out_loss"):
    axes = draw_figure(results, name).axes[-1]
    return [label.get_text() for label in axes.get_xticklabels()], axes.get_xlabel()


def test_the_axis_is_the_learning_rate_where_decay_is_one(tmp_path):
    results = collect(write_study(tmp_path, along("train.peak_lr", 1e-3, 2e-3, 5e-3, 1e-2)))
    found = [1 / (0.1 * rate * results.config.train.steps) for rate in results.points]
    texts, label = ticks(results)
    assert texts == [f"{rate:g}\n{share:.2g}" for rate, share in zip(results.points, found)]
    assert label == "peak learning rate (log); below: timescale, share of run"
    text = words(tmp_path / "planted")
    assert (
        "What does peak learning rate do" in text
        and "they differ in one number, the peak learning rate (0.001, 0.002, 0.005, 0.01). Weight decay is λ = 0.1 for all." in text
    )
    assert "lowest at peak lr = 0.005 (3.100" in text


def test_no_timescale_below_a_rate_without_decay_or_another_field(tmp_path):
    texts, label = ticks(collect(write_study(tmp_path / "rate", along("train.peak_lr", 1e-3, 2e-3, 5e-3, 1e-2, decay=(0.0,)))))
    assert texts == ["0.001", "0.002", "0.005", "0.01"] and label == "peak learning rate (log)"
    texts, label = ticks(collect(write_study(tmp_path / "width", along("model.d_model", 64, 96, 128, 256))))
    assert texts == ["64", "96", "128", "256"] and label == "model.d_model (log)"


def test_one_timescale_says_which_decays_follow(tmp_path):
    study = write_study(tmp_path, along("train.peak_lr", 1e-3, 2e-3, 5e-3, 1e-2, timescales=(0.8,)))
    decays = [1 / (0.8 * rate * collect(study).config.train.steps) for rate in (1e-2, 5e-3, 2e-3, 1e-3)]
    assert f"one timescale, 0.8 of the run: λ is {', '.join(f'{d:.3g}' for d in decays)}." in words(study)


@pytest.mark.parametrize(
    "field, values",
    [("train.peak_lr", (1e-3, 2e-3, 5e-3, 1e-2)), ("model.d_model", (64, 96, 128, 256)), ("train.warmup_fraction", (0.0, 0.1, 0.2, 0.3))],
)
def test_another_field_has_figures_and_no_claim_about_decay(tmp_path, field, values):
    study = write_study(tmp_path, along(field, *values))
    results, text = collect(study), words(study)
    assert results.points == values and Part.of(results).verdicts == []
    assert "which this study does not compare" in text
    for phrase in ("claims of the paper", "no verdict", "supports", "more weight decay", "smallest weight decay", "two λ", "over λ"):
        assert phrase not in text, phrase
    for name in shown_figures(study):
        draw_figure(results, name)


def test_sizes_differ_and_say_so(tmp_path):
    text = words(write_study(tmp_path, along("model.d_model", 64, 96, 128, 256)))
    assert "of 0.35 million to 1.4 million parameters" in text and "Tiny models: 0.35 million to 1.4 million" in text
    assert ", on the same batches; they differ" in text, "not from the same parameters"


def test_words_are_categories_in_the_order_of_the_config(tmp_path):
    study = write_study(tmp_path, replace(along("decay.mask", "olmo", "all", "matrices-only"), loss=(3.3, 3.1, 3.2)))
    results = collect(study)
    assert results.points == ("olmo", "all", "matrices-only") and list(positions(results).values()) == [0.0, 1.0, 2.0]
    assert "one setting, decay.mask (olmo, all, matrices-only)" in words(study)
    assert ticks(results)[0] == ["olmo", "all", "matrices-only"]
    for name in shown_figures(study):
        draw_figure(results, name)


def test_zero_stands_apart_on_a_logarithmic_axis_and_not_on_a_linear_one(tmp_path):
    shares = positions(collect(write_study(tmp_path / "linear", along("train.warmup_fraction", 0.0, 0.1, 0.2, 0.25))))
    assert shares == {0.0: 0.0, 0.1: 0.1, 0.2: 0.2, 0.25: 0.25}
    wide = positions(collect(write_study(tmp_path / "log", along("train.z_loss", 0.0, 1e-5, 1e-4, 1e-3))))
    assert list(wide.values()) == pytest.approx([-6, -5, -4, -3])


def test_decay_is_the_axis_before_any_other_field(tmp_path):
    for decays, fields, axis, parts in (
        ((0.0, 1.0), (("train.peak_lr", RATES),), "weight_decay", 3),
        ((1.0,), (("train.peak_lr", RATES[:1]), ("model.d_model", (64, 96)), ("train.steps", (50, 100, 200))), "model.d_model", 3),
        ((1.0,), (("train.peak_lr", RATES[:1]),), "weight_decay", 1),
    ):
        planted = Planted(grid=GridConfig(weight_decay=decays, timescales=None, fields=fields))
        results = collect(write_study(tmp_path / str(parts) / axis, planted, stages=()))
        assert (results.axis.field, len(results.slices)) == (axis, parts)
        assert [m for part in results.slices for m in part.members] and sum(len(part.members) for part in results.slices) == len(results.members)


def test_seeds_are_averaged_within_a_part(tmp_path):
    planted = Planted(
        loss=(3.3, 3.2, 3.1, 3.0), grid=GridConfig(weight_decay=(0.0, 1.0), timescales=None, seeds=(0, 1), fields=(("train.peak_lr", RATES[:2]),))
    )
    first, second = collect(write_study(tmp_path, planted)).slices
    assert [m.name for m in first.at(1.0)] == ["wd1-peak_lr0.0002", "wd1-peak_lr0.0002-s1"]
    assert (first.losses, second.losses) == ({0.0: 3.3, 1.0: 3.2}, {0.0: 3.1, 1.0: 3.0})
    found = difference(second, score_measure(("topic",), gain=False), 0.0, 1.0)
    assert found.seeds == 2 and found.value == pytest.approx(0.05, abs=0.005)


def test_a_partial_faceted_study_has_a_page(tmp_path):
    study = write_study(tmp_path, BY_RATE, stages=("prepare", "init"))
    page = Page(write_report(collect(study)).read_text(encoding="utf-8"))
    assert page.text.count("no verdict on any of the six claims") == len(RATES) and "Partial study" in page.text
    fields = (("train.peak_lr", RATES), ("model.d_ff", (64, 96)))
    by_rate = replace(BY_RATE, grid=replace(BY_RATE.grid, weight_decay=(0.1,), changes=(), fields=fields))
    assert words(write_study(tmp_path / "rates", by_rate, stages=())).count("No member of this part has finished yet.") == 2


def test_a_swept_fine_tuning_cuts_the_page_and_shows_what_is_of_the_base_models_once(tmp_path):
    grid = GridConfig(timescales=(None, 4.0), fields=(("finetune.peak_lr", (1e-3, 3e-3)),))
    study = write_study(tmp_path, Planted(loss=(3.3, 3.2), grid=grid))
    page = write_report(collect(study)).read_text(encoding="utf-8")
    assert "Two language models" in page and "fine-tuned in several ways: the fine-tuning peak learning rate (0.001, 0.003)" in page
    results = collect(study)
    assert [part.title for part in results.slices] == ["SFT lr = 0.001", "SFT lr = 0.003"]
    assert page.count('id="figure-SFT_lr0.001-loss_curves"') == 1 and "figure-SFT_lr0.003-loss_curves" not in page
    assert 'id="figure-SFT_lr0.003-gains"' in page and not list((study / "report" / "figures").glob("SFT_lr0.003-gap.*"))
    for m in results.members:
        assert m.loss is not None and m.record("gap") is not None and set(m.before) == set(m.after) == {"topic", "sentiment"}
        assert all(
            dict(m.member.overrides)["finetune.peak_lr"] == run.run.fields["peak_lr"]
            for run in results.runs
            if run.run.stage == "finetune" and run.run.member == m.name
        )
