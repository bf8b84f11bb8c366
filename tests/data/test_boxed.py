"""The last box of a solution, as MATH and SimpleScaling mark the answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plasticity_jax.data.tasks.boxed import last_boxed


@pytest.mark.parametrize(
    "text, content",
    [
        ("so \\boxed{5}", "5"),
        ("\\boxed{1} or \\boxed{ \\frac{1}{2} }.", "\\frac{1}{2}"),
        ("\\boxed{3} then \\boxed{4", "3"),
        ("none", None),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("$\\boxed 5$ is", "5"),
        ("\\boxedtext{3}", None),
        ("\\boxed", None),
        ("\\boxed{}", ""),
        ("{\\boxed{a}} }{ ", "a"),
        ("\\boxed{a \\boxed{b} c}", "b"),
    ],
)
def test_the_last_box_is_found(text, content):
    assert last_boxed(text) == content


@given(st.lists(st.sampled_from(["\\boxed", "{", "}", " ", "\\", "$", "\n", "x", "\\{"]), max_size=40).map("".join))
def test_any_text_has_a_last_box_or_none(text):
    found = last_boxed(text)
    assert found is None or found in text


def test_the_last_box_of_a_hostile_text_is_found_in_linear_time():
    for part in ("\\boxed{", "\\boxed ", "{", "}", "\\", "\\boxed{}"):
        last_boxed(part * 200_000)
