"""Texts as models write them, with the answer that a reader finds in each and the verdict on it."""

import json
from pathlib import Path

import pytest

from plasticity_jax.evaluate.answers import extract_answer
from plasticity_jax.evaluate.grading import Grading

TEXTS = [json.loads(line) for line in (Path(__file__).parent / "completions_with_answers.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("row", TEXTS, ids=lambda row: row["text"][-40:])
def test_extraction_finds_the_answer_a_reader_finds(row):
    assert extract_answer(row["text"]) == row["answer"]


@pytest.mark.parametrize("grader", sorted({row["grader"] for row in TEXTS}))
def test_the_verdict_is_a_readers(grader):
    rows = [row for row in TEXTS if row["grader"] == grader]
    with Grading(grader, faithful=False, workers=1, seconds=20.0) as grading:
        found = grading.judge([(extract_answer(row["text"]), row["gold"]) for row in rows])
    assert [row["text"] for row, verdict in zip(rows, found) if verdict != row["verdict"]] == []
