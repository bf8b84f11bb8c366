"""The paper's six tasks: original schemas, exact prompts and targets, every filter counted, no test question in training, errors in one line."""

import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from published_files import write_published as write

from plasticity_jax.data.tasks import build_task, medmcqa, metamathqa, pubmedqa, race, read_task, simplescaling, tasks, write_task
from plasticity_jax.data.tasks import mmluprocot as mmlu
from plasticity_jax.data.tasks.base import RowSettings, normalized, shuffled
from plasticity_jax.data.tasks.published import Candidate, FirstShuffled, Published, build_rows, example_of
from plasticity_jax.data.tasks.race import clean
from plasticity_jax.errors import UserError

ALL = 10**9

GSM8K = [
    {"question": "How many legs have 3 dogs?", "answer": "3*4=<<3*4=12>>12\n#### 12"},
    {"question": "How much is 1,000 and 200?", "answer": "#### 1,200"},
    {"question": "No mark", "answer": "It is 3"},
    {"question": "Nothing after it", "answer": "well\n#### "},
]
MATH = [
    *(
        {
            "problem": f"Level {i} problem",
            "solution": f"first \\boxed{{0}}, then $\\boxed{{\\frac{{{i}}}{{2}}}}$.",
            "level": f"Level {i}",
            "type": "A",
        }
        for i in range(1, 6)
    ),
    {"problem": "Older form", "solution": "so $x=\\boxed 7$.", "level": "Level 1", "type": "Algebra"},
    {"problem": "No box", "solution": "so 7", "level": "Level 1", "type": "Algebra"},
    {"problem": "No level", "solution": "\\boxed{7}", "level": "Level ?", "type": "Algebra"},
]
MATH_FILES = {"gsm8k-platinum": GSM8K, "math": MATH}

META = [
    {"query": "What is 1+1?", "response": "1+1=2\n#### 2\nThe answer is: 2", "type": "GSM_AnsAug", "original_question": "What is 1+1?"},
    {"query": "Say it otherwise: 2+2?", "response": "So $\\boxed{4}$.", "type": "MATH_Rephrased", "original_question": "What is 2+2?"},
    {"query": "how many legs have 3 dogs", "response": "The answer is: 12", "type": "GSM_AnsAug", "original_question": "x"},
    {"query": "Three dogs; their legs?", "response": "The answer is: 12", "type": "GSM_Rephrased", "original_question": "How many legs have 3 dogs?"},
    {"query": "Empty", "response": "  ", "type": "GSM_AnsAug", "original_question": "Empty"},
]

MED_TRAIN = [
    {"system_prompt": "You are", "question": "Select one. Question: Which?\nOptions:\nA. a\nB. b\nC. c\nD. d", "response": "Thinking.\n\nAnswer: C."},
    {"system_prompt": "You are", "question": "Question: No stop?\nOptions:\nA. a\nB. b\nC. c\nD. d", "response": "Answer: B or so. Answer: A"},
    {"system_prompt": "You are", "question": "Question: Repeated?\nOptions:\nA. ade\nB. b\nC. c\nD. d", "response": "Well.\nAnswer: A. ade."},
    {"system_prompt": "You are", "question": "Question: Sign?", "response": "Answer: C. +60mV"},
    {"system_prompt": "You are", "question": "Question: Note?", "response": "Answer: C.\n\nNote: more."},
    {"system_prompt": "You are", "question": "Question: No such option?", "response": "Answer: F."},
    {"system_prompt": "You are", "question": "Question: Endless?", "response": "so " * 3400 + "Answer: C."},
    {
        "system_prompt": "",
        "question": "Question: Axonal transport is:\nOptions:\nA. Antegrade\nB. Retrograde\nC. Both\nD. None",
        "response": "Answer: C.",
    },
    {"system_prompt": "You are", "question": "Question:  ", "response": "Answer: C."},
]
MED_TEST = [
    {"id": "1", "question": "Axonal transport is:", "opa": "Antegrade", "opb": "Retrograde", "opc": "Both", "opd": "None", "cop": 2, "exp": None},
    {"id": "2", "question": " ", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 0, "exp": "why"},
]


def pubmed(question, contexts=("One.", "Two."), long_answer="It does.", answer="yes"):
    context = {"contexts": list(contexts), "labels": ["A"] * len(contexts), "meshes": []}
    return {"pubid": 7, "question": question, "context": context, "long_answer": long_answer, "final_decision": answer}


