"""docs/tutorial.md, carried out word for word; the runs are shorter."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from running import plasticity

DOC = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text(encoding="utf-8")
SMALL = ("--config.train.steps=6", "--config.tasks.shop.epochs=1", "--config.evaluate.n_samples=1", "--config.report.bootstrap_samples=50")

pytestmark = pytest.mark.slow


def test_the_tutorial_ends_with_a_page_and_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, code in re.findall(r"^```python title=(\S+)\n(.*?)^```$", DOC, re.MULTILINE | re.DOTALL):
        Path(name).write_text(code, encoding="utf-8")
    commands = [shlex.split(line) for block in re.findall(r"^```sh\n(.*?)^```$", DOC, re.MULTILINE | re.DOTALL) for line in block.splitlines()]
    said = {}
    for program, *words in commands:
        if program == "python":
            subprocess.run([sys.executable, *words], check=True)
            continue
        ended = plasticity(*words, *(SMALL if words[0] == "study" else ()))
        assert ended.returncode == 0, ended.stderr
        said.setdefault(words[0], []).append(ended.stdout)
    [data], [status], [shown] = said["data"], said["status"], said["show"]
    assert "2 of 2 there" in data and "Which shop?" in data
    assert re.search(r"^  pretrain +2 +0 ", said["study"][0], re.MULTILINE), "step 3 prints what will be run"
    assert "report: " in said["study"][1] and "missing" not in status and "failed" not in status
    assert "Which shop?" in shown
    page = Path("work", "shops", "report", "index.html").read_text(encoding="utf-8")
    assert "one pretraining run: no verdict" in page
    with open(Path("work", "shops", "report", "tables", "gains.csv"), encoding="utf-8") as file:
        assert {row["task"] for row in csv.DictReader(file)} >= {"shop"}
