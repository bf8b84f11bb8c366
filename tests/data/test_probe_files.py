"""Probe sets from the user's own files: the same rows from every format, the refusals, and what an edited file makes stale."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from plasticity_jax.config import load_config
from plasticity_jax.data.probe_files import ProbeFiles, read_labeled
from plasticity_jax.data.probe_sets import build_probe_set, probe_set_of_files, read_probe_set, write_probe_set
from plasticity_jax.data.wheels import Wheels
from plasticity_jax.errors import UserError
from plasticity_jax.stages.prepare import STAGE
from plasticity_jax.study.graph import build_graph

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.py"
ROWS = [{"idx": i, "sentence": f'word {i}, "quoted" and then some more', "label": i % 3} for i in range(60)]


def csv_text(rows, delimiter):
    quoted = [['"' + str(value).replace('"', '""') + '"' for value in row.values()] for row in rows]
    return "\n".join(delimiter.join(fields) for fields in [list(rows[0]), *quoted]) + "\n"


def write(path, rows):
    """The rows in the format that the name says, by other means than the reader's."""
    kinds = {
        ".jsonl": lambda: "".join(json.dumps(row) + "\n" for row in rows).encode(),
        ".json": lambda: json.dumps(rows).encode(),
        ".csv": lambda: csv_text(rows, ",").encode(),
        ".tsv": lambda: csv_text(rows, "\t").encode(),
        ".gz": lambda: gzip.compress(csv_text(rows, "\t").encode()),
    }
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_bytes(kinds[path.suffix]())
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.tsv.gz", "a.parquet"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    found = read_labeled("s", ProbeFiles(train=write(tmp_path / name, ROWS), text="sentence", id="idx"))
    assert found.train == [(row["sentence"], str(row["label"])) for row in ROWS]
    assert found.test is None and found.labels == ("0", "1", "2")


def test_numbers_are_ordered_as_numbers(tmp_path):
    rows = [{"text": f"text {label}", "label": label} for label in (10, 9, -1)]
    assert read_labeled("s", ProbeFiles(train=write(tmp_path / "a.jsonl", rows))).labels == ("-1", "9", "10")


def build(files, **limits):
    options = {"train_rows": 1000, "test_rows": 1000, "held_out_fraction": 0.3, "seed": 0} | limits
    return build_probe_set(probe_set_of_files("mine", files), Wheels(Path("nowhere")), **options)


def test_a_single_file_is_split_by_text_and_two_files_are_not(tmp_path):
    both = ROWS + [{"idx": 99, "sentence": ROWS[0]["sentence"], "label": 0}]
    files = ProbeFiles(train=write(tmp_path / "a.csv", both), text="sentence")
    rows, other_order = build(files), build(ProbeFiles(train=write(tmp_path / "b.csv", both[::-1]), text="sentence"))
    assert rows["source_splits"] == {"train": "train", "test": "held_out"}
    assert len(rows["train"]) + len(rows["test"]) == len(both) and 5 < len(rows["test"]) < 35
    assert not {text for text, _ in rows["train"]} & {text for text, _ in rows["test"]}
    assert set(rows["test"]) == set(other_order["test"])
    test = write(tmp_path / "test.csv", [{"sentence": "AND word 7 'quoted' and then some more!", "label": 1}, {"sentence": "unseen", "label": 2}])
    rows = build(ProbeFiles(train=files.train, test=test, text="sentence"))
    # Letters and digits of row 7 are part of the first test text.
    assert rows["dropped_leaks"] == 1 and ROWS[7]["sentence"] not in {text for text, _ in rows["train"]}
    assert {label for _, label in rows["test"]} == {"1", "2"} and rows["source_splits"]["test"] == "test"


def test_written_rows_come_back(tmp_path):
    rows = build(ProbeFiles(train=write(tmp_path / "a.parquet", ROWS), text="sentence"))
    summary = write_probe_set(tmp_path / "out", rows)
    back = read_probe_set(tmp_path / "out")
    assert back["train"] == rows["train"] and back["labels"] == ("0", "1", "2") and set(summary["licences"]) == {"files"}


def rows_with(**changes):
    """Two good rows and a third with these values; a value of None leaves the column out."""
    rows = [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}]
    return [*rows, {key: value for key, value in ({"text": "three", "label": "a"} | changes).items() if value is not None}]