PUBMED_TRAIN = [
    pubmed("Does it help?"),
    pubmed("Is it long?", ["x" * 4000]),
    pubmed("Is the end long?", long_answer="y" * 1500),
    pubmed("No end?", long_answer=""),
    pubmed("In between?", answer="perhaps"),
    pubmed("IS IT ASKED, too?"),
]
PUBMED_TEST = [pubmed("Is it asked too?", answer="maybe"), pubmed("Long but a test?", ["z" * 5000], answer="no")]


def mmlu_row(question, answer="J", content="So.\n\nThe answer is J.", options=tuple(f"option {i}" for i in range(10))):
    return {
        "question_id": 1,
        "question": question,
        "options": list(options),
        "answer": answer,
        "answer_index": 9,
        "category": "law",
        "src": "s",
        "cot_id": 0,
        "cot_content": content,
    }


MMLU_TRAIN = [
    *(mmlu_row(f"Question {i // 2}?", content=f"Way {i}. The answer is J.") for i in range(60)),
    mmlu_row("Wrong?", content="The answer is A."),
    mmlu_row("Bracketed?", content="The answer is (J)."),
    mmlu_row("None?", content="It is J."),
    mmlu_row("Colon?", content="the answer is: J"),
    mmlu_row("Long?", content="a" * 6200 + " The answer is J."),
    mmlu_row("Few options?", "C", "The answer is C.", ["yes", "no"]),
    mmlu_row("", content="The answer is J."),
]
MMLU_TEST = [mmlu_row("Held out?", content="x"), mmlu_row("Held out?", content="again"), mmlu_row("Question 3?", content="x")]


def race_row(question, options=("he is young.", "he is old", "a", "b"), answer="A", article="A passage."):
    return {"example_id": "high1.txt", "article": article, "question": question, "options": list(options), "answer": answer}


RACE_TRAIN = [
    race_row("Why   _  .ks5u"),
    race_row("Which?", ["100", "New Yorks6t----", "c", "d [:Zxxk.Com]"], "B"),
    race_row("Long?", article="w" * 6144),
    race_row("Three?", ["a", "b", "c"]),
    race_row("Letter?", answer="E"),
    race_row(" "),
    race_row("But when you see each other, you can share something you didn't have before he or she left: more!"),
]
RACE_TEST = [race_row("Which is it?", ["w", "x", "y", "z"], "D", article="p" * 7000)]

SETS = {
    "MetaMathQA": {"train": META, **MATH_FILES},
    "SimpleScaling": {
        "train": [
            {"question": "Find x.", "attempt": "Solution:\nx is $\\boxed{3}$", "solution": None},
            {"question": "Prove.", "attempt": "Done.", "solution": "s"},
            {"question": "Cut?", "attempt": "It is \\boxed{3", "solution": "s"},
            {"question": "Level 3 problem", "attempt": "\\boxed{1}", "solution": "s"},
        ],
        **MATH_FILES,
    },
    "MedMCQA": {"train": MED_TRAIN, "validation": MED_TEST},
    "PubMedQA": {"pqa_artificial": PUBMED_TRAIN, "pqa_labeled": PUBMED_TEST},
    "MMLUProCoT": {"test": MMLU_TRAIN, "validation": MMLU_TEST},
    "RACE": {"train": RACE_TRAIN, "validation": [race_row("Where?", answer="B")], "test": RACE_TEST},
}


def files_of(folder, name, suffix=".jsonl", **changed):
    return {set_name: write(folder / name / f"{set_name}{suffix}", rows) for set_name, rows in (SETS[name] | changed).items()}


def build(name, files, train_rows=ALL, test_rows=ALL, seed=0, **kwargs):
    return build_task(name, None, train_rows=train_rows, test_rows=test_rows, held_out_fraction=0.1, seed=seed, files=files, **kwargs)


def by_prompt(rows):
    return {row.prompt: row for row in rows}


# --------------------------------------------------------------------------------------------------------------------- prompts, targets


def test_metamathqa_takes_query_and_response_as_they_are(tmp_path):
    rows = build("MetaMathQA", files_of(tmp_path, "MetaMathQA"))
    train = by_prompt(rows.train)
    assert set(train) == {"What is 1+1?", "Say it otherwise: 2+2?"}
    assert train["What is 1+1?"].response == "1+1=2\n#### 2\nThe answer is: 2" and train["What is 1+1?"].answer == "2"
    assert train["Say it otherwise: 2+2?"].answer == "4"
    assert rows.counts == {
        "read": 5,
        "also a test question": 2,
        "empty question or answer": 1,
        "train": 2,
        "test: read": 12,
        "test: no #### before the answer": 1,
        "test: empty question or answer": 1,
        "test: no \\boxed answer": 1,
        "test: no level from 1 to 5": 1,
        "test": 8,
    }


