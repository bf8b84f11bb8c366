"""What a completion answers, and which answer the majority gives."""

import string
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plasticity_jax.evaluate.answers import GRADERS, extract_answer, judge, majority_answer, majority_index

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
        # What only announces the answer ends with a colon; what is the answer already does not.
        ("The answer is A: He went", "A: He went"),
        ("The answer is yes: the study shows it", "yes: the study shows it"),
        ("The answer is 5. Note: check", "5. Note: check"),
        ("The answer is 3:4", "3:4"),
        ("The answer is 5 (check: 2+3=5)", "5 (check: 2+3=5)"),
        ("The Answer Is B", "B"),
        ("The answer to the second question is 7", "7"),
        ("**Final Answer:** 42", "42"),
        ("**Final Answer**\n$5$", "$5$"),
        ("#### 72", "72"),
        ("The answer is 5. I hope this answer is correct.", "5. I hope this answer is correct."),
        ("<think>\\boxed{3}, the answer is 3</think>The answer is 4", "4"),
        ("<think>\\boxed{3}, the answer is 3", None),
    ],
)
def test_extraction_examples(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "faithful", "clean"),
    [
        ("The answer is 3:4", "4", "3:4"),
        ("The answer is A: He went", "He went", "A: He went"),
        ("Answer: C", None, "C"),
        ("<think>\\boxed{3}</think> The answer is 4", "3", "4"),
        ("The answer is 5. I hope this answer is correct.", "correct.", "5. I hope this answer is correct."),
    ],
)
def test_faithful_extraction_knows_one_marker_and_every_colon(text, faithful, clean):
    assert (extract_answer(text, faithful=True), extract_answer(text)) == (faithful, clean)


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
        ("\u2212132", "-132", "number", True),
        ("-$132", "-132", "number", True),
        ("-132", "\u2212132", "number", True),
        ("\u20ac132", "132", "number", True),
        ("\u00a3132.", "132", "number", True),
        ("132 \u20ac", "132", "number", True),
        ("132 apples", "132", "number", True),
        ("132 apples and 5 pears", "132", "number", False),
        ("132 cm^2", "132", "number", True),
        ("1.32e2", "132", "number", True),
        ("1e3", "1000", "number", True),
        ("1e999999999", "1", "number", False),
        ("1,3,2", "132", "number", False),
        ("13,2", "132", "number", False),
        ("1320,000", "1320000", "number", False),
        ("1,320,000.5", "1320000.5", "number", True),
        ("1{,}320", "1320", "number", True),
        ("1\u202f320", "1320", "number", True),
        ("1 320", "1320", "number", False),
        ("132 (carry 1)", "132", "number", True),
        ("132 because 47+85=132", "132", "number", True),
        ("**132**", "132", "number", True),
        ("\\(132\\)", "132", "number", True),
        ("132!", "132", "number", False),
        ("\u201cyes\u201d", "yes", "exact", True),
        ("yes\u2014the study shows it", "yes", "exact", True),
        ("\\text{yes}", "yes", "exact", True),
        ("$\\textbf{yes}$.", "yes", "exact", True),
        ("<b>Yes</b>, it does", "yes", "exact", True),
        ("yes: it does", "yes", "exact", True),
        ("yes-no", "yes", "exact", False),
        ("yes/no", "yes", "exact", False),
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


