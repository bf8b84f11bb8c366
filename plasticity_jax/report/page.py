"""The page of a study: one self-contained index.html, figures as PNG and SVG, numbers as CSV. Works on partial studies too."""

import difflib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from plasticity_jax.config import ReportConfig, name_text, to_dict
from plasticity_jax.errors import UserError
from plasticity_jax.evaluate.metrics import macro_average, metric_of, ordered_metrics
from plasticity_jax.progress import Progress
from plasticity_jax.report.browse import completions
from plasticity_jax.report.comparisons import metric_interval
from plasticity_jax.report.drawing import marked_values, render
from plasticity_jax.report.effects import pairwise_rows
from plasticity_jax.report.figures import draw_figure, figures
from plasticity_jax.report.frame import digits, inline_svg, render_template, replace_file, shown_table
from plasticity_jax.report.results import MemberResults, Score, StudyResults, collect
from plasticity_jax.report.sentences import answer, prepared_name, slice_answer, warnings
from plasticity_jax.report.tables import aligned, columns, summary_rows, tables, to_csv, to_tex
from plasticity_jax.report.verdicts import Verdict, verdicts
from plasticity_jax.runs.directory import COMPLETIONS
from plasticity_jax.runs.jsonfiles import to_json
from plasticity_jax.runs.storage import AnyPath, relative
from plasticity_jax.stages import Figure as Declared
from plasticity_jax.stages.evaluate import correlation_rows, macro_rows
from plasticity_jax.stages.stage import Rows
from plasticity_jax.stages.zero_shot import forgetting_rows
from plasticity_jax.study.sweep import DECAY

__all__ = ["collect", "draw_figure", "format_summary", "write_report"]

SECTIONS = ("pretraining", "finetuning", "inside")
SPOKEN = 60  # markers at most that the text alternative of a figure reads out; one with more says its numbers by itself, or in its tables
FAILURES = ("wrong", "no answer", "timed out")  # of greedy completions
SAMPLES = 2  # problems shown per task
SAMPLE_CHARACTERS = 280  # of a prompt or completion


@dataclass(frozen=True)
class Part:
    """A slice of a study on the page; most studies are one.

    Attributes:
      prefix: of the ids and file names that belong to it, such as "peak_lr0.0004-"; empty where the study is one slice.
      verdicts: the claims against it.
      pairwise: its `pairwise_rows`.
      drawn: figure name → inline SVG, for the figures that are available.
      repeats: whether an earlier part has the same base models, as where the fine-tuning is swept: what only concerns these is not shown again.
    """

    results: StudyResults
    prefix: str
    verdicts: list[Verdict]
    pairwise: Rows
    drawn: dict[str, Markup]
    repeats: bool = False

    @classmethod
    def of(cls, results: StudyResults, earlier: Sequence[StudyResults] = ()) -> "Part":
        bases = [{m.member.base for m in one.members} for one in (results, *earlier)]
        prefix = "".join(f"{axis.symbol}{name_text(value)}-".replace(" ", "_") for axis, value in results.facet)
        return cls(results, prefix, verdicts(results), pairwise_rows(results), {}, bases[0] in bases[1:])


def write_report(results: StudyResults, alone: AnyPath | None = None) -> AnyPath:
    """Writes `report/` into the folder of a study: index.html, figures/*.png, figures/*.svg, tables/*.csv, tables/*.tex.

    Every file is replaced as a whole, the page last: a reader sees the old page or the new one. What earlier reports left behind and this one
    does not have is removed.

    Args:
      alone: a file for the page once more, without links to the files beside the first.
    Returns:
      Path of index.html.
    """
    out = results.path / "report"
    written: set[AnyPath] = set()
    parts = [Part.of(one, results.slices[:i]) for i, one in enumerate(results.slices)]
    whole = Part(results, "", [], [], {})
    with Progress("report", total=len(figures()) * (len(parts) + 1) + 2, unit="parts") as progress:
        for part in (whole, *parts):
            for name, figure in figures().items():
                drawn_here = figure.of_study == (part is whole) and not (part.repeats and figure.of_base)
                if drawn_here and figure.applies(results.config) and figure.available(part.results):
                    picture, full = draw_figure(part.results, name), part.prefix + name
                    values = marked_values(picture)
                    svg = render(picture, "svg").decode()
                    part.drawn[name] = inline_svg(svg, full, described(figure, part.results, values), values)
                    written.add(replace_file(out / "figures" / f"{full}.svg", svg.encode()))
                    written.add(replace_file(out / "figures" / f"{full}.png", render(picture, "png")))
                progress.update(1, note=part.prefix + name)
        numbers = numbers_of(results, parts)
        for name, rows in numbers.items():
            written.add(replace_file(out / "tables" / f"{name}.csv", to_csv(rows).encode()))
            written.add(replace_file(out / "tables" / f"{name}.tex", to_tex(rows).encode()))
        progress.update(1, note="tables")
        page = render_page(results, parts, numbers, whole)
        written.add(replace_file(out / "index.html", page.encode()))
        if alone is not None:
            replace_file(alone, render_page(results, parts, numbers, whole, beside=False).encode())
        progress.update(1, note="page")
    for old in [*out.glob("figures/*"), *out.glob("tables/*")]:
        if old not in written:
            old.unlink()
    return out / "index.html"


