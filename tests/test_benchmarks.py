"""A benchmark leaves out the sides whose environment is not there, each with the command that makes it, and runs the others."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PEERS = {  # script → environments of its sides beside the test environment
    "generation": {"extra", "vllm", "newest"},
    "grid": {"extra", "newest"},
    "train_step": {"extra", "newest"},
    "probes": {"newest"},
    "at_scale": {"extra", "cuda", "maxtext"},
    "ended_rows": set(),
}


class Worker:
    """In place of the process of a side: every round takes a second."""

    def __init__(self, *_):
        pass

    def reply(self):
        return {"ready": True}

    def round(self):
        return {"seconds": 1.0, "numbers": {"programs": 1}}

    def versions(self):
        return "Python"

    def close(self):
        pass


@pytest.mark.parametrize("script", PEERS)
def test_a_peer_without_its_environment_leaves_its_row_out(script, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / f"{script}.py")])
    side_by_side, benchmark = importlib.import_module("side_by_side"), importlib.import_module(script)
    there = {"test": (Path(sys.executable), "json", "")}
    absent = {name: (tmp_path / "bin/python", *rest) for name, (_, *rest) in side_by_side.ENVIRONMENTS.items() if name != "test"}
    monkeypatch.setattr(side_by_side, "ENVIRONMENTS", absent | there)
    monkeypatch.setattr(side_by_side, "_Worker", Worker)
    for module in (side_by_side, benchmark):
        monkeypatch.setattr(module, "ROOT", tmp_path, raising=False)
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results", raising=False)

    benchmark.main()
    [path] = (tmp_path / "results").glob(f"{script}*.json")
    tables = json.loads(path.read_text(encoding="utf-8"))["tables"]
    rows = [row for table in tables.values() for row in table]
    commands = {name: side_by_side.ENVIRONMENTS[name][2] for name in PEERS[script]}
    missing = [row["missing"] for row in rows if "missing" in row]
    assert set(missing) == {f"its environment is not there: run `{command}`" for command in commands.values()}
    told = [line for line in capsys.readouterr().err.splitlines() if "its environment is not there" in line]
    assert len(told) == len(missing), "one line for each row that is left out"
    assert all("seconds" in row for row in rows if "missing" not in row) and len(rows) > len(missing) or script == "at_scale"


def test_every_benchmark_with_peers_is_tried():
    """`PEERS` names all scripts that compare with another environment."""
    for path in BENCHMARKS.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.stem not in ("side_by_side", *PEERS):
            assert not any(f'"{name}"' in text for name in ("extra", "newest", "cuda", "maxtext")), path