def test_the_mathematical_test_sets_are_told_apart_by_level(tmp_path):
    for name in ("MetaMathQA", "SimpleScaling"):
        rows = build(name, files_of(tmp_path, name)).test
        assert sorted((row.subset, row.prompt, row.answer) for row in rows) == [
            ("GSM8K-Platinum", "How many legs have 3 dogs?", "12"),
            ("GSM8K-Platinum", "How much is 1,000 and 200?", "1,200"),
            ("MATH-1", "Level 1 problem", "\\frac{1}{2}"),
            ("MATH-1", "Older form", "7"),
            ("MATH-2", "Level 2 problem", "\\frac{2}{2}"),
            ("MATH-3", "Level 3 problem", "\\frac{3}{2}"),
            ("MATH-4", "Level 4 problem", "\\frac{4}{2}"),
            ("MATH-Hard", "Level 5 problem", "\\frac{5}{2}"),
        ]
        assert {row.source_split for row in rows} == {"gsm8k-platinum", "math"}


def test_simplescaling_keeps_attempts_with_a_box(tmp_path):
    rows = build("SimpleScaling", files_of(tmp_path, "SimpleScaling"))
    assert {(row.prompt, row.response, row.answer) for row in rows.train} == {
        ("Find x.", "Solution:\nx is $\\boxed{3}$", "3"),
        ("Cut?", "It is \\boxed{3", ""),
    }
    assert {name: rows.counts[name] for name in ("read", "no \\boxed", "also a test question", "train")} == {
        "read": 4,
        "no \\boxed": 1,
        "also a test question": 1,
        "train": 2,
    }


def test_medmcqa_ends_with_the_answer_is(tmp_path):
    rows = build("MedMCQA", files_of(tmp_path, "MedMCQA"))
    train = {row.prompt: (row.response, row.answer) for row in rows.train}
    assert train == {
        "Which?\nOptions:\nA. a\nB. b\nC. c\nD. d": ("Thinking.\n\nThe answer is C.", "C"),
        "No stop?\nOptions:\nA. a\nB. b\nC. c\nD. d": ("The answer is B or so. The answer is A.", "A"),
        "Repeated?\nOptions:\nA. ade\nB. b\nC. c\nD. d": ("Well.\nThe answer is A.", "A"),
    }
    assert [(row.prompt, row.response, row.answer) for row in rows.test] == [
        ("Axonal transport is:\nOptions:\nA. Antegrade\nB. Retrograde\nC. Both\nD. None", "The answer is C.", "C")
    ]
    assert rows.counts == {
        "read": 9,
        "no answer at the end": 3,
        "too long": 1,
        "empty question or answer": 1,
        "also a test question": 1,
        "train": 3,
        "test: read": 2,
        "test: empty question or answer": 1,
        "test": 1,
    }


def test_pubmedqa_states_the_conclusion(tmp_path):
    rows = build("PubMedQA", files_of(tmp_path, "PubMedQA"))
    assert [(row.prompt, row.response, row.answer) for row in rows.train] == [
        (
            "Based on the paper abstract below, answer the following question with 'yes', 'maybe', or 'no'.\n\nQuestion: Does it help?\n\n"
            "Abstract: One. Two.",
            "The conclusion of the abstract is: It does. Therefore, the answer is yes.",
            "yes",
        )
    ]
    assert sorted(row.answer for row in rows.test) == ["maybe", "no"]
    assert rows.counts == {
        "read": 6,
        "too long": 2,
        "empty question or answer": 1,
        "answer is not yes, no or maybe": 1,
        "also a test question": 1,
        "train": 1,
        "test: read": 2,
        "test": 2,
    }


@pytest.mark.parametrize("prompt, response, kept", [(3999, 1499, 1), (4000, 1499, 0), (3999, 1500, 0)])
def test_the_limits_of_pubmedqa_are_exclusive(tmp_path, prompt, response, kept):
    n_prompt = len("Based on the paper abstract below, answer the following question with 'yes', 'maybe', or 'no'.\n\nQuestion: q\n\nAbstract: ")
    n_response = len("The conclusion of the abstract is:  Therefore, the answer is yes.")
    row = pubmed("q", ["x" * (prompt - n_prompt)], "y" * (response - n_response))
    rows = build("PubMedQA", files_of(tmp_path, "PubMedQA", pqa_artificial=[row, pubmed("other")]))
    assert len(rows.train) == 1 + kept


