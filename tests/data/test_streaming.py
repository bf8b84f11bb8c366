import gzip
import hashlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from plasticity_jax.data import corpus_files, pool, shards, streaming
from plasticity_jax.data.loader import TokenRecords, batch_at
from plasticity_jax.data.sources import split_of
from plasticity_jax.data.streaming import open_corpus, prepare_stream
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.errors import UserError

SEQ_LEN, SHARE = 16, 0.25
SETTINGS = dict(vocab_size=300, seq_len=SEQ_LEN, text_field="text", held_out_fraction=SHARE, max_tokens=None, workers=1)


def some_texts(n, seed=0):
    rng = np.random.default_rng(seed)
    vocabulary = "the a cat dog bird sees hears follows old young red house tree river and then again é 1790 ½ 中文".split()
    return [" ".join(rng.choice(vocabulary, rng.integers(1, 60))) for _ in range(n)]


def write_corpus(folder, n=120):
    """Texts in the order of reading, over all kinds of files and one folder below."""
    texts = some_texts(n)
    a, b, c, d = (texts[i * n // 4 : (i + 1) * n // 4] for i in range(4))
    (folder / "sub").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(a))), "text": a}), folder / "a.parquet", row_group_size=7)
    lines = ["".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(part)).encode() for part in (b, c, d)]
    (folder / "b.jsonl").write_bytes(lines[0])
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines[1]))
    compressed = [pyarrow.compress(part, "zstd", asbytes=True) for part in (lines[2][:500], lines[2][500:])]
    (folder / "sub" / "d.jsonl.zst").write_bytes(b"".join(compressed))
    for other in (".cache/x.jsonl", "_tmp/x.jsonl", "README.md", "dataset_infos.json", "sub/.hidden.jsonl"):
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_text("not of the corpus")
    return texts


def files_of(directory):
    return {path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.rglob("*") if path.is_file()}


def prepare(directory, folder, tokenizer=None, **changes):
    settings = SETTINGS | changes
    corpus = open_corpus(files=str(folder), tfds=None, tfds_split="train", text_field=settings["text_field"])
    return prepare_stream(directory, corpus, tokenizer=tokenizer, **settings)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(some_texts(200, seed=1), 300)


@pytest.fixture
def small_parts(monkeypatch):
    """Parquet files are cut after every second row group of this file."""
    monkeypatch.setattr(corpus_files, "PART_BYTES", 1500)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("input") / "web"
    texts = write_corpus(folder)
    directory = tmp_path_factory.mktemp("corpus")
    patch = pytest.MonkeyPatch()
    patch.setattr(corpus_files, "PART_BYTES", 1500)
    summary = prepare(directory, folder, tokenizer)
    patch.undo()
    return folder, texts, directory, summary


def expected_streams(folder, tokenizer, directory):
    """Per shard and split, what its records must hold, from the shards' own account of their source and our own reading of the files."""
    shards_found = []
    for path in sorted((directory / "tokens" / "shards").iterdir()):
        source = json.loads((path / "shard.json").read_text())["source"]
        name = folder / source["file"]
        if name.suffix == ".parquet":
            texts = pyarrow.parquet.ParquetFile(name).read_row_groups(list(range(*source["row_groups"])))["text"].to_pylist()
        elif name.suffix == ".zst":
            texts = [json.loads(line)["text"] for line in pyarrow.input_stream(str(name), compression="zstd").read().decode().splitlines()]
        else:
            content = gzip.decompress(name.read_bytes()) if name.suffix == ".gz" else name.read_bytes()
            texts = [json.loads(line)["text"] for line in content.decode().splitlines()]
        shards_found.append((source, texts))
    return shards_found


def test_every_text_is_read_once_in_the_order_of_the_names(corpus, tokenizer):
    folder, texts, directory, _ = corpus
    found = expected_streams(folder, tokenizer, directory)
    assert [text for _, part in found for text in part] == texts
    assert [source["file"] for source, _ in found] == ["a.parquet"] * 3 + ["b.jsonl", "c.jsonl.gz", "sub/d.jsonl.zst"]
    assert [source["row_groups"] for source, _ in found][:3] == [[0, 2], [2, 4], [4, 5]] and found[3][0]["row_groups"] is None


