"""A log on a store is the log on a disk, whatever is killed when."""

import contextlib
import json
import uuid

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plasticity_jax.runs.logs import AppendLog, read_log
from plasticity_jax.runs.storage import location

MEMORY = fsspec.filesystem("memory")


class Killed(BaseException):
    pass


class Store(MEMORY.__class__):
    """A store that stops the process before one of its changes."""

    protocol = ("killing",)
    left: int | None = None

    @classmethod
    def _strip_protocol(cls, path):
        return MEMORY._strip_protocol(path.replace("killing://", "memory://"))

    def _count(self):
        if Store.left is not None:
            if Store.left == 0:
                raise Killed
            Store.left -= 1

    def pipe_file(self, path, value, **options):
        self._count()
        return super().pipe_file(path, value, **options)

    def rm_file(self, path):
        self._count()
        return super().rm_file(path)

    def rm(self, path, **options):
        self._count()
        return super().rm(path, **options)


fsspec.register_implementation("killing", Store, clobber=True)


def steps(path):
    return [row["step"] for row in read_log(path)]


def session(path, start, writes, *, kill_after=None):
    """A process that goes on at step `start`: per step a row, and after those of `writes` that say so a checkpoint. Returns the last checkpoint.

    It is killed in place of the change to the store after the first `kill_after`.
    """
    saved = start
    Store.left = kill_after
    with contextlib.suppress(Killed):
        log = AppendLog(path, keep=lambda row: row["step"] <= start)
        for step, checkpoint in enumerate(writes, start + 1):
            log.append(json.dumps({"step": step}))
            if checkpoint:
                log.close_part()
                saved = step
        log.close()
    Store.left = None
    return saved


SESSIONS = st.lists(st.tuples(st.floats(0, 1), st.lists(st.booleans(), max_size=8), st.none() | st.integers(0, 6)), max_size=6)


@given(SESSIONS)
def test_killed_anywhere_the_rows_up_to_the_last_checkpoint_are_there_once(sessions):
    """What is read after every kill: 1, 2, 3 ... without gap or repetition, at least up to the step that a checkpoint was made at.

    A process goes on at the last checkpoint or, as members of one program do, at one before it.
    """
    path = location(f"killing://{uuid.uuid4().hex}/metrics.jsonl")
    at = 0
    for share, writes, kill_after in sessions:
        start = round(share * at)
        at = session(path, start, writes, kill_after=kill_after)
        found = steps(path)
        assert found == list(range(1, len(found) + 1)) and len(found) >= at
    session(path, at, [False, True, False])
    assert steps(path) == list(range(1, at + 4))


def test_parts_are_numbered_and_closed_at_each_checkpoint():
    path = location(f"memory://{uuid.uuid4().hex}/run/metrics.jsonl")
    log = AppendLog(path, keep=lambda row: True)
    for step in range(1, 6):
        log.append(json.dumps({"step": step}))
        if step % 2 == 0:
            log.close_part()
            assert steps(path) == list(range(1, step + 1))
    assert steps(path) == [1, 2, 3, 4]
    log.close_part(), log.close_part(), log.close()
    assert sorted(p.name for p in path.parent.iterdir()) == [f"metrics.0000{i}.jsonl" for i in (1, 2, 3)]
    AppendLog(path, keep=lambda row: row["step"] <= 3).close()
    assert steps(path) == [1, 2, 3]
    assert sorted(p.name for p in path.parent.iterdir()) == ["metrics.00001.jsonl", "metrics.00002.jsonl"]


def test_more_than_nine_parts_are_read_in_order():
    path = location(f"memory://{uuid.uuid4().hex}/metrics.jsonl")
    session(path, 0, [True] * 12)
    assert steps(path) == list(range(1, 13))


@pytest.mark.parametrize("text", ["a\u2028b", "é\x85", "plain"])
def test_text_of_any_kind_stays_on_its_line(text, tmp_path):
    for path in (tmp_path / "m.jsonl", location(f"memory://{uuid.uuid4().hex}/m.jsonl")):
        log = AppendLog(path, keep=lambda row: True)
        log.append(json.dumps({"text": text}, ensure_ascii=False))
        log.close()
        assert read_log(path) == [{"text": text}]


def test_on_a_disk_a_row_is_there_at_once_and_half_a_row_is_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = AppendLog(path, keep=lambda row: True)
    log.append('{"step": 1}')
    assert path.read_bytes() == b'{"step": 1}\n'
    log.close_part()
    log.close()
    path.write_bytes(path.read_bytes() + b'{"step": 2}\n{"ste')
    assert steps(path) == [1, 2]
    AppendLog(path, keep=lambda row: row["step"] <= 1).close()
    assert path.read_bytes() == b'{"step": 1}\n'
    assert read_log(tmp_path / "none.jsonl") == []
