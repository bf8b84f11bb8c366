"""What a completion answers, and which answer the majority gives."""

import string
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plasticity_jax.evaluate.answers import extract_answer, judge, majority_answer, majority_index

PLAIN = st.text(alphabet=string.ascii_letters + string.digits + " .,+-", min_size=1).filter(lambda text: text.strip())
# Balanced braces, as in \frac{1}{2}.
BALANCED = st.recursive(PLAIN, lambda inner: st.builds("{}{{{}}}{}".format, PLAIN, inner, PLAIN), max_leaves=5)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{42}", "42"),
        ("\\boxed{1} then \\boxed{ \\frac{1}{2} }.", "\\frac{1}{2}"),
        ("\\boxed{\\boxed{3}}", "3"),
        ("\\boxed{7} and \\boxed{8", "7"),
        ("\\boxed{5}. The answer is 6.", "5"),
        ("7+5=12, carry 1. The answer is 132.", "132."),
        ("The answer is 1. No, the answer is 2", "2"),
        ("The answer is: B", "B"),
        ("The answer is as follows: first: 9 ", "9"),
        ("Note: The answer is yes", "yes"),
        ("\\boxed{a: b}", "a: b"),
        ("The answer is\n positive.\n", "positive."),
        ("The answer is", None),
        ("The answer is 5:", None),
        ("\\boxed{  }", None),
        ("no idea", None),
        ("", None),
    ],
)
def test_extraction_examples(text, answer):
    assert extract_answer(text) == answer


@given(before=PLAIN, first=BALANCED, last=BALANCED, after=PLAIN)
def test_last_box_wins_with_nested_braces(before, first, last, after):
    text = f"{before}\\boxed{{{first}}}{before} the answer is \\boxed{{{last}}}{after}"
    assert extract_answer(text) == last.strip()


@given(before=PLAIN, answer=PLAIN.filter(lambda text: "answer is" not in text), lead=st.sampled_from(["", "so:", "a: b:"]))
def test_text_after_the_last_marker_and_its_last_colon(before, answer, lead):
    assert extract_answer(f"{before}answer is {before} answer is {lead}{answer}") == answer.strip()


@given(st.text().filter(lambda text: "answer is" not in text and "\\boxed{" not in text))
def test_no_marker_is_no_answer(text):
    assert extract_answer(text) is None


@given(st.text(alphabet="\\boxed{} answer is:\n5"))
def test_an_answer_is_stripped_text_of_the_completion(text):
    answer = extract_answer(text)
    assert answer is None or (answer and answer == answer.strip() and answer in text)


@pytest.mark.parametrize(
    ("answer", "gold", "grader", "right"),
    [
        ("Positive.", "positive", "exact", True),
        ("positive. Human", "positive", "exact", True),
        ('"positive"', "positive", "exact", True),
        ("- positive", "positive", "exact", True),
        ("not positive", "positive", "exact", False),
        ("...", "positive", "exact", False),
        ("132.", "132", "number", True),
        ("1,320", "1320", "number", True),
        ("$132.00.", "132", "number", True),
        ("(-0.5)", "-.5", "number", True),
        ("0132", "132", "number", True),
        ("-132", "132", "number", False),
        ("133", "132", "number", False),
        ("132 or 133", "132", "number", False),
        ("١٣٢", "132", "number", False),
        ("nan", "nan", "number", False),
        ("0.30000000000000001", "0.3", "number", False),
        (None, "132", "number", False),
        (None, "positive", "exact", False),
    ],
)
def test_graders(answer, gold, grader, right):
    assert judge(answer, gold, grader) is right


