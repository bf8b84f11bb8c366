"""Tables, corpora, token files, and files of runs that are damaged or of another kind: each is refused in one line, or is read."""

import bz2
import gzip
import json
import lzma
import os
import shutil
from pathlib import Path
from random import Random

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutate import change_bytes, change_tree, within_limits

from plasticity_jax.config import StudyConfig
from plasticity_jax.data.completions import read_completions
from plasticity_jax.data.corpus_files import file_parts
from plasticity_jax.data.loader import TokenRecords
from plasticity_jax.data.probe_files import ProbeFiles, read_labeled
from plasticity_jax.data.tasks.originals import read_rows
from plasticity_jax.data.token_files import find_token_files, prepare_tokens
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.errors import UserError
from plasticity_jax.report.browse import Filter, browse
from plasticity_jax.runs.directory import RunDirectory, open_run
from plasticity_jax.runs.logs import AppendLog
from plasticity_jax.runs.run import Run
from plasticity_jax.study.execute import storage_problem
from plasticity_jax.study.graph import save_study
from plasticity_jax.study.records import save_records
from plasticity_jax.study.status import study_status

ROWS = [{"text": f"a text of some words, {number} é", "label": number % 3} for number in range(12)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
TABLE = ("text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in ROWS)).encode()


def parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink, row_group_size=5)
    return sink.getvalue().to_pybytes()


KINDS = {
    "rows.jsonl": LINES,
    "rows.json": json.dumps(ROWS).encode(),
    "rows.csv": TABLE,
    "rows.tsv": TABLE.replace(b",", b"\t"),
    "rows.txt": b"one document\n",
    "rows.parquet": parquet(),
    "rows.jsonl.gz": gzip.compress(LINES),
    "rows.jsonl.bz2": bz2.compress(LINES),
    "rows.jsonl.xz": lzma.compress(LINES),
    "rows.jsonl.zst": pyarrow.compress(LINES, "zstd", asbytes=True),
}


def changed(content: bytes, name: str, random: Random) -> bytes:
    if name.endswith((".jsonl", ".json")) and random.random() < 0.5:
        rows = change_tree(ROWS, random)
        text = json.dumps(rows) if name.endswith(".json") or not isinstance(rows, list) else "\n".join(map(json.dumps, rows))
        return text.encode()
    return change_bytes(content, random)


def read_in_every_way(path: Path) -> None:
    for read in (
        lambda: [text for part in file_parts(str(path.parent), "text") for text in part.texts("text")],
        lambda: list(read_rows(str(path), {"text": str, "label": int}, what="rows")),
        lambda: read_labeled("rows", ProbeFiles(train=str(path))),
    ):
        try:
            read()
        except UserError:
            pass


@given(random=st.randoms(use_true_random=False))
def test_a_table_that_was_changed(tmp_path_factory, random: Random):
    folder = tmp_path_factory.mktemp("hostile")
    name = random.choice(sorted(KINDS))
    (folder / name).write_bytes(changed(KINDS[name], name, random))
    with within_limits() as answered:
        answered(lambda: read_in_every_way(folder / name))
    shutil.rmtree(folder)


NO_FILES = [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path), lambda path: path.mkdir()]


@pytest.mark.parametrize("make", NO_FILES)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.txt", "rows.parquet", "tokens.npy", "tokenizer.json", "config.json"])
def test_what_is_no_file_is_not_read(tmp_path, make, name):
    """A pipe would be waited for, a device never ends."""
    make(tmp_path / name)

    def read():
        read_in_every_way(tmp_path / name)
        for open_it in (
            lambda: find_token_files(str(tmp_path / name), "uint16"),
            lambda: Tokenizer.load(tmp_path / name),
            lambda: open_run(tmp_path),
        ):
            with pytest.raises(UserError):
                open_it()

    with within_limits() as answered:
        answered(read)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the cat sees a dog " * 9, "some more words, and 12 numbers"], 290)


