"""Trainings that are watched at Weights & Biases: what arrives there, and that none waits for it or ends because of it."""

import importlib.machinery
import json
import re
import struct
import sys
import threading
import types
from pathlib import Path

import pytest
import wandb
from test_pretrain import Killed, killed_after, untimed
from wandb.proto.wandb_internal_pb2 import Record
from worlds import CONFIG, World, change

from plasticity_jax.errors import UserError
from plasticity_jax.runs import tracker
from plasticity_jax.runs.jsonfiles import read_json, read_jsonl

WATCHED = change(CONFIG, "launch", tracker="wandb")


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No account of the user, no network, and no tracker that has failed before."""
    monkeypatch.setattr(tracker, "_given_up", threading.Event())
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    yield
    wandb.teardown()


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """Folder of the tracked runs."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    return tmp_path / "wandb"


def tracked(folder: Path) -> list[Record]:
    """What wandb keeps of a run: records in a log in LevelDB's format, here of one block."""
    [path] = folder.glob("*.wandb")
    content, at, records = path.read_bytes(), 7, []
    assert len(content) < 32768
    while at < len(content):
        length, kind = struct.unpack_from("<HB", content, at + 4)
        assert kind == 1  # a whole record
        records.append(Record.FromString(content[at + 7 : at + 7 + length]))
        at += 7 + length
    return records


def numbers(folder: Path) -> list[dict]:
    """Name → number, for every step that wandb keeps."""
    items = [record.history.item for record in tracked(folder) if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in items]


def flat(row: dict, prefix: str = "") -> dict:
    found = {}
    for name, value in row.items():
        found |= flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    return found


@pytest.mark.slow
def test_a_killed_training_goes_on_in_the_same_tracked_run(world: World, monkeypatch, offline):
    from plasticity_jax.train import pretrain

    name, real = "watched", pretrain.batches
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "batches", lambda *args, **kwargs: killed_after(real(*args, **kwargs), 13))
        with pytest.raises(Killed):
            world.pretrain({name: 0.1}, WATCHED)
    world.pretrain({name: 0.1}, WATCHED)
    assert untimed(world.root / name) == untimed(world.root / "base")
    first, second = sorted(offline.glob("offline-run-*"))  # of one second, the second's name is the first's and -1
    expected = [{name: value for name, value in flat(row).items() if name != "step"} for row in read_jsonl(world.root / name / "metrics.jsonl")]
    there = [{name: value for name, value in row.items() if not name.startswith("_")} for row in numbers(second)]
    assert there == expected[-len(there) :] and [row["_step"] for row in numbers(second)][-1] == 20
    assert numbers(first)[0]["loss"] == expected[0]["loss"]
    [[before], [run]] = ([record.run for record in tracked(folder) if record.WhichOneof("record_type") == "run"] for folder in (first, second))
    assert before.run_id == run.run_id == tracker.tracked_id(world.root / name)
    assert (run.project, run.run_group, run.job_type, run.display_name) == ("plasticity_jax", "tiny", "pretrain", name)
    assert {"weight_decay": 0.1, "member": name}.items() <= {item.key: json.loads(item.value_json) for item in run.config.update}.items()


@pytest.mark.slow
def test_members_of_one_program_are_tracked_runs_of_their_own(world: World, offline):
    world.pretrain({"left": 0.1, "right": 0.0}, change(WATCHED, "grid", mode="vmapped"))
    for name in ("left", "right"):
        [folder] = offline.glob(f"offline-run-*-{tracker.tracked_id(world.root / name)}")
        assert [row["loss"] for row in numbers(folder)] == [row["loss"] for row in read_jsonl(world.root / name / "metrics.jsonl")]


def fails(*args, **kwargs):
    raise ConnectionError("no route to host")


def hangs(*args, **kwargs):
    threading.Event().wait()


def works(*args, **kwargs):
    return types.SimpleNamespace(disabled=True, log=lambda *args, **kwargs: None, finish=lambda: None)


def fake(init) -> types.ModuleType:
    module = types.ModuleType("wandb")
    module.__dict__.update(init=init, setup=lambda settings=None: None, Settings=lambda **settings: settings, teardown=lambda: None)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("place, what", [("init", fails), ("log", fails), ("finish", fails), ("init", hangs), ("log", hangs)])
def test_a_tracker_that_fails_is_said_once_and_changes_nothing(world: World, monkeypatch, caplog, place, what):
    def broken(*args, **kwargs):
        run = works()
        setattr(run, place, what)
        return run

    monkeypatch.setitem(sys.modules, "wandb", fake(what if place == "init" else broken))
    for name in ("START_SECONDS", "SEND_SECONDS"):
        monkeypatch.setattr(tracker, name, 0.2)
    names = [f"{place}-{what.__name__}-{i}" for i in range(2)]
    for name in names:
        world.pretrain({name: 0.1}, WATCHED)
        assert untimed(world.root / name) == untimed(world.root / "base")
        assert read_json(world.root / name / "results.json")["held_out"] == world.results["base"]["held_out"]
    why = "no route to host" if what is fails else "it has not ended within"
    [said] = [record.getMessage() for record in caplog.records if "tracker" in record.getMessage()]
    assert re.search(rf"launch.tracker=wandb failed \({why}.*\); training goes on without it", said)


def test_a_missing_package_is_named_before_anything_is_written(monkeypatch):
    folder = importlib.machinery.ModuleSpec("wandb", None, is_package=True)  # ./wandb, which wandb itself makes
    for found in (None, folder):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
        with pytest.raises(UserError, match=r"needs the package wandb, which is not installed; run: pip install 'plasticity_jax\[tracker\]'"):
            tracker.check_tracker("wandb")
    tracker.check_tracker("none")


def test_a_key_is_needed_unless_wandb_is_offline(monkeypatch, capfd):
    with pytest.raises(UserError, match="no API key here; run wandb login"):
        tracker.check_tracker("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    wandb.teardown()
    with pytest.raises(UserError, match="cannot start .*WANDB_API_KEY invalid"):
        tracker.check_tracker("wandb")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_MODE", "disabled"), ("WANDB_API_KEY", "0" * 40)):
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.setenv(name, value)
        wandb.teardown()
        tracker.check_tracker("wandb")
    assert capfd.readouterr().err == ""
