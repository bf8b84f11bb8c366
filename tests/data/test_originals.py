"""Published files: every form gives the same rows, in bounded memory, and what is wrong is named in one line."""

import gzip
import json
import tracemalloc

import numpy as np
import pytest
import tensorflow_datasets as tfds
from published_files import write_published as write

from plasticity_jax.data.documents import quiet_tfds
from plasticity_jax.data.fingerprints import task_files
from plasticity_jax.data.tasks import build_task
from plasticity_jax.data.tasks.originals import read_rows
from plasticity_jax.errors import UserError


class Exam(tfds.core.GeneratorBasedBuilder):
    """Questions with lists and structs in them; lists of lists need TensorFlow and are not here."""

    VERSION = tfds.core.Version("2.0.0")

    def _info(self):
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "article": text,
                    "question": text,
                    "answer": text,
                    "options": tfds.features.Sequence(text),
                    "cop": tfds.features.Scalar(np.int64),
                    "context": {"contexts": tfds.features.Sequence(text)},
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(name, n) for name, n in (("train", 300), ("dev", 1), ("test", 2))}

    def _generate_examples(self, name, n):
        for i in range(n):
            yield (
                i,
                {
                    "article": f"{name} article {i}",
                    "question": f"First {name}?",
                    "answer": "C",
                    "options": ["one", "two", "thrée", f"four {i}"],
                    "cop": i,
                    "context": {"contexts": [] if i % 2 else ["é", "b"]},
                },
            )


@pytest.fixture(scope="module")
def exam(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    with quiet_tfds():
        Exam(data_dir=str(root), file_format="array_record").download_and_prepare()
    return root / "exam" / "2.0.0"


def test_several_places_are_read_in_order_with_ids_of_their_own(tmp_path):
    first, second = write(tmp_path / "a" / "x.jsonl", [{"q": "1"}]), write(tmp_path / "b" / "x.jsonl", [{"q": "2"}])
    assert list(read_rows(f"{first}, {tmp_path / 'b'}", {"q": str}, what="t")) == [("x.jsonl:1", {"q": "1"}), ("2/x.jsonl:1", {"q": "2"})]
    assert second


def test_lists_structs_and_numbers_of_tfds_are_plain_python(exam):
    columns = {"cop": int, "context": {"contexts": list[str]}, "options": list[str]}
    rows = [row for _, row in read_rows(f"tfds:{exam}@train[:4]", columns, what="t")]
    assert len(rows) == 4
    assert all(type(row["cop"]) is int and row["context"]["contexts"] == ([] if row["cop"] % 2 else ["é", "b"]) for row in rows)
    assert all(row["options"] == ["one", "two", "thrée", f"four {row['cop']}"] for row in rows)


def test_race_is_read_from_tfds(exam):
    files = {"train": f"tfds:{exam}@train", "validation": f"tfds:{exam}@dev", "test": f"tfds:{exam}@test"}
    rows = build_task("RACE", None, train_rows=1000, test_rows=1000, held_out_fraction=0.1, seed=0, files=files)
    assert (len(rows.train), len(rows.test)) == (301, 2)
    assert {row.response for row in rows.train} == {"thrée. Therefore, the answer is C."}
    assert rows.train[0].source.startswith("files:exam/2.0.0@") and len({row.id for row in rows.train}) == 301


def test_a_long_json_list_is_read_piece_by_piece(tmp_path):
    rows = [{"q": f"row {i} é " + "x" * (3000 + i)} for i in range(2000)]
    path = tmp_path / "list.json"
    path.write_text("\ufeff " + json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    size = path.stat().st_size
    tracemalloc.start()
    count = 0
    for (_, row), expected in zip(read_rows(str(path), {"q": str}, what="t"), rows, strict=True):
        assert row == expected
        count += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == len(rows) and size > 7.5e6 and peak < size


def test_the_fingerprint_follows_the_content_not_the_place(tmp_path, exam):
    for folder in ("a", "b"):
        write(tmp_path / folder / "x.jsonl", [{"q": "1"}])
    one, other = (task_files({"train": str(tmp_path / folder / "x.jsonl")}) for folder in ("a", "b"))
    assert one == other == task_files({"train": str(tmp_path / "a")})
    assert task_files({"train": write(tmp_path / "c" / "renamed.jsonl", [{"q": "1"}])}) == one
    write(tmp_path / "b" / "x.jsonl", [{"q": "2"}])  # as long as before
    assert task_files({"train": str(tmp_path / "b" / "x.jsonl")}) != one
    absent = task_files({"train": "/nowhere/x.parquet, tfds:none_such@train"})
    assert absent == {"train": [{"place": "/nowhere/x.parquet"}, {"place": "tfds:none_such@train"}]}
    train, test = (task_files({"train": f"tfds:{exam}@{split}"})["train"][0] for split in ("train", "test"))
    assert train["content"] == test["content"] and (train["split"], test["split"]) == ("train", "test")
    json.dumps([one, train])


# ------------------------------------------------------------------------------------------------------------------------- what is refused


def refused(places, columns, **kwargs):
    with pytest.raises(UserError) as error:
        list(read_rows(str(places), columns, what="T train", **kwargs))
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".json"])
def test_a_missing_column_is_named_with_those_that_are_there(tmp_path, suffix):
    path = write(tmp_path / f"f{suffix}", [{"query": "q", "output": "o"}])
    message = refused(path, {"query": str, "response": str})
    assert "has no column 'response'; it has output, query: give the data set as it was published" in message and f"f{suffix} in" in message


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    "value, kind, said",
    [
        (3, str, "holds 3, not a text"),
        ("x", int, "holds 'x', not a whole number"),
        (True, int, "holds True, not a whole number"),
        ("x", list[str], "holds 'x', not a list of texts"),
        ([1], list[str], "holds [1], not a list of texts"),
        ({"a": "x"}, {"contexts": list[str]}, "not a struct of contexts (a list of texts)"),
    ],
)
def test_a_value_of_another_type_is_named_with_its_row(tmp_path, suffix, value, kind, said):
    message = refused(write(tmp_path / f"f{suffix}", [{"c": value}]), {"c": kind})
    assert said in message and f"1 of f{suffix} in" in message and "column 'c'" in message


