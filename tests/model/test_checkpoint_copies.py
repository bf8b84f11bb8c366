"""Checkpoints on a store that Orbax does not write to: what is on the store is what counts."""

import tempfile
import uuid
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import write_folder

from plasticity_jax.cli import main
from plasticity_jax.errors import UserError
from plasticity_jax.model import Checkpoints, checkpoint_copies, load_model
from plasticity_jax.model.checkpoint import delete_step, finished_steps
from plasticity_jax.runs.storage import download, location

PARAMS = {"a": jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32), "b": jnp.asarray([-0.0, 1e-45, np.inf, np.nan], jnp.float32)}
OPTIMIZER = {"mu": PARAMS}


@pytest.fixture
def place():
    return location(f"memory://{uuid.uuid4().hex}/run/checkpoints")


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def assert_bit_equal(actual, expected):
    assert [np.asarray(x).tobytes() for x in jax.tree.leaves(actual)] == [np.asarray(x).tobytes() for x in jax.tree.leaves(expected)]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_round_trip_is_bitwise_and_leaves_no_local_files(place, asynchronous, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Checkpoints(place, keep=2, asynchronous=asynchronous) as checkpoints:
        assert checkpoints.latest() is None
        for step in (1, 5, 9):
            checkpoints.save(step, PARAMS, OPTIMIZER)
        checkpoints.wait()
        assert checkpoints.latest() == 9
    assert finished_steps(place) == {5, 9} and sorted(path.name for path in place.iterdir()) == ["5", "9"]
    with Checkpoints(place, read_only=True) as checkpoints:
        for step in (5, 9):
            params, optimizer = checkpoints.restore(step, abstract(PARAMS), abstract(OPTIMIZER))
            assert_bit_equal((params, optimizer), (PARAMS, OPTIMIZER))
        np.testing.assert_array_equal(checkpoints.restore_array(9, abstract(PARAMS), 0), PARAMS["a"])
    assert list(tmp_path.iterdir()) == []
    delete_step(place, 9)
    assert finished_steps(place) == {5}


def test_copied_to_a_disk_they_are_checkpoints_of_a_disk(place, tmp_path):
    """A run may be brought home by any tool that copies files."""
    with Checkpoints(place) as checkpoints:
        checkpoints.save(3, PARAMS)
    download(place, tmp_path / "checkpoints")
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.latest() == 3
        assert_bit_equal(checkpoints.restore_params(3, abstract(PARAMS)), PARAMS)


@pytest.mark.parametrize("objects", [0, 1, 5])
def test_a_step_that_was_cut_off_does_not_count(place, monkeypatch, objects):
    """Killed after some objects of a step: the one before it is the latest, stays, and the step can be saved again."""
    with Checkpoints(place, keep=1) as checkpoints:
        checkpoints.save(1, PARAMS)
    put, done = fsspec.filesystem("memory").__class__.put_file, []

    def cut_off(self, *arguments, **options):
        if len(done) == objects:
            raise OSError("gone")
        done.append(arguments)
        return put(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(fsspec.filesystem("memory").__class__, "put_file", cut_off)
        with pytest.raises(OSError, match="gone"), Checkpoints(place, keep=1) as checkpoints:
            checkpoints.save(2, PARAMS)
    assert finished_steps(place) == {1}
    with Checkpoints(place, read_only=True) as checkpoints:
        assert checkpoints.latest() == 1
        assert_bit_equal(checkpoints.restore_params(1, abstract(PARAMS)), PARAMS)
    with Checkpoints(place, keep=1) as checkpoints:
        checkpoints.save(2, PARAMS)
    assert finished_steps(place) == {2}


def test_the_mark_is_written_last_and_removed_first(place, monkeypatch):
    memory, changes = fsspec.filesystem("memory").__class__, []
    for name in ("pipe_file", "put_file", "rm_file", "rm"):

        def noted(self, *arguments, original=getattr(memory, name), name=name, **options):
            changes.append((name, str(arguments)))
            return original(self, *arguments, **options)

        monkeypatch.setattr(memory, name, noted)
    with Checkpoints(place) as checkpoints:
        checkpoints.save(1, PARAMS)
    assert checkpoint_copies.COMMITTED in changes[-1][1] and changes[-1][0] == "pipe_file"
    changes.clear()
    delete_step(place, 1)
    assert checkpoint_copies.COMMITTED in changes[0][1] and finished_steps(place) == set()


def test_a_damaged_step_is_one_line_with_its_place_on_the_store(place):
    with Checkpoints(place) as checkpoints:
        checkpoints.save(4, PARAMS)
    for name in place.fs.find((place / "4" / "params").path):
        if "/d/" in name:
            place.fs.pipe_file(name, b"x")
    with Checkpoints(place, read_only=True) as checkpoints, pytest.raises(UserError, match="cannot be read") as error:
        checkpoints.restore_params(4, abstract(PARAMS))
    assert str(place / "4") in str(error.value) and "\n" not in str(error.value)


def test_several_processes_are_refused(place, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="2 processes .* shared disk or to gs://"):
        Checkpoints(place)


def test_models_go_to_a_store_and_come_back(place, tmp_path, capsys):
    """Import to a store, export from it to a store; and a folder there is refused where weights would be read from it."""
    run, out = place.parent / "imported", place.parent / "out"
    assert main(["import", "--hf", str(write_folder(tmp_path / "hf")), "--out", str(run)]) == 0
    assert main(["export", "--model", str(run), "--out", str(out)]) == 0
    download(out, tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes()
    here, there = load_model(tmp_path / "hf"), load_model(tmp_path / "back")
    assert_bit_equal(here.params, there.params)
    assert_bit_equal(load_model(str(run)).params, here.params)
    capsys.readouterr()
    assert main(["export", "--model", str(run), "--out", str(out)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert main(["import", "--hf", str(out), "--out", str(Path(tmp_path / "again"))]) == 2
    assert "on a store" in capsys.readouterr().err.strip().splitlines()[-1]
