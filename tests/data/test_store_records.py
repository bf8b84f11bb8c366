"""Records on a store: the same as on a disk, by requests for their bytes alone."""

import asyncio
import json
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from fsspec.asyn import AsyncFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from plasticity_jax.data import store_records
from plasticity_jax.data.highwayhash import highwayhash64
from plasticity_jax.data.loader import TokenRecords, batch_at, batches, order
from plasticity_jax.data.packing import SplitWriter, token_dtype
from plasticity_jax.data.prepare import TOKENS, prepare_corpus
from plasticity_jax.data.store_records import StoreRecords
from plasticity_jax.data.streaming import open_corpus, prepare_stream
from plasticity_jax.errors import UserError
from plasticity_jax.runs import storage
from plasticity_jax.runs.jsonfiles import write_json
from plasticity_jax.runs.storage import location, upload

MEMORY = fsspec.filesystem("memory")
BLOCK = 2**16
OVERHEAD = 40 + 6 + 24  # of a record: chunk header, prefix, at most one block header for records below 64 KiB


class Counted(MEMORY.__class__):
    """The store in memory. Notes every read: (file name, bytes), and how many calls they came in."""

    protocol = ("counted",)
    cachable = False
    reads: list[tuple[str, int]] = []
    calls = 0

    def cat_ranges(self, paths, starts, ends, **options):
        type(self).calls += 1
        return super().cat_ranges(paths, starts, ends, **options)

    def cat_file(self, path, start=None, end=None, **options):
        content = super().cat_file(path, start, end, **options)
        self.reads.append((path.rsplit("/", 1)[-1], len(content)))
        return content

    def _open(self, path, mode="rb", **options):
        if mode == "rb":
            self.reads.append((path.rsplit("/", 1)[-1], self.size(path)))
        return super()._open(path, mode, **options)

    @classmethod
    def _strip_protocol(cls, path):
        return MEMORY._strip_protocol(path.replace("counted://", "memory://"))

    @classmethod
    def forget(cls):
        cls.reads.clear()
        cls.calls = 0


class Together(AsyncFileSystem):
    """A store that answers no range of a batch before all of them have been asked for."""

    protocol = ("together",)
    cachable = False
    expected = 1

    async def _cat_file(self, path, start=None, end=None, **options):
        self.waiting = getattr(self, "waiting", 0) + 1
        for _ in range(1000):
            if self.waiting % self.expected == 0:
                break
            await asyncio.sleep(0.01)
        else:
            raise OSError("requests go out one after another")
        return MEMORY.cat_file(path, start, end)

    async def _info(self, path, **options):
        return MEMORY.info(path)

    async def _ls(self, path, detail=True, **options):
        return MEMORY.ls(path, detail)

    async def _find(self, path, **options):
        return MEMORY.find(path, detail=True)

    def _open(self, path, mode="rb", **options):
        return MEMORY.open(path, mode)

    @classmethod
    def _strip_protocol(cls, path):
        return MEMORY._strip_protocol(path.replace("together://", "memory://"))


fsspec.register_implementation("counted", Counted, clobber=True)
fsspec.register_implementation("together", Together, clobber=True)


def bucket(protocol="counted"):
    return location(f"{protocol}://{uuid.uuid4().hex}/work")


def write(path: Path, records) -> bytes:
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()
    return path.read_bytes()


