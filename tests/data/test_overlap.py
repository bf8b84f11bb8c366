"""The overlap rule: exactly the rows that a comparison of all pairs finds."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plasticity_jax.data.tasks.holdout import Question, disjoint_rows, split_by_hash
from plasticity_jax.data.tasks.base import Example, RowSettings
from plasticity_jax.data.tasks.overlap import drop_overlaps, overlapping

texts = st.lists(st.lists(st.sampled_from("abcdefghij"), max_size=9).map(" ".join), max_size=12)


def similarity(one, other):
    one, other = (set(re.findall(r"\w+", text.lower())) for text in (one, other))
    return len(one & other) / len(one | other) if one and other else 0.0


@given(rows=texts, others=texts, threshold=st.sampled_from([0.2, 0.5, 0.6, 0.8, 1.0]))
def test_the_search_is_exact(rows, others, threshold):
    expected = {i for i, row in enumerate(rows) if any(similarity(row, other) >= threshold for other in others)}
    assert overlapping(rows, others, threshold=threshold) == expected


def test_rows_at_the_threshold_go_and_the_others_keep_their_order():
    rows = ["a b c d", "x y", "A, B; c!", "a b"]
    # Shares of common words with "a b c e f": 3/6, 0, 3/5, 2/5.
    assert drop_overlaps(rows, ["a b c e f"], str) == (["a b c d", "x y", "a b"], 1)


def question(name, *texts):
    return Question(Example(name, texts[0], "r", "a", "generated", "generated"), texts)


def test_a_training_row_goes_for_its_question_or_its_passage_whatever_is_drawn():
    train = [question("1", "how many apples has Ann", "p q r s"), question("2", "what else", "u v w x"), question("3", "why", "k l")]
    test = [question("4", "how many apples has Bob", "z"), question("5", "who", "u v w y")]
    for test_rows in (1, 2):
        rows = disjoint_rows(train, test, RowSettings(9, test_rows, 0.1, 0), {"read": 5})
        assert [row.id for row in rows.train] == ["3"] and len(rows.test) == test_rows
        assert rows.counts == {"read": 5, "resemble a test row": 2, "train": 1, "test": 2}


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_questions_on_one_passage_never_part(share):
    questions = [question(f"{passage}-{i}", f"question {i}", f"passage {passage}") for passage in range(50) for i in range(3)]
    sides = [{each.texts[-1] for each in side} for side in split_by_hash(questions, RowSettings(1, 1, share, 0))]
    assert not sides[0] & sides[1] and len(sides[0]) + len(sides[1]) == 50