def described(figure: Declared, results: StudyResults, values: dict[str, list[str]]) -> str:
    """The text alternative of a figure: its title, caption, notes, and numbers in words."""
    markers = [text for texts in values.values() for text in texts]
    numbers = figure.numbers(results) if figure.numbers is not None else "; ".join(markers) + "." if 0 < len(markers) <= SPOKEN else ""
    return " ".join(
        [figure.title + ("" if figure.title.endswith("?") else "."), figure.text(results), *figure.notes(results), *([numbers] if numbers else [])]
    )


def numbers_of(results: StudyResults, parts: Sequence[Part]) -> dict[str, Rows]:
    """Name of every CSV file → its rows, of which the page shows some."""
    return {name: rows() for name, rows in _sources(results, lambda: parts).items()}


def table_rows(results: StudyResults, name: str) -> Rows:
    """The rows of one CSV file.

    Raises:
      UserError: an unknown name.
    """
    sources = _sources(results, lambda: [Part.of(one) for one in results.slices])
    if name not in sources:
        near = difflib.get_close_matches(name, sources, n=1, cutoff=0.4)
        raise UserError(f"table {name!r} is unknown; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(sources)}."))
    return sources[name]()


def _sources(results: StudyResults, parts: Callable[[], Sequence[Part]]) -> dict[str, Callable[[], Rows]]:
    """Name of every table → what makes its rows."""
    of_stages = {name: lambda table=table: table.rows(results) for name, table in tables().items()}
    return of_stages | {
        "summary": lambda: summary_rows(results),
        "verdicts": lambda: verdict_rows(parts()),
        "pairwise": lambda: [row for part in parts() for row in part.pairwise],
    }