def refusal(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------------------------ the file format


def test_the_hash_is_the_published_one():
    # highwayhash/highwayhash_test.cc: strings 00 01 02 ... of length 0, 1, 2, ... with the key 00 01 ... 1f
    published = """907A56DE22C26E53 7EAB43AAC7CDDD78 B8D0569AB0B53D62 5C6BEFAB8A463D80 F205A46893007EDA 2B8A1668E4A94541 BD4CCC325BEFCA6F
    4D02AE1738F59482 E1205108E55F3171 32D2644EC77A1584 F6E10ACDB103A90B C3BBF4615B415C15 243CC2040063FA9C A89A58CE65E641FF 24B031A348455A23
    40793F86A449F33B CFAB3489F97EB832 19FE67D2C8C5C0E2 04DD90A69C565CC2 75D9518E2371C504 38AD9B1141D3DD16 0264432CCD8A70E0 A9DB5A6288683390
    D7B05492003F028C 205F615AEA59E51E EEE0C89621052884 1BFC1A93A7284F4F 512175B5B70DA91D F71F8976A0A2C639 AE093FEF1F84E3E7 22CA92B01161860F
    9FC7007CCF035A68 A0C964D9ECD580FC 2C90F73CA03181FC"""
    for size, expected in enumerate(published.split()):
        strings = np.tile(np.arange(size, dtype=np.uint8), (3, 1))
        assert highwayhash64(strings, bytes(range(32))).tolist() == [int(expected, 16)] * 3


lengths = st.one_of(st.integers(1, 300), st.integers(1000, 5000), st.integers(BLOCK - 99, 2 * BLOCK))


@settings(max_examples=60)
@given(st.data(), lengths, st.lists(st.integers(0, 40), min_size=1, max_size=3))
def test_records_are_those_that_the_library_wrote(tmp_path_factory, data, length, counts):
    folder, root = tmp_path_factory.mktemp("records"), bucket()
    rng = np.random.default_rng(length)
    written = [[rng.bytes(length) for _ in range(n)] for n in counts]
    used = [data.draw(st.integers(0, n)) for n in counts]
    files = [root / str(i) / "x.array_record" for i in range(len(counts))]
    for file, part in zip(files, written):
        file.write_bytes(write(folder / "x", part))
    records = StoreRecords(root, files, used, length)
    expected = [record for part, n in zip(written, used) for record in part[:n]]
    assert len(records) == len(expected)
    if not expected:
        return
    indices = data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=30))
    Counted.forget()
    assert records.__getitems__(indices) == [expected[i] for i in indices]
    overhead = 46 + 24 * (1 + length // BLOCK)
    assert sum(size for _, size in Counted.reads) <= len(set(indices)) * (length + overhead)
    assert Counted.calls == (1 if indices else 0)
    firsts = np.cumsum([0, *used])[:-1]
    assert len(Counted.reads) <= len({i for i in indices if i - 1 not in indices or i in firsts}), "neighbors come in one request"
    for outside in (-1, len(expected)):
        with pytest.raises(IndexError):
            records.__getitems__([outside])


@pytest.mark.parametrize(("length", "n"), [(4048, 35), (32691, 5), (65428, 2)])
def test_records_that_meet_the_edge_of_a_block(tmp_path, length, n):
    # With the first two, every 16th or second record begins where a block does; with the third, the first one ends with the first byte of a block.
    root, written = bucket(), [np.random.default_rng(i).bytes(length) for i in range(n)]
    (root / "x").write_bytes(write(tmp_path / "x", written))
    records = StoreRecords(root, [root / "x"], [n], length)
    assert [records.__getitems__([i])[0] for i in range(n)] == written


def test_long_runs_are_cut_into_requests(tmp_path, monkeypatch):
    root, written = bucket(), [bytes([i]) * 500 for i in range(100)]
    (root / "x").write_bytes(write(tmp_path / "x", written))
    monkeypatch.setattr(store_records, "REQUEST_BYTES", 5600)
    Counted.forget()
    assert StoreRecords(root, [root / "x"], [100], 500).__getitems__(range(100)) == written
    assert len(Counted.reads) == 10 and max(size for _, size in Counted.reads) <= 5600 and Counted.calls == 1


@settings(max_examples=60)
@given(st.data(), st.sampled_from([1, 30, 500, 70_000]))
def test_no_damage_passes_for_records(tmp_path_factory, data, length):
    root = bucket()
    written = [np.random.default_rng(i).bytes(length) for i in range(5)]
    content = bytearray(write(tmp_path_factory.mktemp("damage") / "x", written))
    (root / "x").write_bytes(bytes(content))
    records = StoreRecords(root, [root / "x"], [5], length)
    chunk = 40 + 2 + (1 if length < 128 else 2 if length < 2**14 else 3) + length  # header, prefix, record
    end = 40 + 5 * chunk
    end += 24 * (1 + end // (BLOCK - 24))
    place = data.draw(st.integers(0, end - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    (root / "x").write_bytes(bytes(content))
    inside = place - 24 * (place // BLOCK + 1)  # without block headers
    if place % BLOCK < 24 or inside < 40 or (inside - 40) % chunk < 8:  # headers of blocks and of the file, checksums of headers
        assert records.__getitems__(range(5)) == written
    else:
        assert f"{root}/x is damaged at record {(inside - 40) // chunk}: " in refusal(lambda: records.__getitems__(range(5)))


# ------------------------------------------------------------------------------------------------------------------------------- corpora


@pytest.fixture(scope="module")
def domains(tmp_path_factory, wheels_dir):
    """A corpus of two domains, without shards."""
    directory = tmp_path_factory.mktemp("domains")
    settings = dict(held_out_fraction=0.2, max_documents=60, vocab_size=300, seq_len=200)
    prepare_corpus(directory, sources=("bbc", "commons"), wheels_dir=wheels_dir, **settings)
    return directory / TOKENS


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """A corpus of five shards, of the last of which not all records are used."""
    folder, directory = tmp_path_factory.mktemp("input") / "web", tmp_path_factory.mktemp("stream")
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        texts = [" ".join(rng.choice("the a cat dog bird sees hears follows old young red house".split(), 300)) for _ in range(120)]
        (folder / f"{i}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = open_corpus(files=str(folder), tfds=None, tfds_split="train", text_field="text")
    settings = dict(vocab_size=300, seq_len=100, text_field="text", held_out_fraction=0.2, max_tokens=130_000, workers=1)
    prepare_stream(directory, corpus, tokenizer=None, **settings)
    manifest = json.loads((directory / TOKENS / "tokens.json").read_text())
    assert len(manifest["shards"]) > 2
    return directory / TOKENS


@pytest.fixture(params=["domains", "stream"])
def corpus(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def stored(corpus):
    place = bucket()
    upload(corpus, place)
    return place


def test_a_corpus_on_a_store_is_that_of_the_disk(corpus, stored, tmp_path, monkeypatch):
    monkeypatch.setenv(storage.CACHE_VARIABLE, str(tmp_path / "cache"))
    for split in ("train", "held_out"):
        here, there = TokenRecords(corpus, split), TokenRecords(stored, split)
        everything = here.tokens(range(len(here)))
        assert len(there) == len(here) > 20 and there.domains == here.domains and there.fingerprint == here.fingerprint
        assert np.array_equal(there.tokens(range(len(there))), everything) and there.tokens([]).shape == here.tokens([]).shape
        mixed = np.random.default_rng(0).integers(0, len(here), 50)
        assert np.array_equal(there.tokens(mixed), everything[mixed]) and there.tokens(mixed).dtype == np.int32
        for name in ("domain_of", "document_of"):
            assert np.array_equal(getattr(there, name), getattr(here, name)) and getattr(there, name).dtype == getattr(here, name).dtype
    assert not (tmp_path / "cache").exists(), "nothing is copied"


def test_tokens_of_a_large_vocabulary(tmp_path):
    place, dtype = bucket(), token_dtype(100_000)
    written = np.random.default_rng(0).integers(0, 100_000, (30, 65))
    writer = SplitWriter(tmp_path, "train", dtype)
    for record in written:
        writer.write(record, 0)
    writer.close()
    manifest = {"seq_len": 64, "vocab_size": 100_000, "dtype": dtype.str, "domains": ["web"], "fingerprint": ""}
    write_json(tmp_path / "tokens.json", manifest | {"splits": {"train": {"web": {"records": 30}}}})
    upload(tmp_path, place)
    assert np.array_equal(TokenRecords(place, "train").tokens(range(30)), written)


@pytest.mark.parametrize("process", range(3))
def test_a_process_reads_the_bytes_of_its_rows(corpus, stored, process):
    steps, batch_size, rows = 7, 12, np.arange(process, 12, 3)
    about = dict(seed=2, batch_size=batch_size, rows=rows)
    here = TokenRecords(corpus, "train")
    Counted.forget()
    there = TokenRecords(stored, "train")
    assert [name for name, _ in Counted.reads] == ["tokens.json"]
    Counted.forget()
    found = list(batches(there, start_step=3, steps=steps, **about))
    for step, batch in enumerate(found, 3):
        expected = batch_at(here, step=step, **about)
        assert all(np.array_equal(batch[name], expected[name]) for name in expected)
    assert {name for name, _ in Counted.reads} == {"train.array_record"} and Counted.calls == steps
    record_bytes = 2 * (here.seq_len + 1)
    assert steps * len(rows) * record_bytes <= sum(size for _, size in Counted.reads) <= steps * len(rows) * (record_bytes + OVERHEAD)
    assert len(Counted.reads) <= steps * len(rows)


def test_a_whole_split_is_read_once_and_in_few_requests(corpus, stored):
    there = TokenRecords(stored, "held_out")
    Counted.forget()
    there.tokens(range(len(there)))
    files = len(list(corpus.rglob("held_out.array_record")))
    record_bytes = 2 * (there.seq_len + 1)
    assert len(Counted.reads) == files and sum(size for _, size in Counted.reads) <= len(there) * (record_bytes + OVERHEAD)


def test_the_arrays_beside_the_records_are_read_when_they_are_asked_for(domains):
    place = bucket()
    upload(domains, place)
    there = TokenRecords(place, "train")
    there.tokens([0])
    Counted.forget()
    for _ in range(2):
        there.document_of
        assert [name for name, _ in Counted.reads] == ["train.document_of.npy"]


def test_all_requests_of_a_batch_go_out_together(stream, monkeypatch):
    place = bucket("together")
    upload(stream, location(str(place).replace("together", "memory")))
    here, there = TokenRecords(stream, "train"), TokenRecords(place, "train")
    indices = order(len(here), seed=0, batch_size=8, step=0)
    assert np.diff(np.sort(indices)).min() > 1
    monkeypatch.setattr(Together, "expected", len(indices))
    found = next(batches(there, seed=0, batch_size=8, start_step=0, steps=1))
    assert np.array_equal(found["tokens"], here.tokens(indices)[:, :-1])


# ---------------------------------------------------------------------------------------------------------------------------- mishaps


def test_a_missing_file_and_a_short_one_are_refused_at_the_start(corpus, stored):
    name = sorted(each for each in stored.fs.find(stored.path) if each.endswith("train.array_record"))[-1]
    whole = MEMORY.cat_file(name)
    last = json.loads((corpus / "tokens.json").read_text()).get("shards", [{"train": len(TokenRecords(corpus, "train"))}])[-1]["train"]
    record_bytes = 2 * (TokenRecords(corpus, "train").seq_len + 1)
    MEMORY.pipe_file(name, whole[: last * (record_bytes + 40)])
    said = refusal(lambda: TokenRecords(stored, "train"))
    assert name in said and f"ends after {last * (record_bytes + 40)} bytes" in said and "run `plasticity prepare`" in said
    TokenRecords(stored, "held_out")
    MEMORY.rm(name)
    said = refusal(lambda: TokenRecords(stored, "train"))
    assert name in said and "is missing" in said and "run `plasticity prepare`" in said


def test_what_goes_wrong_while_reading_is_one_line(domains, monkeypatch):
    place = bucket()
    upload(domains, place)
    records = TokenRecords(place, "train")
    name, whole = f"{place.path}/train.array_record", (place / "train.array_record").read_bytes()
    about = dict(seed=0, batch_size=4, start_step=0, steps=3)

    MEMORY.pipe_file(name, whole[:1000])
    said = refusal(lambda: list(batches(records, **about)))  # through grain's threads
    assert "train.array_record ends after " in said
    real = Counted.cat_file

    def strict(self, path, start=None, end=None, **options):
        if start >= self.size(path):
            raise RuntimeError("416: range not satisfiable")
        return real(self, path, start, end, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Counted, "cat_file", strict)
        assert "train.array_record ends after 1000 bytes" in refusal(lambda: records.tokens([len(records) - 1]))
    MEMORY.pipe_file(name, whole[:100] + bytes(len(whole) - 100))
    assert "train.array_record is damaged at record " in refusal(lambda: list(batches(records, **about)))
    MEMORY.rm(name)
    assert "train.array_record is missing" in refusal(lambda: records.tokens([0]))

    def broken(self, path, start=None, end=None, **options):
        raise RuntimeError("503: try again\nlater")

    with monkeypatch.context() as patch:
        patch.setattr(Counted, "cat_file", broken)
        said = refusal(lambda: records.tokens([0]))
        assert "train.array_record cannot be read (503: try again later); run the command again" in said
        assert "train.domain_of.npy cannot be read" in refusal(lambda: records.domain_of)
        patch.setattr(Counted, "find", lambda self, path, **options: broken(self, path))
        assert f"{place} cannot be read (503" in refusal(lambda: TokenRecords(place, "train"))

    for content in (b"", (place / "train.domain_of.npy").read_bytes()[:-3]):
        (place / "train.domain_of.npy").write_bytes(content)
        assert "train.domain_of.npy is damaged" in refusal(lambda: records.domain_of)
