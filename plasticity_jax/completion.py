"""Shell completion: scripts for bash, zsh and fish, made from the parser."""

import argparse
import shlex

SHELLS = ("bash", "zsh", "fish")


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script that completes a parser's commands and options, and files where a value is asked for.

    Args:
      shell: one of SHELLS.
    """
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](parser.prog, _commands(parser))


_Options = list[tuple[tuple[str, ...], str, bool, tuple[str, ...]]]  # (names, what it is, whether it takes a value, its choices)


def _commands(parser: argparse.ArgumentParser) -> dict[str, tuple[str, _Options]]:
    """Command → (what it does, its options; of an argument without a dash, only the choices)."""
    (subparsers,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    about = {action.dest: action.help or "" for action in subparsers._choices_actions}
    return {name: (about[name], [_option(action) for action in sub._actions]) for name, sub in subparsers.choices.items()}


def _option(action: argparse.Action) -> tuple[tuple[str, ...], str, bool, tuple[str, ...]]:
    return tuple(action.option_strings), action.help or "", action.nargs != 0, tuple(map(str, action.choices or ()))


def _bash(program: str, commands: dict[str, tuple[str, _Options]]) -> str:
    cases = []
    for name, (_, options) in commands.items():
        words = [word for names, _, _, choices in options for word in (names or choices)]
        cases.append(f'    {name}) words="{" ".join(words)}" ;;')
        for names, _, _, choices in options:
            if names and choices:
                cases[-1] = cases[-1].replace(
                    " ;;", f'\n      [[ $previous == {names[-1]} ]] && words="{" ".join(shlex.quote(c) for c in choices)}" ;;'
                )
    return f"""\
# bash completion of {program}
_{program}() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" words
  case "${{COMP_WORDS[1]}}" in
{chr(10).join(cases)}
  esac
  if ((COMP_CWORD == 1)); then words="{" ".join(commands)} --help --version"; fi
  mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
}}
complete -o default -F _{program} {program}
"""


def _zsh(program: str, commands: dict[str, tuple[str, _Options]]) -> str:
    def spec(names: tuple[str, ...], about: str, value: bool, choices: tuple[str, ...]) -> str:
        about = about.translate(str.maketrans({"[": "(", "]": ")", ":": ";"}))
        offered = (
            f":{about[:20] or 'value'}:({' '.join(c.replace(' ', chr(92) + ' ') for c in choices)})" if choices else ":value:_files" if value else ""
        )
        return " ".join(shlex.quote(f"{name}[{about}]{offered}") for name in names) if names else shlex.quote(f"*{offered or ':value:_files'}")

    cases = [f"    {name}) _arguments {' '.join(spec(*option) for option in options)} ;;" for name, (_, options) in commands.items()]
    listed = "\n".join(f"    {shlex.quote(f'{name}:{about}')}" for name, (about, _) in commands.items())
    return f"""\
#compdef {program}
_{program}() {{
  local -a commands=(
{listed}
  )
  if ((CURRENT == 2)); then _describe command commands; return; fi
  local command="${{words[2]}}"
  shift words
  ((CURRENT--))
  case "$command" in
{chr(10).join(cases)}
  esac
}}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then _{program} "$@"; else compdef _{program} {program}; fi
"""


def _fish(program: str, commands: dict[str, tuple[str, _Options]]) -> str:
    lines = [f"# fish completion of {program}", f"complete -c {program} -n __fish_use_subcommand -f"]
    for name, (about, options) in commands.items():
        lines.append(f"complete -c {program} -n __fish_use_subcommand -a {name} -d {_fish_quoted(about)}")
        where = f"complete -c {program} -n '__fish_seen_subcommand_from {name}'"
        for names, meaning, value, choices in options:
            flags = "".join(f" -l {one[2:]}" if one.startswith("--") else f" -s {one[1:]}" for one in names)
            offered = f" -xa {_fish_quoted(' '.join(shlex.quote(c) for c in choices))}" if choices else " -r" if names and value else ""
            if flags or choices:
                lines.append(f"{where}{flags}{offered.replace(' -xa', ' -a') if not names else offered} -d {_fish_quoted(meaning)}")
    return "\n".join(lines) + "\n"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
