import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from plasticity_jax.data import corpus_tfds
from plasticity_jax.data.corpus_tfds import data_set_folder, data_set_listing, example_parts
from plasticity_jax.data.documents import quiet_tfds
from plasticity_jax.data.loader import TokenRecords
from plasticity_jax.data.sources import split_of
from plasticity_jax.data.streaming import open_corpus, prepare_stream
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.errors import UserError

N = 200


class SmallTalk(tfds.core.GeneratorBasedBuilder):
    """Texts with a number."""

    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "n": tfds.features.Scalar(np.int64)})
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(N), "test": self._generate_examples(3)}

    def _generate_examples(self, n):
        for i in range(n):
            yield i, {"text": f"talk number {i} é " + "of many words " * (i % 7), "n": i}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    with quiet_tfds():
        SmallTalk(data_dir=str(root), file_format="array_record").download_and_prepare()
    return root


@pytest.fixture
def folder(root):
    return root / "small_talk" / "1.2.0"


def expected_texts(folder, split="train"):
    source = tfds.builder_from_directory(str(folder)).as_data_source(split)
    return [source[i]["text"].decode() for i in range(len(source))]


def test_a_name_and_a_folder_are_the_same_data_set(root, folder, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(root))
    names = ["small_talk", "small_talk:1.2.0"]
    assert [data_set_folder(name) for name in (*names, str(folder))] == [folder] * 3
    assert [name for name, _ in data_set_listing("small_talk")] == sorted(path.name for path in folder.iterdir())


def test_ranges_cover_the_examples_once_and_in_order(folder, monkeypatch):
    monkeypatch.setattr(corpus_tfds, "PART_BYTES", 2000)
    parts = list(example_parts(str(folder), "train", "text"))
    assert len(parts) > 5 and [parts[0].start, parts[-1].end] == [0, N] and all(a.end == b.start for a, b in zip(parts, parts[1:]))
    assert [text for part in parts for text in part.texts("text")] == expected_texts(folder)
    half = list(example_parts(str(folder), "train[:50%]", "text"))
    assert [text for part in half for text in part.texts("text")] == expected_texts(folder)[: N // 2]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_records_are_those_of_its_texts(folder, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(corpus_tfds, "PART_BYTES", 4000)
    texts = expected_texts(folder)
    tokenizer = Tokenizer.train(texts, 270)
    corpus = open_corpus(files=None, tfds=str(folder), tfds_split="train", text_field="text")
    prepare_stream(
        tmp_path, corpus, tokenizer=tokenizer, vocab_size=270, seq_len=8, text_field="text", held_out_fraction=0.3, max_tokens=None, workers=workers
    )
    assert corpus.name == "small_talk"
    expected = []
    for part in corpus.parts():
        mine = [text for text in texts[part.start : part.end] if split_of(text, 0.3) == "train"]
        stream = [token for text in mine for token in [*tokenizer.encode(text), tokenizer.eos_id]]
        expected += np.reshape(stream[: len(stream) // 9 * 9], (-1, 9)).tolist()
    records = TokenRecords(tmp_path / "tokens", "train")
    assert records.tokens(range(len(records))).tolist() == expected


def test_tensorflow_is_not_imported(folder):
    code = (
        "import sys; from plasticity_jax.data.corpus_tfds import example_parts\n"
        "texts = [text for part in example_parts(sys.argv[1], 'train', 'text') for text in part.texts('text')]\n"
        "print(len(texts), 'tensorflow' in sys.modules, 'jax' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True).stdout
    assert output.split() == [str(N), "False", "False"]


@pytest.mark.parametrize(
    "setting, split, field, said",
    [
        ("no_such_data", "train", "text", "data.tfds=no_such_data: no prepared data set of this name"),
        ("No Such/Name!", "train", "text", "no prepared data set of this name"),
        (None, "validation", "text", "data.tfds_split='validation': data set small_talk/1.2.0 has test, train"),
        (None, "train", "body", "has no feature 'body'; it has n, text: set data.text_field"),
        (None, "train", "n", "feature 'n' of data set small_talk/1.2.0 is Scalar, not Text"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(folder, setting, split, field, said):
    with pytest.raises(UserError) as error:
        list(example_parts(setting or str(folder), split, field))
    message = str(error.value)
    assert said in message.replace("text, n", "n, text").replace("train, test", "test, train") and "\n" not in message


def test_a_data_set_that_cannot_be_read_by_position_is_refused(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    (tmp_path / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match="is stored as tfrecord, which cannot be read by position; prepare it with file_format='array_record'"):
        list(example_parts(str(tmp_path), "train", "text"))
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="holds no TFDS data set that can be read"):
        list(example_parts(str(tmp_path), "train", "text"))