def test_records_are_the_packed_tokens_of_each_shard(corpus, tokenizer):
    folder, _, directory, summary = corpus
    for split in ("train", "held_out"):
        records = TokenRecords(directory / "tokens", split)
        expected, owners, first = [], [], 0
        total = {"documents": 0, "tokens": 0, "bytes": 0, "records": 0, "dropped_tokens": 0}
        for _, texts in expected_streams(folder, tokenizer, directory):
            mine = [text for text in texts if split_of(text, SHARE) == split]
            encoded = [[*tokenizer.encode(text), tokenizer.eos_id] for text in mine]
            stream = [token for document in encoded for token in document]
            owner = [first + i for i, document in enumerate(encoded) for _ in document]
            n = len(stream) // (SEQ_LEN + 1)
            expected += np.reshape(stream[: n * (SEQ_LEN + 1)], (n, SEQ_LEN + 1)).tolist()
            owners += owner[: n * (SEQ_LEN + 1) : SEQ_LEN + 1]
            first += len(mine)
            for key, value in (
                ("documents", len(mine)),
                ("tokens", len(stream)),
                ("bytes", sum(len(text.encode()) for text in mine)),
                ("records", n),
                ("dropped_tokens", len(stream) - n * (SEQ_LEN + 1)),
            ):
                total[key] += value
        assert records.tokens(range(len(records))).tolist() == expected and len(expected) > 20
        assert records.document_of.tolist() == owners
        assert records.domains == ("web",) and records.domain_of.tolist() == [0] * len(records)
        assert summary["tokens"]["splits"][split] == {"web": total}
    assert records.fingerprint == summary["fingerprint"]
    batch = batch_at(records, seed=3, batch_size=5, step=40)
    assert batch["tokens"].shape == (5, SEQ_LEN)


def test_the_summary_is_json_and_the_shards_say_their_sha256(corpus):
    _, _, directory, summary = corpus
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert json.loads((directory / "tokens" / "tokens.json").read_text()) == summary["tokens"]
    for entry in summary["tokens"]["shards"]:
        shard = json.loads((directory / "tokens" / entry["name"] / "shard.json").read_text())
        records = TokenRecords(directory / "tokens", "train")
        first = sum(e["train"] for e in summary["tokens"]["shards"] if e["name"] < entry["name"])
        content = records.tokens(range(first, first + entry["train"])).astype("<u2").tobytes()
        assert shard["splits"]["train"]["sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_no_byte(corpus, tokenizer, tmp_path, small_parts, workers):
    folder, _, directory, summary = corpus
    again = prepare(tmp_path, folder, tokenizer, workers=workers)
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}
    assert files_of(tmp_path) == files_of(directory)


def test_a_trained_tokenizer_is_that_of_the_train_split(corpus, tmp_path):
    folder, texts, _, _ = corpus
    summary = prepare(tmp_path, folder, None)
    expected = Tokenizer.train([text for text in texts if split_of(text, SHARE) == "train"], 300)
    assert summary["tokenizer"]["fingerprint"] == expected.fingerprint == Tokenizer.load(tmp_path).fingerprint


@pytest.mark.parametrize("workers", [1, 2])
def test_max_tokens_keeps_the_first_records_to_the_record(corpus, tokenizer, tmp_path, small_parts, workers):
    folder, _, directory, _ = corpus
    everything = TokenRecords(directory / "tokens", "train")
    summary = prepare(tmp_path, folder, tokenizer, max_tokens=1000, workers=workers)
    records = TokenRecords(tmp_path / "tokens", "train")
    assert len(records) == math.ceil(1000 / SEQ_LEN) == summary["tokens"]["splits"]["train"]["web"]["records"]
    assert np.array_equal(records.tokens(range(len(records))), everything.tokens(range(len(records))))
    assert np.array_equal(records.document_of, everything.document_of[: len(records)])
    used = [entry["name"] for entry in summary["tokens"]["shards"]]
    assert 1 < len(used) < 6 and sorted(path.name for path in (tmp_path / "tokens" / "shards").iterdir()) == [name.split("/")[1] for name in used]
    assert sum(entry["train"] for entry in summary["tokens"]["shards"][:-1]) < len(records)  # no shard more than needed
    assert len(TokenRecords(tmp_path / "tokens", "held_out")) == sum(entry["held_out"] for entry in summary["tokens"]["shards"])


def test_more_tokens_than_there_are_takes_all(corpus, tokenizer, tmp_path, small_parts):
    folder, _, _, summary = corpus
    assert prepare(tmp_path, folder, tokenizer, max_tokens=10**9)["fingerprint"] == summary["fingerprint"]


