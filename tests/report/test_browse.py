"""Reading completions of a planted study, and what a terminal gets to see of them."""

import json
import shutil
from pathlib import Path

import pytest
from synthetic_study import PROBLEMS, Planted, write_study

from plasticity_jax import cli
from plasticity_jax.errors import UserError
from plasticity_jax.report.browse import Filter, browse, text_of
from plasticity_jax.runs.directory import CHANGING, RunDirectory
from plasticity_jax.runs.integrity import checksums

PLANTED = Planted(scorer="log-probability")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("work")
    write_study(workdir, PLANTED)
    return workdir


def shares(rows):
    return sum(row["verdict"] == "right" for row in rows) / len(rows)


def test_a_filter_gives_the_completions_it_names_and_no_others(workdir):
    every = list(browse(workdir, Filter()))
    assert len(every) == 2 * 4 * sum(PROBLEMS.values()) and {row["sample"] for row in every} == {0}
    members = sorted({row["member"]: row["weight_decay"] for row in every}.items(), key=lambda pair: pair[1])
    for i, (member, decay) in enumerate(members):
        found = list(browse(workdir, Filter(member=member, task="topic", when="after")))
        assert len(found) == PROBLEMS["topic"] and shares(found) == pytest.approx(PLANTED.after[i], abs=0.01)
        assert found == list(browse(workdir, Filter(weight_decay=float(f"{decay:.4g}"), task="topic", when="after")))
    wrong = list(browse(workdir, Filter(task="topic", when="after", verdict="no answer")))
    assert wrong and all(row["answer"] is None and row["verdict"] == "no answer" for row in wrong)
    one = list(browse(workdir, Filter(problem="topic-7", samples=True, member=members[0][0], when="after")))
    assert [row["sample"] for row in one] == list(range(9)) and one[3]["prompt"].startswith("Human: Which <b>word</b>")
    assert one[0]["reward"] is None and one[1]["reward"] == pytest.approx(-1 + 2 * 7 / (PROBLEMS["topic"] - 1))


@pytest.mark.parametrize(
    "wanted, message",
    [
        (Filter(member="wd9"), "--member=wd9 has no completions here; there are wd0, "),
        (Filter(task="topc"), "--task=topc"),
        (Filter(weight_decay=7.0), "--weight-decay=7"),
    ],
)
def test_what_the_study_does_not_have_is_refused_with_what_it_has(workdir, wanted, message):
    with pytest.raises(UserError, match=message):
        list(browse(workdir, wanted))


@pytest.mark.parametrize("stage, name", [("evaluate", "completions.jsonl"), ("reward", "rewards.jsonl")])
def test_a_run_that_was_altered_is_not_shown(workdir, tmp_path, stage, name):
    copied = Path(shutil.copytree(workdir, tmp_path / "work"))
    folder = next(path for path in sorted(copied.glob(f"*/{stage}/*")) if (path / name).is_file())
    lines = (folder / name).read_text().splitlines(keepends=True)
    (folder / name).write_text("".join(lines[: len(lines) // 2]))
    directory = RunDirectory(folder)
    (folder / "DONE").write_text(json.dumps({"diverged": "", "files": checksums(folder, without=CHANGING)}))
    assert directory.damage() is None and list(browse(copied, Filter(samples=True)))
    (folder / name).write_text("".join(lines))
    with pytest.raises(UserError, match=f"{folder.name}: {name} has .* run again"):
        list(browse(copied, Filter(samples=True)))


def test_the_command_shows_as_many_as_asked_for(workdir, capsys):
    assert cli.main(["show", "--workdir", str(workdir), "--task", "topic", "--verdict", "right", "--limit", "3", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 3 and {row["verdict"] for row in rows} == {"right"}
    assert cli.main(["show", "--workdir", str(workdir), "--limit", "2"]) == 0
    assert capsys.readouterr().out.count("── wd0 (λ 0)") == 2


def test_a_terminal_never_gets_a_models_control_characters():
    row = {
        "member": "wd0",
        "weight_decay": 0.0,
        "task": "t",
        "when": "after",
        "id": "1",
        "sample": 2,
        "prompt": "p",
        "gold": "g",
        "text": "a\x1b[2Jb\u202ec",
        "answer": "\x07",
        "verdict": "wrong",
        "reward": 0.25,
    }
    shown = text_of(row)
    assert "\x1b" not in shown and "\u202e" not in shown and "\x07" not in shown and "sample 2" in shown and "reward 0.250" in shown
