"""One path type for disks and stores, tried on fsspec's store in memory."""

import os
import re
import uuid
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plasticity_jax.config import load_config
from plasticity_jax.errors import UserError
from plasticity_jax.runs import storage
from plasticity_jax.runs.jsonfiles import read_json, write_json
from plasticity_jax.runs.storage import (
    free_bytes,
    is_local,
    joined,
    location,
    relative,
    remove_tree,
    replacing,
    staging,
    upload,
)
from plasticity_jax.study.execute import check_workdir

MEMORY = fsspec.filesystem("memory")


@pytest.fixture
def bucket():
    return location(f"memory://{uuid.uuid4().hex}/work")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(storage.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@given(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1).filter(
        lambda text: "://" not in text and not re.match("~[^/]", text)
    )
)
def test_what_is_no_url_is_a_local_path(text):
    assert location(text) == Path(text) and is_local(location(text))


def test_the_home_of_an_unknown_user_is_refused():
    assert location("~/work") == Path("~/work")
    with pytest.raises(UserError, match="~0 begins with the home of a user who is not known here"):
        location("~0")


def test_a_url_is_a_path_on_its_store():
    path = location("memory://bucket/work/") / "tiny" / "study.json"
    assert str(path) == "memory://bucket/work/tiny/study.json" and not is_local(path)
    assert location(path) is path and location("file:///tmp/x") == Path("/tmp/x")
    assert free_bytes(path) is None


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nfs9://host/x", "nfs9://, which is not a known kind"),
        ("memory://", "names no bucket"),
        ("az://box/x", "pip install adlfs"),
    ],
)
def test_a_url_that_cannot_be_used_is_one_line(url, words):
    with pytest.raises(UserError, match=words) as error:
        location(url)
    assert "\n" not in str(error.value) and url in str(error.value)


def test_a_missing_driver_for_google_names_the_extra(monkeypatch):
    def missing(scheme):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(storage.fsspec, "get_filesystem_class", missing)
    with pytest.raises(UserError, match=r"pip install 'plasticity_jax\[gcs\]'"):
        location("gs://bucket/work")


@pytest.mark.parametrize("where", ["disk", "store"])
def test_a_failed_write_leaves_the_old_file(where, bucket, tmp_path):
    path = (tmp_path if where == "disk" else bucket) / "a.json"
    with replacing(path) as file:
        file.write(b"old")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"ne")
        1 / 0
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir() if p.is_file()] == ["a.json"]


class Recording(MEMORY.__class__):
    """Notes the objects that are written by one call."""

    protocol = ("recording",)
    written: list[str] = []

    def pipe_file(self, path, value, **options):
        self.written.append(self._strip_protocol(path))
        return super().pipe_file(path, value, **options)

    @classmethod
    def _strip_protocol(cls, path):
        return MEMORY._strip_protocol(path.replace("recording://", "memory://"))


def test_a_file_on_a_store_is_one_object_write():
    fsspec.register_implementation("recording", Recording, clobber=True)
    path = location("recording://bucket/run/DONE")
    write_json(path, {"diverged": ""})
    assert Recording.written == ["/bucket/run/DONE"] and read_json(path) == {"diverged": ""}


def test_relative_places_lead_back(bucket, tmp_path):
    for root in (bucket, tmp_path):
        run, parent = root / "tiny" / "finetune" / "x-1", root / "tiny" / "pretrain" / "y-2"
        assert relative(parent, run) == "../../pretrain/y-2"
        for folder in (run, parent):
            folder.mkdir(parents=True)
            (folder / "f").write_text(folder.name)
        assert (joined(run, relative(parent, run)) / "f").read_text() == "y-2"
    assert joined(bucket / "run", relative(tmp_path, bucket / "run")) == tmp_path
    assert joined(tmp_path / "run", relative(bucket, tmp_path / "run")) == bucket


def test_trees_go_to_a_store(bucket, tmp_path):
    files = {"a.txt": b"1", "sub/b.bin": bytes(range(256)) * 1000, "sub/deeper/c": b""}
    for name, content in files.items():
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_bytes(content)
    there = bucket / "there"
    upload(tmp_path / "here", there)
    assert {name.removeprefix(f"{there.path}/"): MEMORY.cat_file(name) for name in there.fs.find(there.path)} == files
    remove_tree(there)
    assert not there.exists()
    remove_tree(there)


def test_staged_files_reach_the_store_only_when_all_went_well(bucket, cache):
    with pytest.raises(ZeroDivisionError), staging(bucket / "run") as out:
        (out / "shard").write_text("half")
        1 / 0
    assert not (bucket / "run").exists()
    with staging(bucket / "run") as out:
        assert (out / "shard").read_text() == "half", "what an earlier attempt made is found again"
        (out / "shard").write_text("whole")
    assert (bucket / "run" / "shard").read_text() == "whole"
    assert not any(p.is_file() for p in cache.rglob("*"))


def test_local_folders_are_staged_where_they_are(tmp_path):
    with staging(tmp_path) as out:
        assert out is tmp_path


def test_a_store_that_cannot_be_written_to_is_refused(bucket, monkeypatch):
    config = load_config(Path(__file__).parents[2] / "configs" / "tiny.py", [("train.compute_dtype", "float32")])
    check_workdir(bucket, config)
    assert MEMORY.find(bucket.path) == []

    def refused(self, path, value, **options):
        raise RuntimeError("403: no rights\nto write here")

    monkeypatch.setattr(MEMORY.__class__, "pipe_file", refused)
    with pytest.raises(UserError, match=r"--workdir=memory://.* cannot be written to \(403: no rights to write here\)"):
        check_workdir(bucket, config)


def test_the_cache_lies_where_the_variable_says(monkeypatch):
    monkeypatch.delenv(storage.CACHE_VARIABLE)
    assert storage.cache_folder() == Path(os.path.expanduser("~/.cache/plasticity_jax"))