def test_only_missing_shards_are_made_again(corpus, tokenizer, tmp_path, small_parts, monkeypatch):
    folder, _, directory, summary = corpus
    prepare(tmp_path, folder, tokenizer)
    lost = tmp_path / "tokens" / "shards" / "000002"
    for path in lost.iterdir():
        path.unlink()
    (tmp_path / "tokens" / "shards" / "000004.77.partial").mkdir()
    (tmp_path / "tokens" / "tokens.json").unlink()
    made = []
    original = shards.write_shard
    monkeypatch.setattr(
        pool, "write_shard", lambda folder, *arguments, **options: made.append(folder.name) or original(folder, *arguments, **options)
    )
    again = prepare(tmp_path, folder, tokenizer)
    assert made == ["000002"] and again["fingerprint"] == summary["fingerprint"] and files_of(tmp_path) == files_of(directory)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"held_out_fraction": 0.5}, "held_out_fraction 0.25, and this study has 0.5"),
        ({"seq_len": 8}, "seq_len 16, and this study has 8"),
        ({"tokenizer": "other"}, 'tokenizer "'),
        ({"folder": "other"}, "source"),
    ],
)
def test_shards_made_otherwise_are_refused_in_one_line(corpus, tokenizer, tmp_path, changes, said):
    folder = corpus[0]
    prepare(tmp_path / "out", folder, tokenizer)
    if changes.get("tokenizer"):
        changes = {"tokenizer": Tokenizer.train(some_texts(100, seed=2), 290)}
    if changes.pop("folder", None):
        folder = tmp_path / "web"
        write_corpus(folder, n=140)
    with pytest.raises(UserError) as error:
        prepare(tmp_path / "out", folder, **({"tokenizer": tokenizer} | changes))
    message = str(error.value)
    assert said in message and "was made with" in message and f"delete {tmp_path / 'out' / 'tokens' / 'shards'}" in message and "\n" not in message
    assert not (tmp_path / "out" / "tokens" / "tokens.json").exists()


def test_a_split_without_a_record_is_refused(corpus, tokenizer, tmp_path):
    with pytest.raises(
        UserError, match="data.held_out_fraction=1e-09 and train.seq_len=16 leave no held_out record of web; give more text or a larger"
    ):
        prepare(tmp_path, corpus[0], tokenizer, held_out_fraction=1e-9)


def test_empty_texts_are_left_out(tokenizer, tmp_path):
    folder = tmp_path / "web"
    folder.mkdir()
    texts = [part for text in some_texts(40) for part in ("", text)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    summary = prepare(tmp_path / "out", folder, tokenizer)
    assert sum(split["web"]["documents"] for split in summary["tokens"]["splits"].values()) == 40


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_input_in_a_later_file_keeps_the_shards_before_and_no_manifest(corpus, tokenizer, tmp_path, workers):
    folder = tmp_path / "web"
    write_corpus(folder)
    (folder / "zz.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    with pytest.raises(UserError) as error:
        prepare(tmp_path / "out", folder, tokenizer, workers=workers)
    assert f"line 2 of zz.jsonl in {folder}: field 'text' is int, not text" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out" / "tokens" / "tokens.json").exists()
    assert not [
        path for path in (tmp_path / "out" / "tokens" / "shards").iterdir() if path.suffix == ".partial" or "zz" in (path / "shard.json").read_text()
    ]


# ----------------------------------------------------------------------------------------------------- whole processes, killed and measured

PROGRAM = """
import sys, json
from pathlib import Path
from plasticity_jax.data import corpus_files, shards
from plasticity_jax.data.streaming import open_corpus, prepare_stream
from plasticity_jax.data.tokenizer import Tokenizer

if __name__ == "__main__":
    out, folder, tokenizer, settings = sys.argv[1:]
    settings = json.loads(settings)
    corpus_files.PART_BYTES = settings.pop("part_bytes")
    corpus = open_corpus(files=folder, tfds=None, tfds_split="train", text_field="text")
    summary = prepare_stream(Path(out), corpus, tokenizer=Tokenizer.load(Path(tokenizer)), **settings)
    loaded = [name for name in ("jax", "tensorflow", "tensorflow_datasets", "torch") if name in sys.modules]
    import resource
    print(json.dumps({"fingerprint": summary["fingerprint"], "loaded": loaded, "kilobytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
                      "worker_kilobytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}))
"""


def start(tmp_path, out, folder, tokenizer, **settings):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    tokenizer.save(tmp_path / "tokenizer.json")
    arguments = [sys.executable, str(program), str(out), str(folder), str(tmp_path / "tokenizer.json"), json.dumps(SETTINGS | settings)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return json.loads(output)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.nightly), 2])
