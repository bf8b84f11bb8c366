"""A study's numbers as rows: for the terminal, for CSV and LaTeX files, for the page. A missing number is None, and an empty cell in CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from plasticity_jax.report import across
from plasticity_jax.report.results import MemberResults, StudyResults
from plasticity_jax.stages import Column, Table, guarded, stages
from plasticity_jax.stages.stage import Rows
from plasticity_jax.study.sweep import swept_values


def tables() -> dict[str, Table]:
    """Name → table, of all stages in their order, then those that rest on several."""
    of_stages = {
        name: replace(table, rows=guarded(stage, f"table {name!r}", table.rows, []))
        for stage in stages().values()
        for name, table in stage.tables.items()
    }
    return of_stages | across.TABLES | {"other_models": OTHERS}


def columns() -> dict[str, Column]:
    """Name → column of the summary, of all stages in their order."""
    return {
        name: replace(column, value=guarded(stage, f"column {name!r}", column.value, None))
        for stage in stages().values()
        for name, column in stage.columns.items()
    }


def summary_rows(results: StudyResults) -> Rows:
    """One row per member for the terminal.

    Returns:
      Rows with `member`, `weight_decay`, the dotted name of every further swept field, `timescale` (fraction of the run), `held_out_loss` (nats per
      token), per task `<task> before`, `<task> after` and `<task> gain` (greedy accuracy), the columns of the stages, such as `W_QK pseudo-rank` (mean
      over heads) and `gap` (nats per token), and `state`.
    """
    return [
        {"member": m.name, **swept_values(m.member), "timescale": m.member.timescale, "held_out_loss": m.loss}
        | _scores(m, results.tasks)
        | {name: column.value(m) for name, column in columns().items()}
        | {"state": m.state}
        for m in results.members
    ]


def other_rows(results: StudyResults) -> Rows:
    """One row per model of `results.others`: score before and after fine-tuning on every task that one of them was asked for, columns of the stages."""
    tasks = list(dict.fromkeys(task for m in results.others for scores in (m.before, m.after) for task in scores))
    found = {m.name: {name: column.value(m) for name, column in columns().items()} for m in results.others}
    known = [name for name in columns() if any(values[name] is not None for values in found.values())]
    rows = [{"model": m.name} | _scores(m, tasks) | {name: found[m.name][name] for name in known} for m in results.others]
    return [row for row in rows if any(value is not None for name, value in row.items() if name != "model")]


def _scores(m: MemberResults, tasks: Sequence[str]) -> dict[str, float | None]:
    row = {}
    for task in tasks:
        before, after = (float(s[task].greedy.mean()) if task in s else None for s in (m.before, m.after))
        gain = None if before is None or after is None else after - before
        row |= {f"{task} before": before, f"{task} after": after, f"{task} gain": gain}
    return row


def aligned(lines: list[list[str]]) -> str:
    """Lines of cells as text for the terminal, its columns aligned."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def to_csv(rows: Rows) -> str:
    """Rows as CSV with a header of every key in order of appearance; numbers in full precision."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


OTHERS = Table(
    other_rows,
    title="What else was run in this folder",
    caption="Models and runs that commands were asked for by themselves (finetune --base, evaluate --model, analyze --model), which are no members of the "
    "grid: greedy accuracy before and after fine-tuning. They are in no figure and no claim.",
    optional=True,
)

TEX_ROWS = 40  # of a table on one page; longer ones break over pages
_TEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}"},
    **{"|": r"\textbar{}", '"': r"\textquotedbl{}", "'": r"\textquotesingle{}", "`": r"\textasciigrave{}", "-": "{-}", "\u2212": "$-$"},
    **{"λ": r"$\lambda$", "δ": r"$\delta$", "→": r"$\to$", "·": r"$\cdot$", "×": r"$\times$", "±": r"$\pm$", "≤": r"$\leq$", "≥": r"$\geq$"},
    **{"–": "--", "’": "'", "‘": "`", "“": "``", "”": "''", "∞": r"$\infty$", "ᵀ": r"$^\top$", "‖": r"$\|$"},
}


def tex_escaped(text: str) -> str:
    """Text as LaTeX prints it; line breaks and runs of spaces become one space."""
    return "".join(_TEX.get(c, c) for c in " ".join(text.split()))


def to_tex(rows: Rows) -> str:
    """Rows as a LaTeX table with booktabs' rules (packages booktabs and textcomp; longtable beyond 40 rows); numbers in four digits, aligned to the right."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    if not names:
        return "% no rows\n"
    numeric = [all(_is_number(row.get(name)) or row.get(name) is None for row in rows) for name in names]
    kind = "longtable" if len(rows) > TEX_ROWS else "tabular"
    head = " & ".join(map(tex_escaped, names)) + r" \\"
    lines = [rf"\begin{{{kind}}}{{{''.join('r' if one else 'l' for one in numeric)}}}", r"\toprule", head, r"\midrule"]
    lines += [r"\endhead", r"\bottomrule", r"\endfoot"] if kind == "longtable" else []
    lines += [" & ".join(_tex_cell(row.get(name)) for name in names) + r" \\" for row in rows]
    lines += [] if kind == "longtable" else [r"\bottomrule"]
    return "\n".join([*lines, rf"\end{{{kind}}}", ""])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _tex_cell(value: Any) -> str:
    if value is None:
        return "--"
    if not _is_number(value):
        return tex_escaped(", ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value))
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    digits, _, power = text.partition("e")
    power = rf" \times 10^{{{int(power)}}}" if power else ""
    return f"${digits}{power}$" if power or digits.startswith("-") else tex_escaped(digits)