@pytest.mark.parametrize(
    "content, said",
    [
        (b'{"q": "a"}\n{"q": "\xff"}\n', "line 2 of f.jsonl"),
        (b'{"q": "a"}\n{"q": \n', "line 2 of f.jsonl"),
        (b'{"q": "a"}\n3\n', "line 2 of f.jsonl"),
        (b'{"q": "\\ud800"}\n', "line 1 of f.jsonl"),
    ],
)
def test_malformed_lines_are_named(tmp_path, content, said):
    (tmp_path / "f.jsonl").write_bytes(content)
    assert said in refused(tmp_path / "f.jsonl", {"q": str})


@pytest.mark.parametrize(
    "content, said",
    [
        (b'[{"q": "a"}, {"q": }]', "element 2 of f.json"),
        (b'[{"q": "a"}, 3]', "element 2 of f.json"),
        (b'[{"q": "a"}', "element 2 of f.json"),
        (b'[{"q": "\xff"}]', "f.json in"),
        (b"[" * 100_000, "f.json in"),
    ],
)
def test_malformed_lists_are_named(tmp_path, content, said):
    (tmp_path / "f.json").write_bytes(content)
    assert said in refused(tmp_path / "f.json", {"q": str})


def test_places_without_rows_are_named(tmp_path, exam):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"q": "a"}\n' * 1000)[:40])
    assert "/nowhere: no such file or folder" in refused("/nowhere", {"q": str})
    assert "holds no file of a known kind" in refused(tmp_path / "empty", {"q": str})
    assert "holds no file of a known kind" in refused(tmp_path / "notes.txt", {"q": str})
    assert "is not a readable Parquet file" in refused(tmp_path / "broken.parquet", {"q": str})
    assert "cut.jsonl.gz" in refused(tmp_path / "cut.jsonl.gz", {"q": str})
    assert "no place is given" in refused(" , ", {"q": str})
    assert "names no split" in refused(f"tfds:{exam}", {"q": str})
    assert "no such data set is prepared" in refused("tfds:none_such@train", {"q": str})
    assert "has dev, test, train" in refused(f"tfds:{exam}@validation", {"article": str}).replace("train, dev, test", "dev, test, train")
    assert "has no column 'q'; it has answer, article" in refused(f"tfds:{exam}@train", {"q": str})
    assert "example 1 of exam/2.0.0 (train)" in refused(f"tfds:{exam}@train", {"article": int})
