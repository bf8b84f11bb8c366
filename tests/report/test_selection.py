"""`finetune.select`: the best of the swept fine-tunings is chosen on validation rows, and only then read on test rows."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from synthetic_study import VALIDATION, Planted, write_study
from test_report import Page

import plasticity_jax as pj
from plasticity_jax.config import FinetuneConfig, GridConfig, load_config
from plasticity_jax.errors import UserError
from plasticity_jax.report.page import Part, collect, numbers_of, render_page
from plasticity_jax.report.selection import CHOSEN, choice_rows, win_rows
from plasticity_jax.report.sentences import warnings

RATES = (1e-3, 3e-3)
# Rate by rate: at λ = 0 validation chooses the rate that is worse on the test; at λ = 1 both are equal on validation.
SWEPT = Planted(
    loss=(3.3, 3.2, 3.3, 3.2),
    before=(0.1,) * 4,
    after=(0.60, 0.70, 0.80, 0.50),
    validation=(0.70, 0.60, 0.50, 0.60),
    grid=GridConfig(weight_decay=(0.0, 1.0), timescales=None, seeds=(0, 1), fields=(("finetune.peak_lr", RATES),)),
    finetune=FinetuneConfig(select="validation", seeds=(3, 5)),
)
TITLE = f"SFT = {CHOSEN}"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("selected"), SWEPT)


def test_the_choice_is_numpys_on_the_stored_verdicts(study):
    rows = choice_rows(collect(study))
    assert len(rows) == 2 * 2 * 2  # λ, pretraining seeds, tasks
    for row in rows:
        seed = "-s1" if row["seed"] else ""
        names = [f"wd{row['weight_decay']:g}-sft_peak_lr{rate:g}{seed}-{row['task']}-s" for rate in RATES]
        scores = [np.mean([json.loads(p.read_text())["per_problem"]["greedy"] for p in study.glob(f"validation/{n}*/results.json")]) for n in names]
        best = int(np.argmax(scores))  # the first of equals
        tests = [json.loads(path.read_text())["per_problem"]["greedy"] for path in study.glob(f"evaluate/{names[best]}*-after-*/results.json")]
        assert (row["finetune.peak_lr"], row["member"]) == (RATES[best], f"wd{row['weight_decay']:g}{seed}")
        assert row["validation"] == pytest.approx(scores[best]) and len(tests) == 2 and row["test"] == pytest.approx(np.mean(tests))
        assert (row["settings"], row["scored"]) == (2, 2)
    assert {row["finetune.peak_lr"] for row in rows} == {RATES[0]}, "on the test the larger rate is better at λ = 0"


def test_the_selected_part_compares_the_chosen_and_nothing_else(study):
    results = collect(study)
    assert [part.title for part in results.slices] == ["SFT lr = 0.001", "SFT lr = 0.003", TITLE]
    part, first = results.slices[-1], results.slices[0]
    assert [m.name for m in part.members] == ["wd0-sft_chosen", "wd1-sft_chosen", "wd0-s1-sft_chosen", "wd1-s1-sft_chosen"]
    for m, same in zip(part.members, first.members, strict=True):
        assert m.before == same.before and m.loss == same.loss
        assert all(m.after[task] is same.after[task] for task in results.tasks)
    assert [(v.verdict, v.effect) for v in Part.of(part).verdicts] == [(v.verdict, v.effect) for v in Part.of(first).verdicts]


def test_the_page_has_a_part_and_two_tables_of_it(study):
    results = collect(study)
    parts = [Part.of(part) for part in results.slices]
    numbers = numbers_of(results, parts)
    page = Page(render_page(results, parts, numbers))
    text = " ".join(page.text.split())
    assert (
        TITLE in text and "Chosen fine-tunings" in text and "After the fine-tuning that was best for each model on validation rows, accuracy" in text
    )
    assert len(page.ids) == len(set(page.ids)) and "Whether it was learned is decided on validation rows." in text
    (chosen,) = [row for row in numbers["pairwise"] if row.get("finetune.select") == CHOSEN and row["measure"] == "score after"]
    assert chosen["difference"] == pytest.approx(0.1, abs=0.01)
    assert len(numbers["selected"]) == 8 and len(numbers["validation"]) == 16
    assert pj.open_study(study.parent).figure("scores", part=TITLE).axes


def test_the_share_of_settings_in_which_the_later_value_wins(study):
    """0.6 to 0.7 with one rate, 0.8 to 0.5 with the other."""
    assert [
        (row["task"], row["from"], row["to"], row["settings"], row["later_wins"], row["ties"], row["share"]) for row in win_rows(collect(study))
    ] == [(task, 0.0, 1.0, 2, 1, 0, 0.5) for task in ("topic", "sentiment")]


def test_a_setting_of_which_a_seed_is_missing_is_not_chosen(study, tmp_path):
    again = tmp_path / "planted"
    shutil.copytree(study, again)
    for run in again.glob("validation/wd0-sft_peak_lr0.001-topic-s5-*"):
        shutil.rmtree(run)
    (row,) = [r for r in choice_rows(collect(again)) if (r["weight_decay"], r["task"], r["seed"]) == (0.0, "topic", 0)]
    assert (row["finetune.peak_lr"], row["settings"], row["scored"]) == (3e-3, 2, 1)


def test_nothing_is_chosen_unless_asked_for(tmp_path):
    results = collect(write_study(tmp_path, replace(SWEPT, finetune=FinetuneConfig())))
    assert len(results.slices) == 2 and choice_rows(results) == []


@pytest.mark.parametrize("validation, after, learned", [((0.2, 0.15), (0.9, 0.9), False), ((0.9, 0.1), (0.1, 0.1), True)])
def test_learned_is_decided_on_validation_rows_where_there_are_any(tmp_path, validation, after, learned):
    planted = Planted(loss=(3.3, 3.2), before=(0.0, 0.0), after=after, validation=validation)
    results = collect(write_study(tmp_path, planted))
    assert ("topic" in results.learned) == learned and results.learned_on("topic") == "validation"
    assert any("learned topic: on its validation rows" in line for line in warnings(results)) != learned
    bound, majority = results.lower_bound("topic")
    share, z = max(validation), 1.959963984540054  # Wilson 1927
    n = VALIDATION
    expected = (share + z**2 / (2 * n) - z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))) / (1 + z**2 / n)
    assert bound == pytest.approx(expected, abs=1e-6) and majority == 0.2
    without = collect(write_study(tmp_path / "test", replace(planted, validation=())))
    assert ("topic" in without.learned) == (after[0] > 0.2) and without.learned_on("topic") == "test"


TINY = "configs/tiny.py"


@pytest.mark.parametrize(
    "changes, message",
    [
        ((), r"^finetune.select='validation' needs rows to choose on; set tasks.topic.validation_rows, such as 200.$"),
        (
            (("tasks.topic.validation_rows", "8"),),
            r"^finetune.select='validation' has nothing to choose from; sweep a field of finetune in grid.fields, or set it to 'none'.$",
        ),
        (
            (("tasks.topic.validation_rows", "8"), ("grid.fields", "(('finetune.select', ('none', 'validation')),)")),
            r"grid.fields sets finetune.select, which changes speed, cadence or place and not the result",
        ),
    ],
)
def test_a_choice_without_rows_or_settings_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        load_config(TINY, [("finetune.select", "validation"), *changes])
