import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import os

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from plasticity_jax.data import corpus_files
from plasticity_jax.data.corpus_files import FilePart, check_folder, file_parts, folder_name, listing, survey
from plasticity_jax.data.streaming import open_corpus
from plasticity_jax.errors import UserError


def read(folder, text_field="text"):
    return [text for part in file_parts(str(folder), text_field) for text in part.texts(text_field)]


def parquet(columns, **options):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(columns if isinstance(columns, pyarrow.Table) else pyarrow.table(columns), buffer, **options)
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
    "bytes that are not UTF-8": ("a.jsonl", b'{"text": "\xff"}\n', "line 1 of a.jsonl in {folder} is not UTF-8 ('utf-8' codec"),
    "half a surrogate pair": ("a.jsonl", b'{"text": "\\ud83d"}\n', "line 1 of a.jsonl in {folder}: the text has half a surrogate pair"),
    "a truncated gz": ("a.jsonl.gz", gzip.compress(MANY)[:-700], "a.jsonl.gz in {folder} is truncated or damaged after line"),
    "a damaged gz": ("a.jsonl.gz", gzip.compress(GOOD)[:-6] + b"\x00" * 6, "a.jsonl.gz in {folder} is truncated or damaged"),
    "a gz that is none": ("a.jsonl.gz", GOOD, "truncated or damaged after line 0 (Not a gzipped file"),
    "a truncated zst": ("a.jsonl.zst", pyarrow.compress(MANY, "zstd", asbytes=True)[:-30], "a.jsonl.zst in {folder} is truncated or damaged"),
    "a zst that is none": ("a.jsonl.zst", GOOD, "truncated or damaged"),
    "a truncated bz2": ("a.jsonl.bz2", bz2.compress(MANY)[:-70], "a.jsonl.bz2 in {folder} is truncated or damaged"),
    "a truncated xz": ("a.ndjson.xz", lzma.compress(MANY)[:-70], "a.ndjson.xz in {folder} is truncated or damaged"),
    "an xz that is none": ("a.txt.xz", GOOD, "a.txt.xz in {folder} is truncated or damaged (Input format not supported"),
    "a truncated JSON list": ("a.json", b'[{"text": "x"}, {"te', "element 2 of a.json in {folder} is not valid JSON"),
    "a JSON list of texts": ("a.json", b'["x"]', "element 1 of a.json in {folder} is not a JSON object"),
    "two columns of one name": (
        "a.parquet",
        parquet(pyarrow.table([["x"], ["y"], [1]], names=["text", "text", "id"])),
        "a.parquet in {folder} has 2 columns 'text'; rename all but one",
    ),
    "two CSV columns of one name": ("a.csv", b"text,text\nx,y\n", "a.csv in {folder} has 2 columns 'text'; rename all but one"),
    "a CSV without the column": ("a.csv", b"id;text\n1;x\n", "a.csv in {folder} has no column 'text'; it has id;text"),
    "a CSV row of other length": ("a.csv", b"id,text\n1,x\n2,y,z\n", "row 2 of a.csv in {folder} has 3 fields, and the first line names 2"),
    "a CSV with an open quote": ("a.csv", b'text\nx\n"y\nz\n', "a.csv in {folder} is not a table of UTF-8 text after row 1"),
    "a CSV in latin-1": ("a.csv", b"text\n\xe9\n", "a.csv in {folder} is not a table of UTF-8 text"),
    "a text in latin-1": ("a.txt", b"caf\xe9", "a.txt in {folder} is not UTF-8"),
}


@pytest.mark.parametrize("name, content, said", list(BAD.values()), ids=list(BAD))
def test_bad_input_is_refused_in_one_line_with_file_and_row(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read(tmp_path)
    message = str(error.value)
    assert said.format(folder=tmp_path) in message and name in message and "\n" not in message and len(message) < 500


def test_a_folder_without_a_file_of_a_known_kind_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UserError, match=r"holds no file of a known kind .*parquet, .jsonl.*it holds notes.md \(of another kind\); give the folder"):
        check_folder(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        check_folder(str(tmp_path / "none"))
    assert listing(str(tmp_path)) == [] and listing(str(tmp_path / "none")) is None


def table(texts, delimiter):
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=delimiter)
    writer.writerows([("n", "text"), *enumerate(texts)])
    return buffer.getvalue().encode()


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
        "i.JSONL": lines,
        "j.Ndjson": b"\xef\xbb\xbf" + lines.replace(b"\n{", b"\n\xef\xbb\xbf{", 3),
        "k.json": lines,
        "l.json": b"\xef\xbb\xbf " + json.dumps([{"text": text} for text in texts], indent=1).encode(),
        "m.jsonl.bz2": bz2.compress(two[0]) + bz2.compress(two[1]),
        "n.JSON.XZ": lzma.compress(json.dumps([{"text": text} for text in texts]).encode()),
        "o.csv": table(texts, ","),
        "p.TSV.gz": gzip.compress(b"\xef\xbb\xbf" + table(texts, "\t")),
        "q.PARQUET": parquet({"text": texts}),
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


