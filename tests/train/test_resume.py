"""A killed training whose files were damaged before it resumes: it goes on from what is whole, says so, and ends in the same bits; or it refuses."""

import itertools
import json
import shutil
import time

import jax
import numpy as np
import pytest
from worlds import CONFIG, World

from plasticity_jax.errors import UserError
from plasticity_jax.model.checkpoint import Checkpoints, Damaged, finished_steps
from plasticity_jax.model.load import load_model
from plasticity_jax.runs.directory import RunDirectory, warnings_of
from plasticity_jax.runs.jsonfiles import read_jsonl

pytestmark = pytest.mark.slow


class Killed(BaseException):
    pass


def killed_after(batches, n):
    for i, batch in enumerate(batches):
        if i == n:
            raise Killed
        yield batch


def untimed(path):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_jsonl(path / "metrics.jsonl")]


def assert_same_run(path, other):
    for a, b in zip(*(jax.tree.leaves(load_model(one).params) for one in (path, other)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert untimed(path) == untimed(other)
    timed = {"seconds", "tokens_per_second", "mfu"}
    results = [{k: v for k, v in RunDirectory(one).results().items() if k not in timed} for one in (path, other)]
    assert results[0] == results[1]


@pytest.fixture(scope="module")
def interrupted(world: World):
    """(copy under a name) of a run that was killed at step 17, with checkpoints at steps 8 and 16."""
    from plasticity_jax.train import pretrain

    with pytest.MonkeyPatch.context() as patch:
        real = pretrain.batches
        patch.setattr(pretrain, "batches", lambda *args, **kwargs: killed_after(real(*args, **kwargs), 17))
        with pytest.raises(Killed):
            world.pretrain({"interrupted": 0.1}, CONFIG)
    assert finished_steps(world.root / "interrupted" / "checkpoints") == {8, 16}
    return lambda name: shutil.copytree(world.root / "interrupted", world.root / name)


def cut(step):
    for path in step.rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(step):
    """One bit in the middle of every file of arrays; of compressed ones that is noticed in reading, of others by our checksums."""
    for path in step.rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 16
        path.write_bytes(content)


def delete_in_part(step):
    (step / "params" / "_METADATA").unlink()


def delete_arrays(step):
    for path in step.rglob("params/**/d/*"):
        path.unlink()


def empty_checksums(step):
    (step / "checksums" / "metadata").write_text("{}")


@pytest.mark.parametrize("harm", [cut, flip, delete_in_part, delete_arrays, empty_checksums])
def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before(world: World, interrupted, caplog, harm):
    path = interrupted(f"harmed-{harm.__name__}")
    harm(path / "checkpoints" / "16")
    world.pretrain({path.name: 0.1}, CONFIG)
    assert_same_run(path, world.root / "base")
    if harm is not delete_in_part:  # which is no checkpoint at all, as after a kill in the middle of its deletion
        [warning] = warnings_of(path)
        assert "16 cannot be read" in warning and "went on from step 8" in warning
        assert warning in caplog.text
    assert [entry.name for entry in (path / "checkpoints").iterdir()] == ["20"], "what was set aside goes with the end of the training"


def test_without_a_whole_checkpoint_it_is_refused_and_nothing_is_lost(world: World, interrupted):
    path = interrupted("hopeless")
    cut(path / "checkpoints" / "16")
    shutil.rmtree(path / "checkpoints" / "8")
    with pytest.raises(UserError, match=f"16 cannot be read .*no checkpoint before it; put the file back, or delete {path} and run again"):
        world.pretrain({path.name: 0.1}, CONFIG)
    assert finished_steps(path / "checkpoints") == {16}, "it can still be put back"
    shutil.rmtree(path)
    world.pretrain({path.name: 0.1}, CONFIG)
    assert_same_run(path, world.root / "base")


def lines(*wanted):
    def harm(log):
        rows = log.read_bytes().splitlines(keepends=True)
        log.write_bytes(b"".join(row for row in rows if json.loads(row)["step"] in wanted))

    return harm


def break_line(step):
    def harm(log):
        rows = log.read_bytes().splitlines(keepends=True)
        log.write_bytes(b"".join(b"[]\n" if json.loads(row)["step"] == step else row for row in rows))

    return harm


@pytest.mark.parametrize(
    ("harm", "resumes"),
    [
        (lines(*range(1, 13)), 8),
        (lines(1, 4, 8, 12, 16), None),
        (break_line(12), 8),
        (break_line(4), None),
        (lines(4, 8, 10, 12, 16), None),
        (lambda log: log.unlink(), None),
        (lambda log: log.write_bytes(b""), None),
    ],
    ids=[
        "its end is lost",
        "rows in its middle are lost",
        "a line in its middle",
        "a line before all checkpoints",
        "its beginning is lost",
        "it is lost",
        "it is empty",
    ],
)
def test_a_damaged_log_is_noticed(world: World, interrupted, request, harm, resumes):
    """Otherwise a run would record a part of its tokens, and half a curve."""
    path = interrupted(f"log-{request.node.callspec.id.replace(' ', '-')}")
    before = sorted(entry.name for entry in (path / "checkpoints").iterdir())
    harm(path / "metrics.jsonl")
    if resumes is None:
        with pytest.raises(UserError, match=f"metrics.jsonl does not hold its rows from step 1 to step 8.*delete {path} and run again"):
            world.pretrain({path.name: 0.1}, CONFIG)
        assert sorted(entry.name for entry in (path / "checkpoints").iterdir()) == before and not warnings_of(path)
        return
    world.pretrain({path.name: 0.1}, CONFIG)
    assert_same_run(path, world.root / "base")
    assert "went on from step 8" in warnings_of(path)[0]


def test_what_killed_saves_and_writes_leave_behind_is_removed(world: World, interrupted):
    path = interrupted("leftovers")
    for name in ("checkpoints/24.orbax-checkpoint-tmp-7/params/d", "checkpoints/3"):
        (path / name).mkdir(parents=True)
        (path / name / "piece").write_bytes(b"half")
    (path / ".results.json.77.partial").write_bytes(b"{")
    world.pretrain({path.name: 0.1}, CONFIG)
    assert_same_run(path, world.root / "base")
    assert [entry.name for entry in (path / "checkpoints").iterdir()] == ["20"]
    assert not list(path.glob(".*.partial")) and not warnings_of(path)


def test_a_lack_of_memory_is_no_damage(world: World, interrupted, monkeypatch):
    from orbax.checkpoint import v1

    path = interrupted("short")

    def load(*arguments):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr(v1, "load_checkpointables", load)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"), Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
        checkpoints.restore_params(16, {})
    monkeypatch.undo()
    with pytest.raises(Damaged), Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
        checkpoints.restore_params(12, {})


def grid(suffix):
    return {f"calm{suffix}": 0.1, f"wild{suffix}": 1e6, f"free{suffix}": 0.0}


def test_members_of_one_program_go_on_from_a_common_step_in_a_program_of_the_same_size(world: World, monkeypatch):
    """One diverges, then all are killed, then a checkpoint of one of the others is damaged: the others end as if nothing had happened."""
    from plasticity_jax.train import pretrain

    straight = world.pretrain(grid("-straight"), CONFIG)
    assert straight[1]["diverged"] and straight[1]["steps"] < 8
    real, sizes = pretrain.batches, []
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "batches", lambda *args, **kwargs: killed_after(real(*args, **kwargs), 17))
        with pytest.raises(Killed):
            world.pretrain(grid("-harmed"), CONFIG)
    cut(world.root / "free-harmed" / "checkpoints" / "16")
    real_train = pretrain.train
    monkeypatch.setattr(
        pretrain, "train", lambda *args, **kw: sizes.append(jax.tree.leaves(args[1]["params"])[0].shape[0]) or real_train(*args, **kw)
    )
    world.pretrain(grid("-harmed"), CONFIG)
    assert sizes == [3]
    for name in ("calm", "free"):
        assert_same_run(world.root / f"{name}-harmed", world.root / f"{name}-straight")
    assert untimed(world.root / "wild-harmed") == untimed(world.root / "wild-straight")
    assert not warnings_of(world.root / "calm-harmed") and "16 cannot be read" in warnings_of(world.root / "free-harmed")[0]


@pytest.mark.parametrize("jumps", [itertools.count(0, -86400), itertools.cycle([0, 60, -60])], ids=["back by days", "to and fro by a minute"])
def test_a_clock_that_jumps_changes_nothing(world: World, interrupted, monkeypatch, jumps, request):
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    path = interrupted(f"clock-{request.node.callspec.id.replace(' ', '-')}")
    world.pretrain({path.name: 0.1}, CONFIG)
    assert_same_run(path, world.root / "base")
    assert all(row["seconds"] > 0 for row in read_jsonl(path / "metrics.jsonl"))
