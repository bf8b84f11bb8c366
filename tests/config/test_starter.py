"""What `plasticity init` writes is a config as it is, and what comes with the package is found by name."""

from itertools import chain, combinations
from pathlib import Path

import pytest

from plasticity_jax.config import load_config
from plasticity_jax.config.starter import SHOWS, write_starter
from plasticity_jax.errors import UserError

EVERY = [*chain.from_iterable(combinations(SHOWS, n) for n in range(len(SHOWS) + 1))]


@pytest.mark.parametrize("shows", EVERY, ids="+".join)
def test_the_file_is_a_config_as_it_is(tmp_path, monkeypatch, shows):
    monkeypatch.chdir(tmp_path)
    assert write_starter("my_study.py", shows) == [SHOWS[name] for name in shows]
    config = load_config("my_study.py")
    assert (config.name, config.data.files is not None) == ("my_study", "text" in shows)
    assert any(task.own for task in config.tasks.values()) == ("task" in shows)
    assert bool(config.grid.models) == ("checkpoints" in shows)


def test_a_corpus_beside_the_config_is_found_from_elsewhere(tmp_path, monkeypatch):
    write_starter(str(tmp_path / "my_study.py"), ("text",))
    (tmp_path / "texts").mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load_config(tmp_path / "my_study.py").data.files == str(tmp_path / "texts")


@pytest.mark.parametrize("name", ["my_study", "my study.py", "-.py", "study.json"])
def test_a_name_that_is_none_of_a_config_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is not a name for a config"):
        write_starter(name)


def test_nothing_is_replaced(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("mine")
    with pytest.raises(UserError, match="exists, and is not replaced"):
        write_starter(str(file))
    assert file.read_text() == "mine"


def test_a_config_of_the_package_is_found_by_its_name(tmp_path, monkeypatch):
    given = Path(__file__).parents[2] / "configs" / "tiny.py"
    monkeypatch.chdir(tmp_path)
    assert load_config("tiny") == load_config(given)
    with pytest.raises(UserError, match="did you mean tiny?"):
        load_config("tinny")
