"""A study's numbers as rows: for the terminal, for CSV files, for the page. A missing number is None, and an empty cell in CSV."""

import csv
import io
from dataclasses import replace

from plasticity_jax.report.results import StudyResults, collect
from plasticity_jax.runs.storage import AnyPath
from plasticity_jax.stages import Column, Table, guarded, stages
from plasticity_jax.stages.stage import Rows
from plasticity_jax.study.sweep import swept_values


def tables() -> dict[str, Table]:
    """Name → table, of all stages in their order."""
    return {
        name: replace(table, rows=guarded(stage, f"table {name!r}", table.rows, []))
        for stage in stages().values()
        for name, table in stage.tables.items()
    }


def columns() -> dict[str, Column]:
    """Name → column of the summary, of all stages in their order."""
    return {
        name: replace(column, value=guarded(stage, f"column {name!r}", column.value, None))
        for stage in stages().values()
        for name, column in stage.columns.items()
    }


def summary_table(study_dir: AnyPath) -> Rows:
    """One row per member for the terminal.

    Returns:
      Rows with `member`, `weight_decay`, the dotted name of every further swept field, `timescale` (fraction of the run), `held_out_loss` (nats per
      token), per task `<task> before`, `<task> after` and `<task> gain` (greedy accuracy), the columns of the stages, such as `W_QK pseudo-rank` (mean
      over heads) and `gap` (nats per token), and `state`.
    """
    return summary_rows(collect(study_dir))


def summary_rows(results: StudyResults) -> Rows:
    """`summary_table` of results already read."""
    rows = []
    for m in results.members:
        row = {"member": m.name, **swept_values(m.member), "timescale": m.member.timescale, "held_out_loss": m.loss}
        for task in results.tasks:
            before, after = (float(s[task].greedy.mean()) if task in s else None for s in (m.before, m.after))
            gain = None if before is None or after is None else after - before
            row |= {f"{task} before": before, f"{task} after": after, f"{task} gain": gain}
        rows.append(row | {name: column.value(m) for name, column in columns().items()} | {"state": m.state})
    return rows


def to_csv(rows: Rows) -> str:
    """Rows as CSV with a header of every key in order of appearance; numbers in full precision."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
