"""Tasks from the user's own tables: the same rows from every format, the splits, what makes which runs stale, and one line for every bad input."""

import csv
import gzip
import hashlib
import io
import json
import os
import re
import time
import uuid
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from running import TINY, plasticity

from plasticity_jax.config import StudyConfig, TaskConfig, load_config
from plasticity_jax.data import corpus_files
from plasticity_jax.data.sft import encode_examples, sft_batch
from plasticity_jax.data.tasks import build_task, get_task, read_task
from plasticity_jax.data.tasks.originals import Cell, read_rows
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.errors import UserError
from plasticity_jax.evaluate.answers import grader_for, judge
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.stages.prepare import STAGE, check_table
from plasticity_jax.study.graph import build_graph, save_study
from plasticity_jax.study.look import CLOSES, OPENS, look
from plasticity_jax.study.status import study_status

TEAMS = ("billing", "support", "sales")
DOC = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")


def ticket(i: int) -> dict:
    """Tickets that share no word, so that none resembles another."""
    digest = hashlib.sha256(str(i).encode()).hexdigest()
    return {"text": " ".join(digest[j : j + 8] for j in range(0, 40, 8)), "team": TEAMS[i % 3], "priority": i}


TICKETS = [ticket(i) for i in range(200)]


def written(path: Path, rows, delimiter=",") -> str:
    """The rows in the format that the name says, by other means than the reader's."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    text = {".jsonl": "".join(json.dumps(row) + "\n" for row in rows), ".json": json.dumps(rows)}.get(path.suffix, table.getvalue())
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def tickets(rows: str | None, **changes) -> TaskConfig:
    return TaskConfig(**{"rows": rows, "prompt": "{text}\nWhich team?", "answer": "{team}", "labels": TEAMS} | changes)


def rows_of(settings: TaskConfig, **changes):
    sizes = {"train_rows": 1000, "test_rows": 1000, "held_out_fraction": 0.2, "seed": 0} | changes
    return build_task("tickets", None, files=settings.files, own={"tickets": settings}, **sizes)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet", "a.csv.gz"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    made = rows_of(tickets(written(tmp_path / name, TICKETS, "\t" if name == "a.tsv" else ",")))
    by_prompt = {row.prompt: row for row in (*made.train, *made.test)}
    assert len(by_prompt) == len(TICKETS)
    for row in TICKETS:
        made_of = by_prompt[f"{row['text']}\nWhich team?"]
        assert (made_of.answer, made_of.response) == (row["team"], f"The answer is {row['team']}.")
    expected = {row["text"] for row in TICKETS if int(hashlib.sha256(row["text"].encode()).hexdigest()[:16], 16) / 2**64 < 0.2}
    assert {row.prompt.split("\n")[0] for row in made.test} == expected and 20 < len(expected) < 60


def test_numbers_and_truth_values_are_read_as_texts_and_nothing_as_empty(tmp_path):
    cells = [{"x": 3}, {"x": 2.5}, {"x": True}, {"x": None}, {"x": "é"}, {"x": float("nan")}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in cells))
    assert [row["x"] for _, row in read_rows(str(path), {"x": Cell}, what="t")] == ["3", "2.5", "True", "", "é", ""]


def test_neither_more_rows_nor_another_wording_moves_a_row(tmp_path):
    few, many = written(tmp_path / "few.csv", TICKETS[:120]), written(tmp_path / "many.csv", TICKETS[::-1])
    texts = [{row.prompt.split("\n")[0] for row in rows_of(tickets(path)).test} for path in (few, many)]
    assert texts[0] < texts[1]
    reworded = rows_of(tickets(few, prompt="Assign this.\n{text}"))
    assert {row.prompt.split("\n")[1] for row in reworded.test} == texts[0]
    shorter = rows_of(tickets(few), train_rows=10)
    assert shorter.train == rows_of(tickets(few)).train[:10]


def test_a_column_or_files_say_the_split(tmp_path):
    split = ["train", "test", "validation", "train", "train"]
    table = [row | {"use": split[i % 5]} for i, row in enumerate(TICKETS)]
    expected = {name: {row["text"] for row in table if row["use"] == name} for name in ("train", "validation", "test")}
    files = {name: written(tmp_path / f"{name}.csv", [row for row in table if row["use"] == name]) for name in expected}
    by_column = tickets(written(tmp_path / "all.csv", table), split="use")
    for settings in (by_column, tickets(None, files=files)):
        made = rows_of(settings, validation_rows=40)
        assert {name: {row.prompt.split("\n")[0] for row in getattr(made, name)} for name in expected} == expected
    assert not rows_of(by_column).validation
    with pytest.raises(UserError, match="task tickets: no row says 'test' in column 'use'; mark some"):
        rows_of(tickets(written(tmp_path / "no_test.csv", [row | {"use": "train"} for row in TICKETS]), split="use"))


def test_rows_like_a_test_row_are_neither_trained_nor_validated_on(tmp_path):
    asked = "the invoice of last month has a wrong amount on it"
    leaks = [asked.upper(), f"hello, {asked}, please help", asked.replace("wrong", "false"), "the invoice of last month"]
    table = [row | {"use": "train"} for row in TICKETS] + [{"text": asked, "team": "billing", "priority": 0, "use": "test"}]
    table += [{"text": text, "team": "billing", "priority": 0, "use": use} for text in leaks for use in ("train", "validation")]
    table += [{"text": "a parcel that never came", "team": "support", "priority": 0, "use": "validation"}]
    made = rows_of(tickets(written(tmp_path / "a.csv", table), split="use"), validation_rows=5)
    prompts = {row.prompt.split("\n")[0] for row in (*made.train, *made.validation)}
    assert not prompts & set(leaks) and "a parcel that never came" in prompts
    assert made.counts["equal, hold or lie within a test row"] == 3 and made.counts["resemble a test row"] == 1


def test_a_table_on_a_store_is_read_and_known_by_its_content():
    place = f"memory://{uuid.uuid4().hex}/tickets.csv"
    ids = []
    for team in ("sales", "bills"):
        fsspec.filesystem("memory").pipe(place, ("text,team\n" + "".join(f"{row['text']},{team}\n" for row in TICKETS)).encode())
        own = {"tickets": tickets(place, labels=())}
        ids.append([run.id for run in build_graph(StudyConfig(tasks=own)) if run.name == "task-tickets"])
    assert ids[0] != ids[1]
    assert {row.answer for row in rows_of(own["tickets"]).train} == {"bills"}


# ------------------------------------------------------------------------------------------------------------------------ what is stale


def study(path, **changes):
    given = {"rows": path, "prompt": "{text}\nWhich team?", "answer": "{team}", "labels": TEAMS} | changes
    overrides = [("tasks", repr({"tickets": given, "addition2": {"train_rows": 8}})), ("train.compute_dtype", "float32")]
    return load_config(TINY, overrides)


def stale(before: StudyConfig, after: StudyConfig) -> set[tuple[str, str | None]]:
    kept = {run.id for run in build_graph(before)}
    return {(run.stage, run.task) for run in build_graph(after) if run.id not in kept}


def test_an_edit_makes_exactly_what_rests_on_it_stale(tmp_path):
    first = study(written(tmp_path / "a.csv", TICKETS))
    everything = {(stage, "tickets") for stage in ("prepare", "finetune", "evaluate", "validation", "spectra")}
    swapped = [TICKETS[3] | {"text": TICKETS[3]["text"][::-1]} if i == 3 else row for i, row in enumerate(TICKETS)]  # as many bytes
    same_size = written(tmp_path / "b.csv", swapped)
    assert Path(same_size).stat().st_size == Path(tmp_path / "a.csv").stat().st_size
    assert stale(first, study(same_size)) == everything
    assert stale(first, study(str(tmp_path / "a.csv"), prompt="{text}\nWho?")) == everything
    assert stale(first, study(str(tmp_path / "a.csv"), grader="text")) == {("evaluate", "tickets"), ("validation", "tickets")}
    assert not stale(first, study(written(tmp_path / "elsewhere" / "moved.csv", TICKETS)))
    before = [run.id for run in build_graph(first)]
    written(tmp_path / "a.csv", TICKETS[:100])
    assert [run.id for run in build_graph(first)] != before


def test_a_study_is_planned_where_the_table_is_not():
    assert any(run.name == "task-tickets" for run in build_graph(study("/nowhere/tickets.csv")))


# ------------------------------------------------------------------------------------------------------------------------ what is refused

HEAD = b"text,team\n"
GOOD = b"".join(f"{row['text']},{row['team']}\n".encode() for row in TICKETS[:20])
REFUSED = {
    "no such column": (
        "a.csv",
        b"body,team\n" + GOOD,
        "a.csv in {folder} has no column 'text'; it has body, team: name its columns in tasks.tickets",
    ),
    "no such column, Parquet": ("a.parquet", [{"body": "x", "team": "sales"}], "a.parquet in {folder} has no column 'text'; it has body, team"),
    "an empty answer": ("a.csv", HEAD + GOOD + b"hello,\n", "row 21 of a.csv has no answer (column 'team' is empty); fill or drop the row"),
    "no answer": ("a.jsonl", b'{"text": "x", "team": null}\n', "row 1 of a.jsonl has no answer"),
    "an empty prompt": ("a.csv", HEAD + b" ,sales\n", "row 1 of a.csv is empty in column 'text', so its prompt asks nothing"),
    "an unknown label": ("a.csv", HEAD + GOOD + b"x,Sales\n", "row 21 of a.csv: the answer 'Sales' is not one of labels (billing, support, sales)"),
    "an open quote": ("a.csv", HEAD + GOOD + b'"x,sales\ny,sales\n', "after row 20 (a quote opens there that does not close); repair it"),
    "a closed quote with more": ("a.csv", HEAD + b'"x"y,sales\n', "is not a table of UTF-8 text after row 0"),
    "utf-16": ("a.csv", (HEAD + GOOD).decode().encode("utf-16"), "convert it, such as with iconv -f utf-16 -t utf-8"),
    "latin-1": ("a.csv", HEAD + GOOD + "é,sales\n".encode("latin1"), "convert it, such as with iconv -f latin1 -t utf-8"),
    "latin-1 in JSON": ("a.jsonl", '{"text": "é", "team": "sales"}\n'.encode("latin1"), "is not UTF-8 ('utf-8' codec"),
    "a list": ("a.jsonl", b'{"text": ["x"], "team": "sales"}\n', "column 'text' holds ['x'], not a text, a number, or true or false"),
    "no rows": ("a.csv", HEAD, "a.csv has no rows; give the file that holds them"),
    "another kind": ("a.xlsx", b"x", "holds no file of a known kind (.parquet, .jsonl"),
    "a response that is not graded": ("a.csv", b"text,team,priority\nx,sales,\n", "has no answer (column 'priority' is empty)"),
}


@pytest.mark.parametrize("name, content, message", REFUSED.values(), ids=REFUSED)
def test_a_bad_table_is_refused_in_one_line_before_anything_runs(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        written(path, content)
    config = study(str(path), response="{priority} The answer is {team}." if b"priority" in content else None)
    with pytest.raises(UserError) as error:
        STAGE.check(config, [run for run in build_graph(config) if run.name == "task-tickets"])
    said = str(error.value)
    assert message.format(folder=tmp_path) in said and name in said and "\n" not in said


def test_a_missing_table_is_refused_with_its_place():
    with pytest.raises(UserError, match="task tickets: /nowhere/a.csv: no such file or folder"):
        check_table(study("/nowhere/a.csv"), "tickets")


@pytest.mark.parametrize(
    "name, words",
    [
        ("a.csv", "row 21 of a.csv in {folder}: a cell holds more than 0 MiB; close the quote that opens there"),
        ("long.csv", "line 22 of long.csv in {folder} holds more than 0 MiB"),
        ("a.jsonl", "line 21 of a.jsonl in {folder} holds more than 0 MiB; shorten or drop it"),
        ("a.json", "element 21 of a.json in {folder} holds more than 0 MiB"),
        ("a.parquet", "row 21 of a.parquet in {folder}: a cell of column 'text' holds more than 0 MiB"),
    ],
)
def test_a_cell_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch, name, words):
    monkeypatch.setattr(corpus_files, "TEXT_FILE_BYTES", 20_000)
    monkeypatch.setattr(corpus_files, "LINE_BYTES", 60_000)
    monkeypatch.setattr(corpus_files, "READ_BYTES", 1000)
    path = written(tmp_path / name, [*TICKETS[:20], {"text": "x" * (30_000 if name == "a.csv" else 90_000), "team": "sales", "priority": 1}])
    with pytest.raises(UserError) as error:
        check_table(study(path), "tickets")
    assert words.format(folder=tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt": "{text.__class__}"}, "tasks.tickets.prompt holds {text.__class__}; braces take the name of a column and nothing else"),
        ({"prompt": "{text[0]}"}, "tasks.tickets.prompt holds {text[0]}; braces take"),
        ({"answer": "{team!r}"}, "tasks.tickets.answer holds {team!r}; braces take"),
        ({"answer": "{team:>9}"}, "tasks.tickets.answer holds {team:>9}; braces take"),
        ({"prompt": "{}"}, "tasks.tickets.prompt holds {}; braces take"),
        ({"prompt": "{text"}, "expected '}' before end of string; write {column} for a column's value, and {{ for a brace"),
        ({"prompt": "Which team?"}, "tasks.tickets.prompt='Which team?' names no column, so that all rows would be alike"),
        ({"prompt": None}, "tasks.tickets has no prompt; a task from a table needs one"),
        ({"rows": None}, "give the table as rows, or one file for each split as files"),
        ({"files": {"train": "a.csv"}}, "tasks.tickets.rows='a.csv' and tasks.tickets.files={'train': 'a.csv'}: give the table as rows"),
        ({"rows": None, "files": {"train": "a", "tests": "b"}}, "tasks.tickets.files has 'tests'; the files of a table are those of train"),
        ({"rows": None, "files": {"train": "a"}}, "tasks.tickets.files has no 'test'; give it, or one table as rows"),
        ({"labels": ("a", "a")}, "tasks.tickets.labels lists 'a' twice"),
        ({"labels": ("a",)}, "tasks.tickets.labels has the single label 'a'"),
        ({"grader": "fuzzy"}, "tasks.tickets.grader='fuzzy' must be"),
        ({"module": "my_tasks.py"}, "tasks.tickets.rows is for a table, but tasks.tickets.module declares the task"),
    ],
)
def test_fields_that_declare_no_task_are_refused(changes, message):
    with pytest.raises(UserError) as error:
        study("a.csv", **changes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_names_of_tasks_are_refused_where_they_are_taken_or_no_folder():
    table = {"rows": "a.csv", "prompt": "{text}", "answer": "{team}"}
    for name, message in (("topic", "has the name of a built-in task; give your own another one, such as my_topic"), ("a/b", "becomes a folder")):
        with pytest.raises(UserError, match=re.escape(message)):
            load_config(TINY, [("tasks", repr({name: table}))])
    with pytest.raises(UserError, match="tasks.topic.labels is for a table"):
        load_config(TINY, [("tasks", repr({"topic": {"labels": ("a", "b")}}))])


# ------------------------------------------------------------------------------------------------------------------------------ graders


def test_braces_and_several_columns_and_a_response_of_its_own(tmp_path):
    table = [row | {"why": f"Because of {row['priority']}."} for row in TICKETS]
    settings = tickets(written(tmp_path / "a.csv", table), prompt="{{{priority}}} {text}", response="{why} The answer is {team}.")
    row = min(rows_of(settings).train, key=lambda row: int(row.prompt[1:].split("}")[0]))
    number = int(row.prompt[1:].split("}")[0])
    assert row.prompt == f"{{{number}}} {TICKETS[number]['text']}" and row.response == f"Because of {number}. The answer is {row.answer}."


@pytest.mark.parametrize(
    "labels, answers, grader",
    [
        (("A", "B", "C"), [], "letter"),
        ((), ["3", "-2.5", "1,200"], "number"),
        ((), ["3 apples", "2"], "text"),
        ((), ["Paris", "12"], "exact"),
        (("Paris", "New York"), ["Paris"], "text"),
    ],
)
def test_the_grader_is_the_first_that_fits_the_labels_or_the_answers(labels, answers, grader):
    assert grader_for(get_task("own", {"own": tickets("a.csv", labels=labels)}), answers) == grader
    assert grader_for(get_task("own", {"own": tickets("a.csv", labels=labels, grader="math")}), answers) == "math"


@pytest.mark.parametrize(
    "answer, gold, right",
    [
        ("new  york.", "New York", True),
        ("**New York**", "New York", True),
        ("New Jersey", "New York", False),
        ("red, green", "red, blue", False),
        ("New", "New York", False),
        ("...", "New York", False),
    ],
)
def test_text_compares_whole_answers(answer, gold, right):
    assert judge(answer, gold, "text") is right


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"response": "{team}, that is it."}, "tasks.tickets.grader='exact' does not read the answer"),
        ({"grader": "number"}, "tasks.tickets.grader='number' does not read the answer"),
        ({"labels": ("billing issue", "billing question"), "answer": "billing {kind}", "grader": "exact"}, "takes the labels 'billing issue' and"),
        ({"response": "Human error. The answer is {team}."}, "does not read the answer"),
    ],
)
def test_what_the_grader_cannot_read_back_is_refused(tmp_path, changes, message):
    table = [row | {"kind": ("issue", "question")[i % 2]} for i, row in enumerate(TICKETS)]
    config = study(written(tmp_path / "a.csv", table), **changes)
    with pytest.raises(UserError) as error:
        check_table(config, "tickets")
    assert message in str(error.value)
    check_table(study(str(tmp_path / "a.csv"), labels=("billing issue", "billing question"), answer="billing {kind}"), "tickets")


# ---------------------------------------------------------------------------------------------------------- the example of docs/tasks.md


def test_the_example_of_the_docs(tmp_path, monkeypatch):
    [code] = re.findall(r"^```python title=own_table.py\n(.*?)^```$", DOC, re.MULTILINE | re.DOTALL)
    (tmp_path / "study").mkdir()
    config = tmp_path / "study" / "own_table.py"
    config.write_text(code, encoding="utf-8")
    written(tmp_path / "study" / "tickets.csv", [*TICKETS, TICKETS[0]])
    written(tmp_path / "corpus" / "a.jsonl", TICKETS)
    monkeypatch.chdir(tmp_path)
    small = ("--config.model.vocab_size=400", "--config.train.seq_len=32", "--config.data.wheels=nowhere", "--config.train.compute_dtype=float32")
    first = plasticity("data", "--config", config, *small)
    assert first.returncode == 0 and "characters of a row" in first.stdout and "2 of 2 there" in first.stdout
    assert plasticity("prepare", "--config", config, "--workdir", "work", *small).returncode == 0
    [folder] = Path("work/own_table/prepare").glob("task-tickets-*")
    rows = read_task(folder)
    assert len(rows.validation) == 20 and {row.answer for row in rows.train} == set(TEAMS)
    second = plasticity("data", "--config", config, "--workdir", "work", *small)
    assert re.search(r"tickets: \d+ train, 20 validation, 0 verifier, \d+ test rows", second.stdout)
    assert "tokens of a row: min" in second.stdout and "the same prompt again: 1 rows, 0 of them with another answer" in second.stdout
    assert f"Assistant:{OPENS}The answer is " in second.stdout and f".<end of text>{CLOSES}" in second.stdout
    [found] = json.loads(plasticity("data", "--config", config, "--workdir", "work", "--json", *small).stdout)["tasks"]
    assert found["rows"]["train"] == len(rows.train) and sum(found["answers"]["train"].values()) == len(rows.train)


def test_status_names_an_edited_file(tmp_path):
    table = written(tmp_path / "a.csv", TICKETS)
    config = study(table)
    runs = build_graph(config)
    save_study(tmp_path / "work", config, runs)
    for run in runs:
        with RunDirectory(tmp_path / "work" / config.name / run.id).work(run, config) as directory:
            directory.finish({})

    def states():
        return {(row["stage"], row["task"]): (row["state"], row["reason"]) for row in study_status(tmp_path / "work")}

    assert {state for state, _ in states().values()} == {"done"}
    written(tmp_path / "a.csv", TICKETS)  # newer, and as before
    os.utime(table, (time.time() + 10,) * 2)
    assert {state for state, _ in states().values()} == {"done"}
    written(tmp_path / "a.csv", [*TICKETS[1:], TICKETS[0]])
    os.utime(table, (time.time() + 10,) * 2)
    found = states()
    assert found["prepare", "tickets"] == found["finetune", "tickets"] == found["evaluate", "tickets"] == ("stale", f"{table} was edited since")
    assert found["finetune", "addition2"][0] == found["pretrain", None][0] == "done"


def test_what_is_marked_is_what_the_loss_counts(tmp_path):
    config = study(written(tmp_path / "a.csv", TICKETS))
    tokenizer = Tokenizer.train([row["text"] for row in TICKETS], 300)
    found = look(config, "tickets", tokenizer)
    row = rows_of(config.tasks["tickets"], train_rows=6000, test_rows=300, held_out_fraction=0.1, validation_rows=200).train[0]
    batch = sft_batch(encode_examples([row], tokenizer, max_length=192), [0], bucket_length=191, batch_size=1, pad_id=tokenizer.pad_id)
    counted = tokenizer.decode([int(token) for token, counts in zip(batch["targets"][0], batch["loss_mask"][0]) if counts])
    assert found.rendered[0].split(OPENS)[1] == f"{counted}<end of text>{CLOSES}" and found.unit == "tokens"
    short = study(written(tmp_path / "a.csv", TICKETS), max_new_tokens=2)
    assert (found.late_answers, look(short, "tickets", tokenizer).late_answers) == (None, found.rows["train"])


def test_own_text_alone_probes_for_nothing_built_in(tmp_path):
    def probed(*overrides):
        config = load_config(TINY, [("train.compute_dtype", "float32"), *overrides])
        return {run.name.removeprefix("probe-") for run in build_graph(config) if run.name.startswith("probe-")}

    own = [("data.files", "'nowhere'"), ("data.max_documents", "None")]
    mine = ("probe.files", repr({"mine": {"train": "nowhere.csv"}}))
    assert probed() == {"sentiment", "topic"} and probed(mine) == {"sentiment", "topic", "mine"}
    assert probed(*own) == set() and probed(*own, mine) == {"mine"} and probed(*own, ("probe.sets", "('topic',)")) == {"topic"}


def test_tasks_of_tables_are_known_to_get_task_only_with_their_settings():
    assert get_task("tickets", {"tickets": tickets("a.csv")}).labels == TEAMS
    with pytest.raises(UserError, match="task 'tickets' is unknown; .*one of your own needs rows or a module"):
        get_task("tickets")