REFUSED = {
    "no such column in CSV": (
        "a.csv",
        rows_with(),
        {"text": "sentence"},
        "a.csv in {folder} has no column 'sentence'; it has label, text: name it in",
    ),
    "no such column in Parquet": (
        "a.parquet",
        rows_with(),
        {"label": "y"},
        "a.parquet in {folder} has no column 'y'; it has label, text: name it in",
    ),
    "a row without the column": (
        "a.jsonl",
        rows_with(label=None),
        {},
        "line 3 of a.jsonl in {folder} has no column 'label'; it has text: name it in",
    ),
    "one class": ("a.jsonl", [{"text": "x", "label": 4}] * 3, {}, "a.jsonl has the single label 4 in column 'label'; a probe needs at least two"),
    "an id twice": (
        "a.tsv",
        [{"text": str(i), "label": i, "id": i % 2} for i in range(3)],
        {"id": "id"},
        "row 3 of a.tsv in {folder} has the id '0' of row 1 of a.tsv in {folder}; drop one",
    ),
    "labels of two types": (
        "a.jsonl",
        rows_with(label=1),
        {},
        "labels are numbers (1 at line 3 of a.jsonl in {folder}) and texts ('a' at line 1 of a.jsonl in {folder}); use one type",
    ),
    "a label that is a fraction": (
        "a.jsonl",
        rows_with(label=0.5),
        {},
        "line 3 of a.jsonl in {folder}: the label in column 'label' is 0.5; use a whole",
    ),
    "a label that is true": ("a.jsonl", rows_with(label=True), {}, "is True; use a whole number or a text"),
    "an empty label": ("a.csv", rows_with(label=""), {}, "row 3 of a.csv in {folder}: the label in column 'label' is empty"),
    "an empty text": ("a.jsonl", rows_with(text=" \n"), {}, "line 3 of a.jsonl in {folder}: the text in column 'text' is empty; drop the row"),
    "a text that is a number": ("a.jsonl", rows_with(text=3), {}, "line 3 of a.jsonl in {folder}: column 'text' is int, not text"),
    "no rows": ("a.jsonl", [], {}, "a.jsonl has no rows; give the file that holds them"),
}


@pytest.mark.parametrize("name, rows, options, message", REFUSED.values(), ids=REFUSED)
def test_rows_that_cannot_be_probed_are_refused_in_one_line(tmp_path, name, rows, options, message):
    with pytest.raises(UserError) as error:
        read_labeled("mine", ProbeFiles(train=write(tmp_path / name, rows), **options))
    assert message.format(folder=tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_missing_or_of_another_kind_or_with_another_label_are_refused(tmp_path):
    train = write(tmp_path / "a.jsonl", rows_with())
    with pytest.raises(UserError, match="probe set mine: .*/b.jsonl: no such file; give the place"):
        read_labeled("mine", ProbeFiles(train=train, test=str(tmp_path / "b.jsonl")))
    (tmp_path / "a.xlsx").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a.xlsx is of an unknown kind; known are .parquet, .jsonl"):
        read_labeled("mine", ProbeFiles(train=str(tmp_path / "a.xlsx")))
    test = write(tmp_path / "t.jsonl", [{"text": "x", "label": "c"}])
    with pytest.raises(UserError, match="label 'c' of .*t.jsonl is not in .*a.jsonl; give training rows of every label"):
        read_labeled("mine", ProbeFiles(train=train, test=test))
    with pytest.raises(UserError, match="none of its 1 training rows has the label .*; raise probe.train_rows"):
        build(ProbeFiles(train=train, test=write(tmp_path / "u.jsonl", [{"text": "p", "label": "a"}, {"text": "q", "label": "b"}])), train_rows=1)


def study(files, *overrides):
    given = [("probe.files", repr({"mine": files})), ("probe.sets", "('mine','topic')"), ("train.compute_dtype", "float32"), *overrides]
    return load_config(CONFIG, given)


def test_an_edited_file_makes_its_own_runs_stale_and_a_moved_one_none(tmp_path):
    before = build_graph(study({"train": write(tmp_path / "a.csv", ROWS), "text": "sentence"}))
    moved = build_graph(study({"train": write(tmp_path / "moved.csv", ROWS), "text": "sentence"}))
    assert [run.id for run in moved] == [run.id for run in before]
    changed = [*ROWS[:-1], ROWS[-1] | {"label": 0}]  # as long as before
    after = build_graph(study({"train": write(tmp_path / "b.csv", changed), "text": "sentence"}))
    stale = {run.name if run.stage == "prepare" else run.stage for run in after if run.id not in {run.id for run in before}}
    assert stale == {"probe-mine", "probe"}
    assert any(run.name == "probe-mine" for run in before)


def test_bad_files_are_refused_before_anything_runs(tmp_path):
    config = study({"train": write(tmp_path / "a.csv", ROWS)})
    runs = [run for run in build_graph(config) if run.name == "probe-mine"]
    with pytest.raises(UserError, match="has no column 'text'"):
        STAGE.check(config, runs)
    STAGE.check(study({"train": str(tmp_path / "a.csv"), "text": "sentence"}), runs)


@pytest.mark.parametrize(
    "sets, files, message",
    [
        ("('mine',)", {"topic": {}}, "probe.files.topic has the name of a built-in probe set"),
        ("('mime',)", {"mine": {}}, "probe.sets[0]='mime' must be one of sentiment, topic, mine; did you mean mine?"),
        ("('mine',)", {"mi/ne": {}}, "'mi/ne', which becomes a folder"),
        ("('mine',)", {"mine": {"txt": "a"}}, "did you mean probe.files.mine.text?"),
    ],
)
def test_a_config_names_its_sets_rightly(sets, files, message):
    with pytest.raises(UserError) as error:
        load_config(CONFIG, [("probe.files", repr(files)), ("probe.sets", sets)])
    assert message in str(error.value)
