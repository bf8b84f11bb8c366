"""From records alone come the numbers and figures of the page; what is no record, or was changed, is refused in one line."""

import contextlib
import gzip
import io
import json
import tarfile

import pytest
from synthetic_study import Planted, write_study

from plasticity_jax.config import StudyConfig
from plasticity_jax.errors import UserError
from plasticity_jax.report.drawing import render
from plasticity_jax.report.page import Part, collect, draw_figure, numbers_of, render_page, table_rows
from plasticity_jax.runs.directory import ASKED, RESULTS, STUDY, RunDirectory
from plasticity_jax.runs.jsonfiles import read_json, write_json
from plasticity_jax.runs.run import Run
from plasticity_jax.study.records import save_records, unpack_records
from plasticity_jax.study.status import study_status

PLANTED = Planted(loss=(3.3, 3.1, 3.2), seeds=(0, 1))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("work"), PLANTED)


@pytest.fixture
def records(study, tmp_path):
    save_records(study, tmp_path / "records")
    return tmp_path / "records"


def test_the_report_of_records_has_the_numbers_and_figures_of_the_study(study, records, tmp_path):
    (unpacked,) = unpack_records(records, tmp_path / "unpacked")
    before, after = ((results, [Part.of(results)]) for results in (collect(study), collect(unpacked)))
    numbers = numbers_of(*before)
    assert len(numbers) > 10 and numbers == numbers_of(*after)
    for name in ("scores", "loss_curves"):
        assert render(draw_figure(before[0], name), "svg") == render(draw_figure(after[0], name), "svg")
    assert "completions.jsonl" in render_page(*before, numbers) and "completions.jsonl" not in render_page(*after, numbers)  # no link leads nowhere


def test_an_archive_per_seed_is_the_same_whenever_it_is_made(study, records, tmp_path):
    assert {path.name for path in records.iterdir()} == {"shared.tar.gz", "seed-0.tar.gz", "seed-1.tar.gz"}
    save_records(study, tmp_path / "again")
    assert all(path.read_bytes() == (tmp_path / "again" / path.name).read_bytes() for path in records.iterdir())
    with tarfile.open(records / "seed-1.tar.gz") as archive:
        kinds = {name.rpartition("/")[2] for name in archive.getnames()}
        assert "results.json" in kinds and "metrics.jsonl" in kinds and "completions.jsonl" not in kinds
        assert all("-s1" in name for name in archive.getnames())


def test_records_grow_seed_by_seed(tmp_path):
    """The archive of a seed that is done stays as it is while the others finish, and a workdir takes what is new."""
    folder = write_study(tmp_path / "work", PLANTED, stages=("prepare", "init", "pretrain"))
    save_records(folder, tmp_path / "records")
    first = (tmp_path / "records" / "shared.tar.gz").read_bytes()
    unpack_records(tmp_path / "records", tmp_path / "unpacked")
    write_study(tmp_path / "work", PLANTED, stages=("finetune", "evaluate", "probe", "spectra", "gap"))
    save_records(folder, tmp_path / "records")
    assert (tmp_path / "records" / "shared.tar.gz").read_bytes() == first
    (unpacked,) = unpack_records(tmp_path / "records", tmp_path / "unpacked")
    assert table_rows(collect(unpacked), "summary") == table_rows(collect(folder), "summary")


def test_several_studies_are_unpacked_at_once(tmp_path):
    for name in ("one", "two"):
        folder = write_study(tmp_path / "work", Planted(loss=(3.3,), name=name), stages=("prepare", "init", "pretrain"))
        save_records(folder, tmp_path / "records" / name)
    assert [path.name for path in unpack_records(tmp_path / "records", tmp_path / "unpacked")] == ["one", "two"]


def test_what_a_command_was_asked_for_by_itself_comes_along(tmp_path):
    folder = write_study(tmp_path / "work", Planted(loss=(3.3,)), stages=("prepare", "init", "pretrain"))
    alone = Run("planted", "import", "elsewhere", {"files": {}}, {})
    directory = RunDirectory(folder / alone.id)
    with directory.work(alone, StudyConfig(name="planted")):
        write_json(directory.path / ASKED, {"flag": "--model", "model": "elsewhere"})
        directory.finish({"parameters": 1})
    save_records(folder, tmp_path / "records")
    (unpacked,) = unpack_records(tmp_path / "records", tmp_path / "unpacked")
    assert alone.id in {row["id"] for row in study_status(unpacked.parent) if row["state"] == "done"}


