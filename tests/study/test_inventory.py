"""What `plasticity data` lists: every file that a config names, there or missing with its command."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from running import TINY, plasticity

from plasticity_jax.config import DataConfig, RewardConfig, StudyConfig, TaskConfig, load_config
from plasticity_jax.data.tasks import get_task
from plasticity_jax.study.inventory import needed, needed_lines

ROOT = Path(__file__).resolve().parents[2]
PAPER = sorted(path for path in (ROOT / "configs").glob("*.py") if path.name.startswith(("llama", "olmo2")))


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_every_place_of_a_paper_config_is_listed_with_a_command(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(path, [("train.compute_dtype", "float32")])
    found = needed(config)
    places = {config.data.files, *(place for task in config.tasks.values() for place in task.files.values()), *config.zero_shot.files.values()}
    assert places <= {one.place for one in found if not one.there}
    assert all(one.command for one in found if not one.there)
    for one in found:  # a download lands where the config looks
        if one.command.startswith("hf download"):
            words = shlex.split(one.command)
            assert one.place.startswith(words[words.index("--local-dir") + 1])


def test_what_is_there_is_counted_and_what_is_wrong_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.arange(500, dtype=np.uint16).tofile("part.npy")
    Path("train.jsonl").write_text('{"question": "a", "attempt": "b"}\n')
    Path("reward").mkdir()
    Path("reward/config.json").write_text("{}")
    files = {"train": "train.jsonl", "gsm8k-platinum": "nowhere", "math": "nowhere"}
    config = StudyConfig(
        data=DataConfig(token_files="part.npy, other.npy", token_dtype="uint16", tokenizer="own/tokenizer.json"),
        tasks={"SimpleScaling": TaskConfig(files=files)},
        reward=RewardConfig(scorer="sequence-classification", model="reward"),
    )
    found = {one.what: one for one in needed(config)}
    assert not found["data.token_files"].there and "other.npy names no file" in found["data.token_files"].found
    assert (found["SimpleScaling train"].there, found["SimpleScaling train"].found) == (True, "1 file, 0.000 GB")
    assert not found["SimpleScaling math"].there and found["SimpleScaling math"].command == get_task("SimpleScaling").sets["math"].command("nowhere")
    assert found["reward.model"].there and not found["data.tokenizer"].there
    lines = needed_lines(found.values())
    assert lines[-1].startswith(f"{sum(one.there for one in found.values())} of {len(found)} there, ")
    assert any(line.startswith("MISSING  SimpleScaling math: nowhere") for line in lines)


def test_the_command_prints_json_and_says_by_its_status_whether_all_is_there(tmp_path):
    changed = ("--config.data.files=nowhere", "--config.data.sources=()", "--config.data.max_documents=None")
    done = plasticity("data", "--config", TINY, *changed, "--json")
    (corpus,) = [one for one in json.loads(done.stdout)["needed"] if one["what"] == "data.files"]
    assert done.returncode == 2 and corpus == {
        "what": "data.files",
        "place": "nowhere",
        "there": False,
        "found": "nothing there to read",
        "command": "",
    }
    assert "its publisher is not known here" in plasticity("data", "--config", TINY, *changed).stdout