# Around a letter: nothing of it is part of the answer.
LETTERED = [
    "{}",
    " {}. ",
    "({})",
    "[{}]",
    "{{{}}}",
    "{})",
    "**{}**",
    "__{}__",
    "_{}_",
    "*{}*",
    "`{}`",
    '"{}"',
    "“{}”",
    "‘{}’",
    "«{}»",
    "<b>{}</b>",
    "$ {} $",
]
LETTERED += [
    r"\({}\)",
    r"\[{}\]",
    r"\text{{{}}}",
    r"\text{{({})}}",
    r"\textbf{{{}}}",
    r"$\mathrm{{{}}}$",
    r"\boxed{{{}}}",
    "- {}",
    "**({})**",
    "(**{}**)",
]
LETTERED += [
    "option {}",
    "Option ({})",
    "choice {}.",
    "Answer: {}",
    "the answer is ({}) because",
    "the correct option is {}",
    "the correct answer is **{}**",
]
# The letter and what a model adds to it.
EXPLAINED = [
    "{} because it is hot",
    "{}, because it is hot",
    "{} (Paris)",
    "{}. Paris",
    "{}: Paris",
    "{}) Paris",
    "{} - Paris",
    "{} – Paris",
    "{} — Paris",
]
EXPLAINED += [
    "{}—Paris",
    "{}\nso it is",
    "({}) Paris",
    "**{}** Paris",
    "**{}.** Paris",
    "<b>{}</b> Paris",
    "{} is correct",
    "{}; Paris",
    "{}. A dog",
    "{}, a dog",
]


@pytest.mark.parametrize("form", LETTERED + EXPLAINED)
def test_a_letter_in_any_form_is_that_letter(form):
    for letter in "ABCDEFGHIJ":
        for written in (letter, letter.lower()):
            assert [gold for gold in "ABCDEFGHIJ" if judge(form.format(written), gold, "letter")] == [letter], form.format(written)


@pytest.mark.parametrize(
    "text", ["A dog", "A man went", "a man", "a.m.", "A.M.", "I think so", "i.e.", "A and B", "A or B.", "(A) and (B)", "A, B", "A/B"]
)
@pytest.mark.parametrize("grader", ["letter", "letter-strict"])
def test_articles_abbreviations_and_two_letters_are_no_letter(text, grader):
    assert [gold for gold in "ABCDEFGHIJ" if judge(text, gold, grader)] == []


@pytest.mark.parametrize("text", ["K", "Paris", "", "Because...", "B-flat", "Ab", "AB", "not C", "A & B", "both A and B", "c he went"])
def test_other_words_are_no_letter(text):
    assert [gold for gold in "ABCDEFGHIJ" if judge(text, gold, "letter")] == []


def test_a_letter_before_a_word_is_one_unless_it_is_a_word_itself():
    assert judge("C he went", "C", "letter") and not judge("A he went", "A", "letter")
    assert not judge("c he went", "C", "letter")


# The original's newer evaluator: the first word, punctuation at its end off, case ignored.
@pytest.mark.parametrize(
    ("text", "strict", "first_word"),
    [
        ("B", "B", "B"),
        ("b.", "B", "B"),
        ("E because", "E", "E"),
        ("A dog", None, "A"),
        ("A and B", None, "A"),
        ("(B)", "B", None),
        ("**B**", "B", None),
        ("option B", "B", None),
        ("B) Paris", "B", "B"),
        ("B/C", None, None),
        ("“B”", "B", None),
    ],
)
def test_strict_letters_and_first_words(text, strict, first_word):
    for grader, faithful, letter in (
        ("letter", False, strict),
        ("letter", True, first_word),
        *(("letter-strict", faithful, strict) for faithful in (False, True)),
        *(("letter-first-word", faithful, first_word) for faithful in (False, True)),
    ):
        assert [gold for gold in "ABCDEFGHIJ" if judge(text, gold, grader, faithful=faithful)] == ([letter] if letter else []), (grader, faithful)


def test_letter_falls_back_on_the_text():
    assert judge("Paris.", "Paris", "letter") and judge(" (New York)", "New York", "letter")
    assert not judge("Paris", "paris", "letter") and not judge("A dog", "A", "letter")


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
    for grader in GRADERS:
        assert judge(answer, "Z", grader) is False


def test_unknown_grader_is_refused():
    with pytest.raises(ValueError, match="'fuzzy' is unknown; use one of exact, text, number, letter, letter-strict, letter-first-word"):
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
