import gzip
import io
import json

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from plasticity_jax.data import corpus_files
from plasticity_jax.data.corpus_files import FilePart, check_folder, file_parts, folder_name, listing
from plasticity_jax.errors import UserError


def read(folder, text_field="text"):
    return [text for part in file_parts(str(folder), text_field) for text in part.texts(text_field)]


def parquet(columns, **options):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer, **options)
    return buffer.getvalue()


GOOD = b'{"text": "one"}\n{"text": "two"}\n'
MANY = "".join(json.dumps({"text": f"row {i} " + "word " * i}) + "\n" for i in range(300)).encode()

BAD = {
    "a missing column": ("a.parquet", parquet({"content": ["x"], "id": [1]}), "has no column 'text'; it has content, id: set data.text_field"),
    "a column of numbers": ("a.parquet", parquet({"text": [1, 2]}), "column 'text' of a.parquet in {folder} holds int64, not text"),
    "a column of lists": ("a.parquet", parquet({"text": [["x"]]}), "not text; set data.text_field"),
    "a null": ("a.parquet", parquet({"text": ["x", "y", None]}, row_group_size=2), "row 3 of a.parquet in {folder} has no text (null)"),
    "a truncated Parquet file": ("a.parquet", parquet({"text": ["x"] * 99})[:-30], "a.parquet in {folder} is not a readable Parquet file"),
    "a Parquet file with a hole": (
        "a.parquet",
        (lambda b: b[:40] + b"\xff" * 60 + b[100:])(parquet({"text": [f"{i}" * 9 for i in range(99)]}, use_dictionary=False)),
        "is not a readable Parquet file",
    ),
    "an empty Parquet file": ("a.parquet", b"", "is not a readable Parquet file"),
    "a row that is no JSON": ("a.jsonl", GOOD + b'{"text": "thr\n', "line 3 of a.jsonl in {folder} is not valid JSON"),
    "a row that is no object": ("a.jsonl", GOOD + b'["text"]\n', "line 3 of a.jsonl in {folder} is not a JSON object"),
    "a row of deep brackets": ("a.jsonl", b"[" * 100_000 + b"\n", "line 1 of a.jsonl in {folder} is not valid JSON"),
    "a row without the field": (
        "a.jsonl",
        GOOD + b'{"id": 1, "body": "x"}\n',
        "line 3 of a.jsonl in {folder} has no field 'text'; it has body, id: set data.text_field",
    ),
    "text that is no string": ("a.jsonl", b'\n{"text": ["x"]}\n', "line 2 of a.jsonl in {folder}: field 'text' is list, not text"),
    "text that is null": ("a.jsonl", b'{"text": null}\n', "field 'text' is NoneType, not text"),
    "bytes that are not UTF-8": ("a.jsonl", b'{"text": "\xff"}\n', "line 1 of a.jsonl in {folder} is not valid JSON ('utf-8' codec"),
    "half a surrogate pair": ("a.jsonl", b'{"text": "\\ud83d"}\n', "line 1 of a.jsonl in {folder}: the text has half a surrogate pair"),
    "a truncated gz": ("a.jsonl.gz", gzip.compress(MANY)[:-700], "a.jsonl.gz in {folder} is truncated or damaged after line"),
    "a damaged gz": ("a.jsonl.gz", gzip.compress(GOOD)[:-6] + b"\x00" * 6, "a.jsonl.gz in {folder} is truncated or damaged"),
    "a gz that is none": ("a.jsonl.gz", GOOD, "truncated or damaged after line 0 (Not a gzipped file"),
    "a truncated zst": ("a.jsonl.zst", pyarrow.compress(MANY, "zstd", asbytes=True)[:-30], "a.jsonl.zst in {folder} is truncated or damaged"),
    "a zst that is none": ("a.jsonl.zst", GOOD, "truncated or damaged"),
}


