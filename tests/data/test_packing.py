import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from plasticity_jax.data.packing import pack

EOS = 0
DOCUMENTS = st.lists(st.lists(st.integers(1, 65535), max_size=20), max_size=12)


def stream_of(documents):
    return [token for document in documents for token in [*document, EOS]]


@given(DOCUMENTS, st.integers(1, 16))
def test_nothing_is_lost_or_invented_but_the_remainder(documents, record_length):
    records = [record for record, _ in pack(documents, eos_id=EOS, record_length=record_length)]
    stream = stream_of(documents)
    kept = len(stream) - len(stream) % record_length
    assert len(records) == kept // record_length
    assert all(record.shape == (record_length,) and record.dtype == np.int32 for record in records)
    assert [int(token) for record in records for token in record] == stream[:kept]


@given(DOCUMENTS, st.integers(1, 16))
def test_every_document_ends_in_one_end_of_text(documents, record_length):
    records = [record for record, _ in pack(documents, eos_id=EOS, record_length=record_length)]
    kept = np.concatenate([*records, np.empty(0, np.int32)])
    ends = np.cumsum([len(document) + 1 for document in documents], dtype=int) - 1
    assert list(np.flatnonzero(kept == EOS)) == [end for end in ends if end < len(kept)]


@given(DOCUMENTS, st.integers(1, 16))
def test_the_first_document_is_the_one_of_the_first_token(documents, record_length):
    owner = [index for index, document in enumerate(documents) for _ in range(len(document) + 1)]
    for i, (_, first) in enumerate(pack(documents, eos_id=EOS, record_length=record_length)):
        assert first == owner[i * record_length]


def test_records_do_not_share_memory():
    records = [record for record, _ in pack([[1, 2, 3, 4, 5]], eos_id=EOS, record_length=2)]
    assert [record.tolist() for record in records] == [[1, 2], [3, 4], [5, 0]]
    assert not any(np.shares_memory(a, b) for a, b in zip(records, records[1:]))


def test_documents_are_read_as_they_are_needed():
    def endless():
        while True:
            yield [7, 8]

    record, first = next(pack(endless(), eos_id=EOS, record_length=4))
    assert record.tolist() == [7, 8, EOS, 7] and first == 0