def verdict_rows(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Every verdict with the values of the slice that it is about."""
    return [{axis.field: value for axis, value in part.results.facet} | vars(verdict) for part in parts for verdict in part.verdicts]


def format_summary(rows: list[dict[str, Any]]) -> str:
    """The rows of `summary_rows` as aligned text, one line per member."""
    if not rows:
        return "no members"
    tasks = [key.removesuffix(" before") for key in rows[0] if key.endswith(" before")]
    swept = [key for key in rows[0] if "." in key]  # only swept fields and labels have dotted names
    extra = columns()
    header = ["member", "λ", *(name.rpartition(".")[2] for name in swept), "timescale", "held-out", *(f"{task} before→after" for task in tasks)]
    lines = [[*header, *(column.heading for column in extra.values()), "state"]]
    for row in rows:
        before_after = [(row[f"{task} before"], row[f"{task} after"]) for task in tasks]
        decay, timescale = row["weight_decay"], row["timescale"]
        line = [row["member"], "–" if decay is None else f"{decay:.4g}", *(str(row[name]) for name in swept)]
        line += [f"{timescale:.3g}" if timescale is not None else "none" if decay == 0 else "–", digits(row["held_out_loss"], 3)]
        line += ["–" if pair == (None, None) else "→".join(digits(score, 3) for score in pair) for pair in before_after]
        lines.append([*line, *(digits(row[name], column.digits) for name, column in extra.items()), row["state"]])
    return aligned(lines)


def render_page(results: StudyResults, parts: Sequence[Part], numbers: dict[str, Rows], whole: Part | None = None, *, beside: bool = True) -> str:
    """The page's HTML.

    Args:
      parts: of the study, with the figures that were drawn.
      numbers: rows of the CSV files beside the page, as `numbers_of` gives them.
      whole: the study with the figures that are drawn once for all of its parts.
      beside: whether figures, tables and completions lie beside the page, which then links to them.
    """
    macro = macro_rows(results)
    return render_template(
        "template.html",
        {
            "metric": lambda name: metric_of(name).heading,
            "spoken": lambda part: " ".join(slice_answer(part.results, part.verdicts)),
        },
        results=results,
        config=results.config,
        answer=" ".join(answer(results, parts[0].verdicts)),
        warnings=warnings(results),
        parts=parts,
        whole=whole,
        by_decay=results.axis.field == DECAY,
        swept=[name for name in results.members[0].member.values if name != DECAY] if results.members else [],
        figures=figures(),
        figures_of={section: [n for n, figure in figures().items() if figure.section == section and not figure.of_study] for section in SECTIONS}
        | {"study": [name for name, figure in figures().items() if figure.of_study]},
        shown_tables=_shown_tables(numbers),
        columns=columns(),
        members=numbers["members"],
        tasks=[_task_table(results, task) for task in results.tasks],
        correlation=correlation_rows,
        macro=macro,
        macro_metrics=_shown_metrics(results, {name for row in macro for name in row}),
        forgetting=forgetting(results),
        summary=numbers["summary"],
        samples=[{"task": task, "problems": sample_completions(results, task)} for task in results.tasks],
        config_text=json.dumps(json.loads(to_json(to_dict(results.config))), indent=2, ensure_ascii=False),
        provenance=provenance_rows(results),
        decay_table=next((m.pretrain.decay_table for m in results.members if m.pretrain), {}),
        csv_files=sorted(numbers),
        beside=beside,
    )


def _shown_tables(numbers: dict[str, Rows]) -> dict[str, dict[str, Any]]:
    """Name → the tables of stages that are shown on the page, as `shown_table` gives them."""
    shown = {}
    for name, table in tables().items():
        rows = numbers[name]
        if table.on_page and (rows or not table.optional):
            shown[name] = shown_table(table.title or name, table.caption, rows)
    return shown


def _task_table(results: StudyResults, task: str) -> dict[str, Any]:
    """Every metric of a task, before and after, one row per member; the task's majority class and row counts."""
    scores = [s[task] for m in results.members for s in (m.after, m.before) if task in s]
    metrics = _shown_metrics(results, {name for score in scores for name in score.metrics})
    summary = next((found for name, found in results.prepared.items() if prepared_name(name) == f"task-{task}"), {})
    rows = []
    for m in results.members:
        before, after = m.before.get(task), m.after.get(task)
        cells = [
            {"pair": (_metric(before, name), _metric(after, name)), "interval": _interval(after, name, results.config.report)} for name in metrics
        ]
        links = tuple(None if score is None else _completions_link(results, score) for score in (before, after))
        cells += [
            {"pair": tuple(None if score is None else score.failures[name] for score in (before, after)), "interval": None} for name in FAILURES
        ]
        rows.append({"member": m, "cells": cells, "links": links})
    return {
        "name": task,
        "learned": task in results.learned,
        "learned_on": results.learned_on(task),
        "metrics": [*metrics, *FAILURES],
        "scorers": sorted({score.scorer for score in scores if score.scorer is not None}),
        "subsets": _subset_rows(results, task),
        "rows": rows if scores else [],
        "majority_class": scores[0].majority_class if scores else None,
        "problems": len(scores[0].greedy) if scores else None,
        "train_rows": summary.get("rows", {}).get("train"),
    }


def _shown_metrics(results: StudyResults, names: set[str]) -> list[str]:
    """Those of the names that are metrics of the study and stand on the page; the others are in the CSV files."""
    known = [name for m in results.members for scores in (m.before, m.after) for score in scores.values() for name in score.metrics]
    return [name for name in ordered_metrics(known) if name in names and metric_of(name).on_page]


def _completions_link(results: StudyResults, score: Score) -> str | None:
    """Where the completions behind a score lie, seen from the page: those of the first fine-tuning seed."""
    file = score.runs[0] / COMPLETIONS
    return f"../{quote(relative(file, results.path))}" if file.is_file() else None


def _metric(score: Score | None, name: str) -> float | None:
    return None if score is None else score.metrics.get(name)


def _interval(score: Score | None, name: str, settings: ReportConfig) -> tuple[float, float] | None:
    found = None if score is None or name not in score.metrics else metric_interval(score, name, settings)
    return None if found is None else found[1:]


def _subset_rows(results: StudyResults, task: str) -> list[dict[str, Any]]:
    """Greedy accuracy after fine-tuning by test set, for a task that has several: rows {"name", "problems", "values"}, a value per member."""
    scores = [m.after.get(task) for m in results.members]
    known = next((score.subsets for score in scores if score is not None), {})
    rows = [
        {"name": name, "problems": of_set["problems"], "values": [None if s is None else _counted(s.subsets[name]) for s in scores]}
        for name, of_set in known.items()
    ]
    if rows:
        means = [None if s is None else _counted(macro_average(s.subsets)) for s in scores]
        rows.append({"name": "mean of the sets", "problems": sum(row["problems"] for row in rows), "values": means})
    return rows


def _counted(metrics: dict[str, float]) -> float:
    return metrics["pass@1"] if "pass@1" in metrics else metrics["accuracy"]


def forgetting(results: StudyResults) -> dict[str, Any]:
    """The zero-shot suite: names of the sets, and a row per member and fine-tuned task with (before, after) accuracies."""
    rows: dict[tuple[str, str], dict[str, tuple[float | None, float | None]]] = {}
    for row in forgetting_rows(results):
        rows.setdefault((row["member"], row["task"]), {})[row["set"]] = (row["acc_before"], row["acc_after"])
    sets = list(dict.fromkeys(name for found in rows.values() for name in found))
    return {"sets": sets, "rows": [{"member": member, "task": task, "cells": found} for (member, task), found in rows.items()]}


def sample_completions(results: StudyResults, task: str) -> list[dict[str, Any]]:
    """The first problems of a task with every member's greedy completion before and after fine-tuning.

    Returns:
      Rows {"prompt", "gold", "rows": [{"label", "before", "after"}]}, where before and after are {"text", "answer", "correct"} or None; empty where
      options were compared.
    """
    problems: dict[str, dict[str, Any]] = {}
    for m in results.members:
        if m.member.seed != results.seeds[0]:
            continue
        both = {when: {row["id"]: row for row in _first_rows(m, task, when)} for when in ("before", "after")}
        for key in list(dict.fromkeys([*both["before"], *both["after"]])):
            row = both["after"].get(key) or both["before"][key]
            shown = problems.setdefault(key, {"prompt": _cut(row["prompt"]), "gold": row["gold"], "rows": []})
            shown["rows"].append({"label": results.label(m), **{when: _completion(both[when].get(key)) for when in both}})
    return list(problems.values())


def _first_rows(member: MemberResults, task: str, when: str) -> list[dict[str, Any]]:
    score = getattr(member, when).get(task)
    if score is None or not (score.runs[0] / COMPLETIONS).is_file():
        return []
    return list(itertools.islice(completions(score.runs[0], greedy=True), SAMPLES))


def _completion(row: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if row is None else {**row, "text": _cut(row["text"])}


def _cut(text: str) -> str:
    return text if len(text) <= SAMPLE_CHARACTERS else text[:SAMPLE_CHARACTERS].rstrip() + " …"


def provenance_rows(results: StudyResults) -> list[tuple[str, str]]:
    """What the results rest on, as (name, value); where members differ, every value is listed."""
    rows: dict[str, list[str]] = {}
    for m in results.members:
        for name, value in _flat({k: v for k, v in m.provenance.items() if k not in ("decay_table", "parents", "parent_paths")}):
            shown = to_json(value) if isinstance(value, (list, tuple)) else str(value)
            if shown not in rows.setdefault(name, []):
                rows[name].append(shown)
    found = [("compute dtype, resolved", str(results.resolved.get("compute_dtype", "")))]
    found += [(f"changed for {m.name}", f"{name} = {value}") for m in results.members for name, value in m.member.changes]
    found += [(name, ", ".join(values)) for name, values in rows.items()]
    for name, summary in results.prepared.items():
        if "fingerprint" in summary:
            found.append((f"data of {prepared_name(name)}", str(summary["fingerprint"])))
        found += [(f"licence of {package}", str(licence)) for package, licence in summary.get("licences", {}).items()]
    return list(dict.fromkeys(found))


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in tree.items():
        found += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return found
