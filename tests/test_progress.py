"""What a command says, and what it keeps of it."""

import logging

import pytest

from plasticity_jax.cli import COMMANDS, main, parser
from plasticity_jax.completion import SHELLS, script
from plasticity_jax.progress import LOGS, log, logged
from plasticity_jax.terminal import colored


def test_the_log_file_begins_with_the_command_and_holds_what_is_logged(tmp_path):
    with logged(tmp_path, "study", ["study", "--config", "a b"]):
        log.warning("said")
    (file,) = (tmp_path / LOGS).iterdir()
    first, _, said = file.read_text().splitlines()
    assert first == "plasticity study --config 'a b'" and said.endswith("WARNING said") and file.name.startswith("study-")
    log.warning("later")
    assert "later" not in file.read_text() and len(logging.getLogger().handlers) == len({*logging.getLogger().handlers})


def test_a_refusal_is_kept_where_there_is_a_workdir_and_makes_none(tmp_path, capsys):
    assert main(["report", "--workdir", str(tmp_path / "none")]) == 2 and not (tmp_path / "none").exists()
    assert main(["report", "--workdir", str(tmp_path)]) == 2
    (file,) = (tmp_path / LOGS).iterdir()
    assert file.read_text().splitlines()[-1] == capsys.readouterr().err.splitlines()[-1]


def test_a_log_that_cannot_be_written_fails_nothing(tmp_path):
    (tmp_path / LOGS).write_text("a file in its place")
    with logged(tmp_path, "study", ["study"]):
        log.warning("said")


def test_every_argument_has_a_text_and_every_command_examples_that_it_takes():
    (commands,) = [action for action in parser()._actions if action.choices]
    for name, sub in commands.choices.items():
        assert all(action.help for action in sub._actions), name
        assert COMMANDS[name].examples and "examples:" in sub.format_help()
        assert {"-q", "-v"} <= {flag for action in sub._actions for flag in action.option_strings}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_completion_names_every_command_and_every_option(shell):
    text = script(shell, parser())
    (commands,) = [action for action in parser()._actions if action.choices]
    for name, sub in commands.choices.items():
        assert name in text
        for flag in (flag for action in sub._actions for flag in action.option_strings if flag.startswith("--")):
            assert (f"-l {flag[2:]} " if shell == "fish" else flag) in text


class _Stream:
    def __init__(self, terminal: bool):
        self.isatty = lambda: terminal


def test_colors_are_for_terminals_and_honor_no_color(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert colored("a", "red", _Stream(True)) == "\x1b[31ma\x1b[0m" and colored("a", "red", _Stream(False)) == "a"
    monkeypatch.setenv("NO_COLOR", "1")
    assert colored("a", "red", _Stream(True)) == "a"