def test_a_text_file_is_one_document_and_many_share_a_part(tmp_path, monkeypatch):
    texts = [f"document {i}\r\nof two lines \u2028\n" for i in range(40)]
    for i, text in enumerate(texts):
        content = ("\ufeff" * (i % 2) + text).encode()
        name, packed = [("txt", content), ("TXT.gz", gzip.compress(content)), ("txt.xz", lzma.compress(content))][i % 3]
        (tmp_path / f"{i:02d}.{name}").write_bytes(packed)
    (tmp_path / "20a.jsonl").write_bytes(GOOD)
    assert read(tmp_path) == [*texts[:21], "one", "two", *texts[21:]]
    assert len(list(file_parts(str(tmp_path), "text"))) == 3
    monkeypatch.setattr(corpus_files, "PART_BYTES", 200)
    parts = list(file_parts(str(tmp_path), "text"))
    assert len(parts) > 10 and read(tmp_path) == [*texts[:21], "one", "two", *texts[21:]]
    assert len({json.dumps(part.source()) for part in parts}) == len(parts) and str(tmp_path) not in str([part.source() for part in parts])
    monkeypatch.setattr(corpus_files, "TEXT_FILE_BYTES", 20)
    with pytest.raises(UserError, match="00.txt in .* is larger than .* MiB.*lines of a .jsonl file"):
        read(tmp_path)


def test_what_is_not_read_is_counted_and_named_in_one_line(tmp_path, caplog):
    for name in ("a.jsonl", "B.JSONL", "sub/c.jsonl.bz2", "d.json", "e.ndjson"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bz2.compress(GOOD) if name.endswith("bz2") else GOOD)
    for name in ("README.md", "f.jsonl.gz", "g.arrow", "_SUCCESS", ".cache/x.jsonl", "sub/dataset_infos.json", "LICENSE.txt", "h.parquet.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"" if name.endswith("l.gz") else GOOD)
    os.mkfifo(tmp_path / "i.jsonl")
    with caplog.at_level(logging.INFO):
        open_corpus(files=str(tmp_path), tfds=None, tfds_split="train", text_field="text")
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"data.files={tmp_path}: reads 5 files and leaves out 9: ") and "\n" not in line
    for name, why in survey(str(tmp_path)).left_out:
        assert f"{name} ({why})" in line
    assert dict(survey(str(tmp_path)).left_out) == {
        "README.md": "of another kind",
        "f.jsonl.gz": "empty",
        "g.arrow": "of another kind",
        "_SUCCESS": "hidden",
        ".cache": "hidden",
        "sub/dataset_infos.json": "about the data set",
        "LICENSE.txt": "about the data set",
        "h.parquet.gz": "of another kind",
        "i.jsonl": "not a file",
    }
    assert read(tmp_path) == ["one", "two"] * 5
    for i in range(30):
        (tmp_path / f"x{i}\n.bin").write_bytes(b"x")
    caplog.clear()
    open_corpus(files=str(tmp_path), tfds=None, tfds_split="train", text_field="text")
    [line] = [record.getMessage() for record in caplog.records]
    assert "leaves out 39: " in line and line.endswith("and 29 more") and "\n" not in line


def test_links_are_followed_once(tmp_path):
    folder, outside = tmp_path / "web", tmp_path / "outside"
    for name in ("web/a.jsonl", "web/sub/b.jsonl", "outside/c.jsonl", "outside/d/e.jsonl", "blob"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    for name, target in {
        "web/0": folder,  # to its own folder
        "web/sub/up": tmp_path,  # to what contains it
        "web/1": folder / "sub",
        "web/2.jsonl": folder / "a.jsonl",
        "web/3.jsonl": tmp_path / "blob",  # as the cache of Hugging Face downloads has it
        "web/4.jsonl": tmp_path / "blob",
        "web/5": outside,
        "outside/back": folder,
        "web/6": folder / "6",  # to itself
        "web/7.bin": tmp_path / "nowhere",
    }.items():
        (tmp_path / name).symlink_to(target)
    found = survey(str(folder))
    assert sorted(read(folder)) == ["blob", "outside/c.jsonl", "outside/d/e.jsonl", "web/a.jsonl", "web/sub/b.jsonl"]
    assert [name for name, _ in found.files] == ["3.jsonl", "5/c.jsonl", "5/d/e.jsonl", "a.jsonl", "sub/b.jsonl"]
    again = [name for name, why in found.left_out if why == "a link to what is read already"]
    assert {"0", "1", "2.jsonl", "4.jsonl", "5/back", "sub/up/web"} <= set(again)
    (folder / "8.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="8.jsonl is a link to a file that is not there; download the file again"):
        survey(str(folder))