def test_mmluprocot_lists_options_up_to_j(tmp_path):
    rows = build("MMLUProCoT", files_of(tmp_path, "MMLUProCoT"))
    listed = "\n".join(f"{letter}. option {i}" for i, letter in enumerate("ABCDEFGHIJ"))
    assert by_prompt(rows.train)[f"Colon?\n{listed}"].response == "the answer is: J"
    assert {row.answer for row in rows.train} == {"J"}
    expected = {"read": 67, "wrong final answer": 3, "too long": 1, "answer is not among the options": 1, "empty question or answer": 1}
    assert expected.items() <= rows.counts.items()


def test_mmluprocot_moves_whole_questions_as_numpy_chooses_them(tmp_path):
    rows = build("MMLUProCoT", files_of(tmp_path, "MMLUProCoT"))
    unique = [f"Question {i}?" for i in range(30)] + ["Colon?", "Long?"]
    expected = set(np.random.default_rng(42).choice(np.array(unique), size=3, replace=False))
    tested = {row.prompt.partition("\n")[0] for row in rows.test}
    assert tested == expected | {"Held out?", "Question 3?"}
    assert len(rows.test) == len(tested)
    assert not tested & {row.prompt.partition("\n")[0] for row in rows.train}
    assert rows.counts["also a test question"] == 2 * ("Question 3?" not in expected)
    assert rows.counts["moved to the test set"] == sum(2 if question.startswith("Question") else 1 for question in expected)


def test_race_answers_with_the_option(tmp_path):
    rows = build("RACE", files_of(tmp_path, "RACE"))
    assert {(row.prompt, row.response, row.answer, row.source_split) for row in rows.train} == {
        (
            "Answer the question below based only on the provided passage.\n\nPassage: A passage.\n\nQuestion: Why   _  .\n"
            "A. he is young.\nB. he is old\nC. a\nD. b",
            "he is young. Therefore, the answer is A.",
            "A",
            "train",
        ),
        (
            "Answer the question below based only on the provided passage.\n\nPassage: A passage.\n\nQuestion: Which?\n"
            "A. 100\nB. New York\nC. c\nD. d",
            "New York. Therefore, the answer is B.",
            "B",
            "train",
        ),
        (
            "Answer the question below based only on the provided passage.\n\nPassage: A passage.\n\nQuestion: Where?\nA. he is young.\nB. he is old\n"
            "C. a\nD. b",
            "he is old. Therefore, the answer is B.",
            "B",
            "validation",
        ),
    }
    assert rows.counts == {
        "read": 8,
        "too long": 1,
        "not four options with one of A to D as the answer": 2,
        "empty question or answer": 1,
        "no question": 1,
        "train": 3,
        "test: read": 1,
        "test": 1,
    }
    assert len(rows.test[0].prompt) > 6144  # a test row is never dropped for its length


@given(st.text(alphabet="ab 5-?[](:)*ksu.", max_size=150))
def test_cleaning_only_cuts_the_end(text):
    assert text.startswith(clean(text)) or text[:-100] + clean(text)[len(text[:-100]) :] == clean(text)
    assert clean(text + " ks5u") == clean(text).rstrip() or len(text) > 95


# ------------------------------------------------------------------------------------------------------------------------- where they lie


