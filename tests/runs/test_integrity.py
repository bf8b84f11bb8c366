"""A finished run whose files are no longer what it wrote is found, named, and never believed."""

import hashlib
import json
import shutil

import pytest

from plasticity_jax.config import StudyConfig
from plasticity_jax.errors import StudyRefused, UserError
from plasticity_jax.runs.directory import DONE, STUDY, RunDirectory, open_run
from plasticity_jax.runs.integrity import checksums, differences
from plasticity_jax.runs.run import Run
from plasticity_jax.study.execute import execute
from plasticity_jax.study.graph import save_study
from plasticity_jax.study.status import study_status


@pytest.fixture
def run():
    return Run("study", "prepare", "corpus", {}, {})


@pytest.fixture
def finished(tmp_path, run):
    """A finished run with a small file of its own, one in a folder, and a checkpoint."""
    directory = RunDirectory(tmp_path / "study" / run.id)
    with directory.work(run, StudyConfig(name="study")):
        for name in ("tokens/tokens.json", "checkpoints/9/array", "tokens/train.array_record"):
            (directory.path / name).parent.mkdir(parents=True, exist_ok=True)
            (directory.path / name).write_bytes(name.encode() * 99)
        directory.finish({"rows": 12})
    return directory


def test_done_holds_the_sha256_of_every_file(finished):
    recorded = json.loads((finished.path / DONE).read_text())["files"]
    assert set(recorded) == {
        "config.json", "results.json", "provenance.json", "tokens/tokens.json", "checkpoints/9/array", "tokens/train.array_record",
    }  # fmt: skip
    for name, (size, digest) in recorded.items():
        content = (finished.path / name).read_bytes()
        assert (size, digest) == (len(content), hashlib.sha256(content).hexdigest())
    assert finished.damage() is None and finished.damage(whole=True) is None


def change_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("harm", "words"), [(change_a_byte, "has been altered"), (cut_off, "bytes instead of"), (lambda path: path.unlink(), "is missing")]
)
@pytest.mark.parametrize("name", ["config.json", "results.json", "tokens/tokens.json", "checkpoints/9/array", "tokens/train.array_record"])
def test_a_changed_file_is_named_with_the_way_out(finished, run, tmp_path, name, harm, words):
    harm(finished.path / name)
    damage = finished.damage(whole=True)
    assert damage is not None and f"{name} " in damage and words in damage and f"delete {finished.path} and run again" in damage
    at_opening = harm is not change_a_byte or not name.startswith("checkpoints/") and not name.endswith(".array_record")
    assert (finished.damage() is not None) == at_opening, "arrays are read by --verify only"
    if at_opening:
        with pytest.raises(UserError, match=f"{name} |no {name}"):
            open_run(finished.path)
    (tmp_path / "study" / STUDY).write_text(json.dumps({"runs": [run.to_dict()]}))
    [row] = study_status(tmp_path, verify=True)
    assert row["state"] == "damaged" and words in row["reason"]


def test_new_files_are_no_damage(finished):
    (finished.path / "note.txt").write_text("mine")
    assert finished.damage(whole=True) is None


def test_a_run_from_before_checksums_is_as_good_as_it_was(finished):
    (finished.path / DONE).write_text('{"diverged": ""}')
    change_a_byte(finished.path / "results.json")
    assert finished.state() == ("done", "") and finished.damage(whole=True) is None


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"diverged": "", "files": 3}', b'{"diverged": "", "files": {"a": 1}}'])
def test_a_damaged_done_is_one_line(finished, content):
    (finished.path / DONE).write_bytes(content)
    state, reason = finished.state()
    assert state == "damaged" and str(finished.path) in reason and "run again" in reason
    assert finished.damage() == reason


def test_a_finished_run_is_not_worked_on_again(finished, run):
    before = checksums(finished.path, without=())
    with pytest.raises(StudyRefused, match="finished by another process meanwhile"):
        with RunDirectory(finished.path).work(run, StudyConfig(name="other")):
            raise AssertionError("it must not begin")
    assert differences(finished.path, before, whole=True) == []


def test_a_study_stops_at_a_changed_run_and_the_way_out_works(finished, run, tmp_path):
    config = StudyConfig(name="study")
    assert execute(config, tmp_path, [run]).skipped == [run.id]
    cut_off(finished.path / "results.json")
    with pytest.raises(StudyRefused, match="results.json has"):
        execute(config, tmp_path, [run])
    shutil.rmtree(finished.path)
    assert not RunDirectory(finished.path).done


def test_another_config_does_not_take_over_a_study_that_is_worked_on(tmp_path, run):
    config, other = StudyConfig(name="study"), Run("study", "prepare", "corpus", {"rows": 2}, {})
    save_study(tmp_path, config, [run])
    with RunDirectory(tmp_path / "study" / run.id).work(run, config):
        save_study(tmp_path, config, [run, other])
        with pytest.raises(StudyRefused, match=f"being worked on with another config .{run.id}"):
            save_study(tmp_path, config, [other])
    save_study(tmp_path, config, [other])