def test_after_a_kill_the_result_is_bitwise_that_of_one_go(tokenizer, tmp_path, workers):
    folder = tmp_path / "web"
    folder.mkdir()
    texts = [text * 20 for text in some_texts(2400)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "a.parquet", row_group_size=100)
    settings = {"part_bytes": 80_000, "workers": workers, "seq_len": 64}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = finish(start(tmp_path, whole, folder, tokenizer, **settings))
    process = start(tmp_path, killed, folder, tokenizer, **settings)
    made = killed / "tokens" / "shards"
    while not made.is_dir() or sum(path.suffix != ".partial" for path in made.iterdir()) < 3:
        assert process.poll() is None
        time.sleep(0.002)
    workers_running = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "tokens" / "tokens.json").exists()
    stop_waiting = time.monotonic() + 20
    while left := [pid for pid in workers_running if os.path.exists(f"/proc/{pid}")]:  # workers end with their parent
        if time.monotonic() > stop_waiting:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"processes {left} outlive the one that started them")
        time.sleep(0.02)
    before = {path.name: path.stat().st_mtime_ns for path in made.iterdir() if path.suffix != ".partial"}
    assert 3 <= len(before) < 24
    assert finish(start(tmp_path, killed, folder, tokenizer, **settings))["fingerprint"] == expected["fingerprint"]
    assert files_of(killed) == files_of(whole)
    assert {name: (made / name).stat().st_mtime_ns for name in before} == before  # what was finished stayed


def children(pid):
    return [int(child) for child in open(f"/proc/{pid}/task/{pid}/children").read().split()]


@pytest.mark.nightly
def test_memory_does_not_grow_with_the_corpus(tokenizer, tmp_path):
    """115 MB of text in one file and one shard, beside 2 MB: the peak grows by less than 25 MB."""
    peaks = {}
    base = " ".join(some_texts(400)).replace("½", "")  # with it, no text could be split into pieces
    for name, n in (("small", 30), ("large", 2250)):
        folder = tmp_path / name
        folder.mkdir()
        schema = pyarrow.schema([("text", pyarrow.string()), ("other", pyarrow.string())])
        with pyarrow.parquet.ParquetWriter(folder / "a.parquet", schema) as writer:
            for first in range(0, n, 30):
                texts = [f"{first + i} {base}" for i in range(30)]
                writer.write_table(pyarrow.table({"text": texts, "other": texts}, schema=schema))
        peaks[name] = finish(start(tmp_path, tmp_path / f"out-{name}", folder, tokenizer, part_bytes=10**12, seq_len=2048))
    assert len(base) * 2250 > 115_000_000
    assert peaks["large"]["kilobytes"] - peaks["small"]["kilobytes"] < 25_000
    assert peaks["large"]["loaded"] == []  # nor do processes that tokenize files load what they do not need


def test_many_shards_may_be_open_at_once(corpus, tokenizer, tmp_path, monkeypatch):
    directory = tmp_path / "tokens"
    prepare(tmp_path, corpus[0], tokenizer)
    manifest = json.loads((directory / "tokens.json").read_text())
    manifest["shards"] = manifest["shards"] * 60
    (directory / "tokens.json").write_text(json.dumps(manifest))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, hard))
    try:
        records = TokenRecords(directory, "train")
        every = records.tokens(range(len(records)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    once = sum(entry["train"] for entry in manifest["shards"]) // 60
    assert len(every) == 60 * once and np.array_equal(every[-once:], every[:once])
    documents = sum(entry["train_documents"] for entry in manifest["shards"]) // 60
    assert np.array_equal(records.document_of[-once:], records.document_of[:once] + 59 * documents)


def test_a_worker_that_the_system_ends_is_one_line(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "_make_shard", end_process)
    with pytest.raises(UserError, match="one of 2 tokenizer processes was killed by the system.*lower data.workers"):
        prepare(tmp_path, corpus[0], tokenizer, workers=2)


def end_process(folder, part):
    os._exit(9)


def test_texts_that_cannot_be_cut_are_not_remembered(tokenizer):
    """A text with a disputed character is one piece, however long; short pieces stay."""
    for i in range(50):
        tokenizer.encode_arrays([f"{i} ½ " + "word " * 1000])
    tokenizer.encode_arrays(["short words"])
    assert max(map(len, tokenizer._ids_of_piece)) < 100 and "short" in tokenizer._ids_of_piece


def test_the_text_a_tokenizer_is_trained_on_is_bounded(corpus, tmp_path, monkeypatch):
    folder, texts, _, _ = corpus
    monkeypatch.setattr(streaming, "TRAINING_CHARACTERS", 6000)
    used, characters = [], 0
    for text in texts:
        if split_of(text, SHARE) == "train" and characters < 6000:
            used.append(text)
            characters += len(text)
    assert prepare(tmp_path, folder)["tokenizer"]["fingerprint"] == Tokenizer.train(used, 300).fingerprint