@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12))
def test_number_grader_agrees_with_integers(first, second):
    assert judge(f"{first:,}.", str(first), "number")
    assert judge(f" {first}", str(second), "number") is (first == second)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("D. text", "D"),
        ("c", "C"),
        ("c)", "C"),
        ("**B**", "B"),
        ("\\text{(B)}", "B"),
        ("\\textbf{A}", "A"),
        ("$B$", "B"),
        ("B: Paris", "B"),
        ("B - Paris", "B"),
        ("B\nso", "B"),
        (" J. ", "J"),
        ("E", "E"),
        ("e", "E"),
        ("A and B", None),
        ("A or B.", None),
        ("(A) and (B)", None),
        ("A, B", None),
        ("A/B", None),
        ("Because...", None),
        ("A dog", None),
        ("B because", None),
        ("a.m.", None),
        ("K", None),
        ("Paris", None),
        ("", None),
    ],
)
def test_letter_of_an_answer(answer, letter):
    assert [gold for gold in "ABCDEFGHIJ" if judge(answer, gold, "letter")] == ([letter] if letter else [])
    assert judge(answer, "A. first", "letter") is (letter == "A")
    # The original knows A to D alone: of the others, only the letter itself is right, apart from punctuation around it.
    faithful = [gold for gold in "ABCDEFGHIJ" if judge(answer, gold, "letter", faithful=True)]
    assert faithful == ([letter] if letter and (letter in "ABCD" or answer.strip(" .") == letter) else [])


def test_letter_falls_back_on_the_text():
    assert judge("Paris.", "Paris", "letter") and judge(" (New York)", "New York", "letter")
    assert not judge("Paris", "paris", "letter") and not judge("A dog", "A", "letter")
    assert not judge("E. text", "E", "letter", faithful=True)


def test_majority_by_letter():
    completions = ["answer is Paris", "answer is (e) second", "answer is E."]
    assert majority_index(completions, "letter") == 1
    assert majority_index(completions, "letter", faithful=True) == 0
    assert majority_answer(completions, "letter") == "(e) second"


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 50_000,
        "\\boxed{" * 50_000 + "}" * 50_000,
        "{" * 10**5,
        "answer is:" * 50_000,
        "answer is" + "(" * 10**5,
        "answer is" + "\\text{" * 50_000,
        "answer is A" + " -" * 10**5,
        "answer is A" + ")." * 10**5 + "x",
        "answer is" + " " * 10**5 + "x",
        "answer is " + "1," * 10**5 + "x",
    ],
)
def test_hostile_texts_take_linear_time(text):
    answer = extract_answer(text)
    for grader in ("exact", "number", "letter"):
        assert judge(answer, "Z", grader) is False


def test_unknown_grader_is_refused():
    with pytest.raises(ValueError, match="'fuzzy' is unknown; use one of exact, number, letter"):
        judge("1", "1", "fuzzy")
    with pytest.raises(ValueError, match="'fuzzy'"):
        majority_index(["1"], "fuzzy")


@pytest.mark.parametrize(
    ("completions", "index", "answer"),
    [
        (["The answer is 1.", "The answer is 2.", "The answer is 2"], 1, "2."),
        (["answer is 2", "answer is 1,000", "answer is 1000.0", "answer is 2", "answer is 3"], 0, "2"),  # tie: first
        (["x", "y", "answer is Yes.", "answer is yes"], 2, "Yes."),
        (["x", "x", "answer is 1"], 0, None),  # no answer twice is no cluster of two
        (["answer is 1", "x", "x"], 0, "1"),
        (["answer is 9" + "." * 128, "answer is 8"], 0, None),  # stated before the last 128 characters
        (["answer is 8", "answer is 9" + "." * 128, "answer is 9"], 0, "8"),  # and so no cluster of two
        (["answer is 9" + "." * 117, "answer is 8"], 0, "9" + "." * 117),
    ],
)
def test_majority_examples(completions, index, answer):
    assert majority_index(completions) == index
    assert majority_answer(completions) == answer


def test_majority_clusters_as_its_grader_does():
    completions = ["answer is 7", "answer is no, sir", "answer is No."]
    assert majority_index(completions) == 0
    assert majority_index(completions, "exact") == 1


def test_majority_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one completion"):
        majority_answer([])


@given(st.lists(st.one_of(st.none(), st.integers(0, 3)), min_size=1, max_size=12))
def test_majority_is_the_first_of_the_most_common(answers):
    completions = ["hm" if answer is None else f"The answer is {answer}." for answer in answers]
    counts = Counter(answer for answer in answers if answer is not None)
    size = [counts[answer] if answer is not None else 1 for answer in answers]
    assert majority_index(completions) == size.index(max(size))