@given(random=st.randoms(use_true_random=False))
def test_token_files_that_were_changed(tokenizer, tmp_path_factory, random: Random):
    folder = tmp_path_factory.mktemp("hostile")
    ids = np.asarray(tokenizer.encode("the cat sees a dog " * 40) + [tokenizer.eos_id], np.uint16)
    (folder / "part.npy").write_bytes(change_bytes(np.tile(ids, 4).tobytes(), random))

    def prepare():
        files = find_token_files(str(folder), "uint16")
        settings = {"eos_id": tokenizer.eos_id, "tokenizer": tokenizer, "seq_len": 16, "held_out_fraction": 0.2, "max_tokens": None}
        prepare_tokens(folder / "out", files, dtype="uint16", **settings)
        manifest = folder / "out" / "tokens" / "tokens.json"
        manifest.write_text(json.dumps(change_tree(json.loads(manifest.read_text()), random)))
        records = TokenRecords(folder / "out" / "tokens", "train")
        if len(records) < 10**6:
            records.tokens(range(min(3, len(records))))

    with within_limits() as answered:
        answered(prepare)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A study of one evaluation, as it was written before there were checksums, so that every file is read for what it holds."""
    work = tmp_path_factory.mktemp("study")
    config, base = StudyConfig(name="study"), Run("study", "pretrain", "wd0", {"weight_decay": 0.0}, {}, member="wd0")
    run = Run("study", "evaluate", "wd0-topic", {"when": "before"}, {"model": base.id}, member="wd0", task="topic")
    save_study(work, config, [base, run])
    directory = RunDirectory(work / "study" / run.id)
    problems = [{"id": str(number), "prompt": "Human: ?", "problem": "?", "gold": "a", "subset": "", "source_split": "train"} for number in range(3)]
    rows = [
        {"id": str(number), "sample": sample, "text": "a", "answer": "a", "verdict": "right", "correct": True, "ended": True, "majority": None}
        for number in range(3)
        for sample in range(2)
    ]
    with directory.work(run, config):
        for name, lines in (("problems.jsonl", problems), ("completions.jsonl", rows), ("metrics.jsonl", [{"step": 1, "loss": 2.0}])):
            (directory.path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        directory.finish({"metrics": {"pass@1": 1.0}})
    (directory.path / "DONE").write_text('{"diverged": ""}')
    return work


@given(random=st.randoms(use_true_random=False))
def test_files_of_a_run_that_were_changed(study, tmp_path_factory, random: Random):
    work = Path(shutil.copytree(study, tmp_path_factory.mktemp("hostile") / "work"))
    (folder,) = (work / "study" / "evaluate").iterdir()
    names = [path for path in [*folder.iterdir(), work / "study" / "study.json"] if path.is_file() and path.name != "LOCK"]
    path = random.choice(sorted(names))
    content = path.read_bytes()
    if random.random() < 0.5:
        path.write_bytes(change_bytes(content, random))
    elif path.suffix == ".jsonl":
        rows = change_tree([json.loads(line) for line in content.splitlines()], random)
        path.write_text("".join(json.dumps(row) + "\n" for row in (rows if isinstance(rows, list) else [rows])))
    else:
        path.write_text(json.dumps(change_tree(json.loads(content), random)))

    with within_limits() as answered:
        answered(lambda: read_it_all(work, folder))
    shutil.rmtree(work.parent)


def read_it_all(work: Path, folder: Path) -> None:
    for read in (
        lambda: read_completions(folder),
        lambda: list(browse(work, Filter())),
        lambda: study_status(work, verify=True),
        lambda: open_run(folder).run(),
        lambda: open_run(folder).config(),
        lambda: save_records(work / "study", work / "records"),
    ):
        try:
            read()
        except UserError:
            pass


@pytest.mark.parametrize("make", NO_FILES)
@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "name",
    ["study.json", "DONE", "LOCK", "FAILED", "progress.json", "warnings.json", "config.json", "results.json", "completions.jsonl", "generated.jsonl"],
)
def test_what_is_no_file_among_those_of_a_run(study, tmp_path, make, finished, name):
    work = Path(shutil.copytree(study, tmp_path / "work"))
    (folder,) = (work / "study" / "evaluate").iterdir()
    again = json.loads((folder / "config.json").read_text())["run"]
    if not finished:
        (folder / "DONE").unlink()
    path = work / "study" / name if name == "study.json" else folder / name
    path.unlink(missing_ok=True)
    make(path)

    def read_and_work():
        read_it_all(work, folder)
        try:
            with RunDirectory(folder).work(Run.from_dict(again), StudyConfig(name="study")) as directory:
                AppendLog(folder / "generated.jsonl", keep=lambda row: True).close()
                directory.finish({})
        except (UserError, OSError) as error:
            assert isinstance(error, UserError) or storage_problem(error), error

    with within_limits() as answered:
        answered(read_and_work)