@pytest.mark.parametrize("name, content, said", list(BAD.values()), ids=list(BAD))
def test_bad_input_is_refused_in_one_line_with_file_and_row(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read(tmp_path)
    message = str(error.value)
    assert said.format(folder=tmp_path) in message and name in message and "\n" not in message and len(message) < 500


def test_a_folder_without_a_file_of_a_known_kind_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="holds no file of a known kind .*parquet, .jsonl"):
        check_folder(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        check_folder(str(tmp_path / "none"))
    assert listing(str(tmp_path)) == [] and listing(str(tmp_path / "none")) is None


def test_every_kind_of_file_gives_its_texts(tmp_path):
    texts = [f"{i} é\n\u2028 \x00 👩‍👩‍👧" * (i % 5) for i in range(60)]
    lines = "".join(json.dumps({"text": text, "n": i}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts)).encode()
    two = [lines[:1000], lines[1000:]]
    contents = {
        "a.parquet": parquet({"n": list(range(60)), "text": texts}, row_group_size=11),
        "b.parquet": parquet({"text": pyarrow.array(texts, pyarrow.large_string())}, compression="zstd"),
        "c.parquet": parquet({"text": pyarrow.array(texts).dictionary_encode()}),
        "d.jsonl": lines.rstrip(b"\n"),
        "e.jsonl.gz": gzip.compress(two[0]) + gzip.compress(two[1]),
        "f.json.gz": gzip.compress(lines),
        "g.jsonl.zst": b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in two),
        "h.jsonl.zstd": pyarrow.compress(lines.replace(b"\n", b"\r\n\n"), "zstd", asbytes=True),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    parts = list(file_parts(str(tmp_path), "text"))
    assert [part.name for part in parts] == list(contents)
    for part in parts:
        assert list(part.texts("text")) == texts, part.name
    assert read(tmp_path, "text") == texts * len(contents)


def test_parts_of_a_parquet_file_cover_its_rows_once(tmp_path, monkeypatch):
    texts = [f"{i} " * 50 for i in range(100)]
    (tmp_path / "a.parquet").write_bytes(parquet({"text": texts}, row_group_size=9))
    whole = list(file_parts(str(tmp_path), "text"))
    assert [part.row_groups for part in whole] == [(0, 12)]
    monkeypatch.setattr(corpus_files, "PART_BYTES", 4000)
    parts = list(file_parts(str(tmp_path), "text"))
    assert len(parts) > 3 and [part.first_row for part in parts] == [part.row_groups[0] * 9 for part in parts]
    assert [text for part in parts for text in part.texts("text")] == texts
    monkeypatch.setattr(corpus_files, "PART_BYTES", 1)
    assert len(list(file_parts(str(tmp_path), "text"))) == 12


def test_a_part_does_not_say_where_it_lies(tmp_path):
    assert str(tmp_path) not in json.dumps(FilePart(str(tmp_path), "a/b.jsonl", 3).source())


def test_a_folder_is_named_by_its_last_part():
    assert [folder_name(folder) for folder in ("/data/fineweb-edu/", "fineweb", "gs://bucket/mix")] == ["fineweb-edu", "fineweb", "mix"]


def test_a_bucket_is_read_like_a_folder(tmp_path):
    files = fsspec.filesystem("memory")
    for name, content in (
        ("a.parquet", parquet({"text": ["x", "y"]})),
        ("sub/b.jsonl", GOOD),
        ("_x/c.jsonl", GOOD),
        ("d.jsonl.zst", pyarrow.compress(GOOD, "zstd", asbytes=True)),
    ):
        files.pipe(f"memory://corpora/web/{name}", content)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert listing("memory://corpora/web") == listing(str(tmp_path))
    assert read("memory://corpora/web") == read(tmp_path) == ["x", "y", "one", "two", "one", "two"]
    with pytest.raises(UserError, match="memory://corpora/none: no such folder"):
        check_folder("memory://corpora/none")


def test_an_address_that_cannot_be_read_is_one_line():
    with pytest.raises(UserError, match="data.files=s3://nowhere/x cannot be read .*check the address"):
        listing("s3://nowhere/x")


def test_other_fields_may_change_type_and_text_is_never_converted(tmp_path):
    """`pyarrow.dataset` refuses the first and turns the second into a datetime, so JSON lines are read with `json`."""
    rows = [{"text": "2020-01-01T00:00:00", "meta": None}, {"text": "two", "meta": {"k": 1}}, {"text": "three", "meta": "x", "new": 2}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(tmp_path) == ["2020-01-01T00:00:00", "two", "three"]