@pytest.mark.parametrize("name", SETS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    found = [build(name, files_of(tmp_path / suffix, name, suffix)) for suffix in (".jsonl", ".parquet", ".json", ".jsonl.gz")]
    contents = [[[(row.prompt, row.response, row.answer, row.subset) for row in split] for split in (rows.train, rows.test)] for rows in found]
    assert contents[0][0] and contents[0][1] and all(content == contents[0] for content in contents)
    assert all(rows.counts == found[0].counts for rows in found)
    for rows in found:
        ids = [row.id for row in rows.train + rows.test]
        assert len(set(ids)) == len(ids)
    assert set(tasks()[name].sets) == set(SETS[name])


def test_what_is_written_is_what_is_read(tmp_path):
    rows = build("MetaMathQA", files_of(tmp_path, "MetaMathQA"))
    summary = write_task(tmp_path / "out", rows)
    assert read_task(tmp_path / "out") == rows
    assert summary["subsets"] == {"GSM8K-Platinum": 2, "MATH-1": 2, "MATH-2": 1, "MATH-3": 1, "MATH-4": 1, "MATH-Hard": 1}
    assert summary["licences"] == {"files": "the user's own files, whose license is unknown"}


def test_race_is_read_by_article_as_the_original_files_have_it(tmp_path):
    article = {
        "article": "An article.",
        "questions": ["First?", "Second?"],
        "answers": ["C", "D"],
        "options": [["one", "two", "three", "four"], ["a", "b", "c", "d"]],
        "id": "high1.txt",
    }
    short = article | {"answers": ["A"]}
    for suffix in (".jsonl", ".parquet"):
        rows = build("RACE", files_of(tmp_path, "RACE", suffix, train=[article, short]))
        assert {(row.id, row.response) for row in rows.train if row.source_split == "train"} == {
            (f"train:train{suffix}:1.1", "three. Therefore, the answer is C."),
            (f"train:train{suffix}:1.2", "d. Therefore, the answer is D."),
        }
        assert rows.counts["article with questions, options and answers of different numbers"] == 1


# ------------------------------------------------------------------------------------------------------------------------- which rows


def test_the_rows_for_a_smaller_number_are_the_first_of_those_for_a_larger(tmp_path):
    files = files_of(tmp_path, "MMLUProCoT")
    everything = build("MMLUProCoT", files, seed=3)
    for n in (1, 7, 20):
        rows = build("MMLUProCoT", files, train_rows=n, test_rows=2, seed=3)
        assert rows.train == everything.train[:n] and rows.test == everything.test[:2]
    apart = build("MMLUProCoT", files, train_rows=7, seed=3, verifier_rows=5)
    assert apart.train == everything.train[:7] and apart.verifier == everything.train[7:12]
    assert build("MMLUProCoT", files, seed=4).train != everything.train


@pytest.mark.parametrize("n, k", [(0, 1), (1, 1), (7, 7), (50, 1), (50, 49), (50, 60), (300, 20)])
def test_drawing_as_rows_come_is_shuffling_and_cutting(n, k):
    rows = [example_of("s", str(i), "q", "r", "a") for i in range(n)]
    for seed in range(5):
        drawn = FirstShuffled(k, seed)
        for row in rows:
            drawn.add(row)
        assert drawn.rows() == shuffled(rows, seed)[:k]


@pytest.mark.parametrize("name", SETS)
def test_no_test_question_is_in_training(tmp_path, name):
    rows = build(name, files_of(tmp_path, name))
    assert not {normalized(row.prompt) for row in rows.train} & {normalized(row.prompt) for row in rows.test}


def test_other_counts_than_the_paper_are_warned_of(caplog):
    def candidates(n):
        return [Candidate(example_of("s", f"f:{i}", f"q{i}", "r", "a"), (f"q{i}",)) for i in range(n)]

    settings = RowSettings(5, 5, 0.1, 0)
    with caplog.at_level(logging.WARNING):
        build_rows("T", settings, candidates(4), candidates(1), Published(4, 4))
        build_rows("T", settings, candidates(5), candidates(1), Published(4, 3))
        assert not caplog.records
        build_rows("T", settings, candidates(4), candidates(1), Published(4, 3))
    assert [record.getMessage() for record in caplog.records] == ["T: the filters keep 4 of 4 rows, but 3 in the paper; its data or filters differ"]


def test_published_counts_are_those_of_the_paper():
    published = {module.NAME: (module.PUBLISHED.read, module.PUBLISHED.kept) for module in (metamathqa, medmcqa, pubmedqa, mmlu, race, simplescaling)}
    assert published == {
        "MetaMathQA": (395_000, 395_000),
        "MedMCQA": (182_736, 182_555),
        "PubMedQA": (211_269, 211_168),
        "MMLUProCoT": (130_811, 123_836),
        "RACE": (92_753, 92_737),
        "SimpleScaling": (58_986, 54_484),
    }


def test_an_answer_of_another_release_is_refused(tmp_path):
    files = files_of(tmp_path, "MedMCQA", validation=[MED_TEST[0] | {"cop": 4}])
    with pytest.raises(UserError, match="cop=4 is not an option"):
        build("MedMCQA", files)
    del files["validation"]
    with pytest.raises(UserError, match="tasks.MedMCQA.files has no 'validation'"):
        build("MedMCQA", files)