def test_a_result_changed_after_unpacking_is_found(records, tmp_path):
    (unpacked,) = unpack_records(records, tmp_path / "unpacked")
    assert {row["state"] for row in study_status(unpacked.parent, verify=True)} == {"done"}
    run = next(unpacked.glob(f"pretrain/*/{RESULTS}"))
    run.write_text(run.read_text().replace("3.3", "3.2"))
    assert {row["state"] for row in study_status(unpacked.parent, verify=True)} == {"done", "damaged"}


def test_a_changed_result_does_not_become_a_record(tmp_path):
    folder = write_study(tmp_path / "work", PLANTED)
    run = next(folder.glob(f"evaluate/*/{RESULTS}"))
    run.write_text(run.read_text() + " ")
    with pytest.raises(UserError, match="results.json has .* instead of"):
        save_records(folder, tmp_path / "records")
    assert not (tmp_path / "records").exists()


def _with(path, name, content=b"{}", **attributes):
    """The archive with one more member."""
    with tarfile.open(path) as archive:
        members = [(about, archive.extractfile(about).read()) for about in archive]
    about = tarfile.TarInfo(name)
    about.size = len(content)
    for key, value in attributes.items():
        setattr(about, key, value)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for one, held in [*members, (about, content)]:
            archive.addfile(one, io.BytesIO(held))
    path.write_bytes(gzip.compress(packed.getvalue()))


@pytest.mark.parametrize(
    "name, attributes",
    [
        ("../../escaped", {}),
        ("/etc/escaped", {}),
        ("../x/results.json", {}),
        ("pretrain/../results.json", {}),
        ("pretrain/.hidden/results.json", {}),
        ("pretrain/wd0-12345678/code.py", {}),
        ("pretrain/wd0-12345678/results.json", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
    ],
)
def test_an_archive_with_anything_else_is_refused_and_nothing_is_written(records, tmp_path, name, attributes):
    _with(records / "seed-0.tar.gz", name, **attributes)
    with pytest.raises(UserError, match="no file of a run's record"):
        unpack_records(records, tmp_path / "unpacked")
    assert not (tmp_path / "unpacked").exists() and not (tmp_path / "escaped").exists()


@pytest.mark.parametrize("study_name", ["..", "a/b", ".hidden", ""])
def test_a_study_cannot_name_a_folder_elsewhere(records, tmp_path, study_name):
    with tarfile.open(records / "shared.tar.gz") as archive:
        text = archive.extractfile(STUDY).read().decode()
    _with(records / "shared.tar.gz", STUDY, text.replace('"study": "planted"', f'"study": "{study_name}"', 1).encode())
    with pytest.raises(UserError, match="no name of a folder"):
        unpack_records(records, tmp_path / "unpacked")
    assert not (tmp_path / "unpacked").exists()


def test_damage_and_what_is_no_record_are_named(records, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no shared.tar.gz"):
        unpack_records(tmp_path / "empty", tmp_path / "unpacked")
    whole = (records / "seed-1.tar.gz").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no archive"):
        (records / "seed-1.tar.gz").write_bytes(damaged)
        with pytest.raises(UserError, match="seed-1.tar.gz is damaged"):
            unpack_records(records, tmp_path / "unpacked")
    assert not (tmp_path / "unpacked").exists()


def test_another_study_of_the_name_is_not_mixed_in(study, records, tmp_path):
    write_study(tmp_path / "work", Planted(loss=(3.0,)))
    with pytest.raises(UserError, match="holds another study than"):
        unpack_records(records, tmp_path / "work")


@pytest.mark.parametrize("config", ["7", "[]", '{"grid": 3}', '{"grid": {"seeds": {}}}'])
def test_a_study_of_a_damaged_config_is_one_line(tmp_path, config):
    folder = write_study(tmp_path / "work", Planted(loss=(3.3,)), stages=("prepare", "init", "pretrain"))
    tree = read_json(folder / STUDY)
    write_json(folder / STUDY, tree | {"config": json.loads(config)})
    for read in (lambda: save_records(folder, tmp_path / "records"), lambda: study_status(folder.parent)):
        with contextlib.suppress(UserError):  # any other error is a traceback
            read()
