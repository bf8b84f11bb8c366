"""A study's numbers as rows: for the terminal, for CSV files, for the page. A missing number is None, and an empty cell in CSV."""

import csv
import io
from typing import Any

import numpy as np

from plasticity_jax.analysis.statistics import bootstrap_mean, leave_one_out_pearson, pearson, spearman
from plasticity_jax.evaluate.metrics import macro_average
from plasticity_jax.report.comparisons import metric_difference, metric_interval, score_difference
from plasticity_jax.report.results import MemberResults, StudyResults, collect, number
from plasticity_jax.runs.storage import AnyPath
from plasticity_jax.study.sweep import swept_values

Rows = list[dict[str, Any]]


def summary_table(study_dir: AnyPath) -> Rows:
    """One row per member for the terminal.

    Returns:
      Rows with `member`, `weight_decay`, the dotted name of every further swept field, `timescale` (share of the run), `held_out_loss` (nats per token), per task `<task> before`,
      `<task> after` and `<task> gain` (greedy accuracy), `W_QK pseudo-rank` (mean over heads), `gap` (nats per token) and `state`.
    """
    return summary_rows(collect(study_dir))


def summary_rows(results: StudyResults) -> Rows:
    """`summary_table` of results already read."""
    rows = []
    for m in results.members:
        row = {"member": m.name, **swept_values(m.member), "timescale": m.member.timescale, "held_out_loss": m.loss}
        for task in results.tasks:
            before, after = (float(s[task].greedy.mean()) if task in s else None for s in (m.before, m.after))
            row |= {f"{task} before": before, f"{task} after": after, f"{task} gain": None if None in (before, after) else after - before}
        rank = m.pseudo_rank("W_QK")
        rows.append(row | {"W_QK pseudo-rank": None if rank is None else float(rank.mean()), "gap": gap_of(m), "state": m.state})
    return rows


def gap_of(member: MemberResults) -> float | None:
    return None if member.gap is None else number(member.gap["gap"])


def member_rows(results: StudyResults) -> Rows:
    """What each member is and what its pretraining cost: λ, further swept fields, timescale, tokens, time, held-out loss, state."""
    rows = []
    for m in results.members:
        found = m.pretrain or {}
        tokens, parameters = number(found.get("tokens")), number(found.get("parameters"))
        held_out = found.get("held_out", {})
        rows.append(
            {
                "member": m.name,
                **swept_values(m.member),
                "seed": m.member.seed,
                "lr_times_decay": number(found.get("lr_times_decay")),
                "timescale_steps": number(found.get("timescale_steps")),
                "timescale_share": m.member.timescale,
                "tokens": tokens,
                "tokens_per_parameter": tokens / parameters if tokens and parameters else None,
                "tokens_per_second": number(found.get("tokens_per_second")),
                "seconds": number(found.get("seconds")),
                "train_loss": number(found.get("train_loss")),
                "held_out_loss": number(held_out.get("loss")),
                "bits_per_byte": number(held_out.get("bits_per_byte")),
                "state": m.state,
                "reason": m.reason,
            }
        )
    return rows


def curve_rows(results: StudyResults) -> Rows:
    """Training and held-out loss by step."""
    rows = []
    for m in results.members:
        for row in m.curve:
            held_out = number(row["held_out"].get("loss")) if isinstance(row.get("held_out"), dict) else None
            rows.append(
                _tagged(
                    m,
                    step=row["step"],
                    tokens=number(row.get("tokens")),
                    loss=number(row.get("loss")),
                    held_out_loss=held_out,
                    lr=number(row.get("lr")),
                )
            )
    return rows


def held_out_rows(results: StudyResults) -> Rows:
    """Final held-out loss, over all domains ("all") and per domain."""
    rows = []
    for m in results.members:
        if m.pretrain:
            held_out = m.pretrain["held_out"]
            for domain, found in [("all", held_out), *sorted(held_out["domains"].items())]:
                rows.append(
                    _tagged(
                        m,
                        domain=domain,
                        loss=number(found.get("loss")),
                        bits_per_byte=number(found.get("bits_per_byte")),
                        tokens=number(found.get("tokens")),
                    )
                )
    return rows


def score_rows(results: StudyResults) -> Rows:
    """Every metric of every member on every task, before and after fine-tuning."""
    rows = []
    for m in results.members:
        for task in results.tasks:
            for when, scores in (("before", m.before), ("after", m.after)):
                if task in scores:
                    score = scores[task]
                    rows.append(
                        _tagged(
                            m,
                            task=task,
                            when=when,
                            problems=len(score.greedy),
                            finetune_seeds=len(score.runs),
                            **score.metrics,
                            **{name.replace(" ", "_"): share for name, share in score.failures.items()},
                            scorer=score.scorer,
                            majority_class=score.majority_class,
                        )
                    )
    return rows


def metric_rows(results: StudyResults) -> Rows:
    """Every metric with its 95% interval over problems, and its difference from the first point's, paired by problem; of each test set the value alone."""
    settings, rows = results.config.report, []
    for part in results.slices:
        for task in results.tasks:
            for when in ("before", "after"):
                of_seed: dict[int, MemberResults] = {}
                for point in part.points:
                    for m in part.at(point):
                        score = getattr(m, when).get(task)
                        if score is None:
                            continue
                        first = of_seed.setdefault(m.member.seed, m)
                        for metric, value in score.metrics.items():
                            row = _tagged(m, task=task, when=when, test_set="", metric=metric)
                            found = metric_interval(score, metric, settings)
                            row |= _with_interval("value", found or (value, None, None))
                            difference = None if first is m else metric_difference(getattr(first, when)[task], score, metric, settings)
                            rows.append(row | {"reference": first.name} | _with_interval("difference", difference))
                        for name, metrics in score.subsets.items():
                            rows += [_tagged(m, task=task, when=when, test_set=name, metric=metric, value=value) for metric, value in metrics.items()]
    return rows


def macro_rows(results: StudyResults) -> Rows:
    """Mean over the tasks of each metric that all of a member's tasks have, before and after fine-tuning; None until every task is scored."""
    rows = []
    for m in results.members:
        for when, scores in (("before", m.before), ("after", m.after)):
            if results.tasks and all(task in scores for task in results.tasks):
                found = macro_average({task: scores[task].metrics for task in results.tasks})
                rows.append(_tagged(m, when=when, tasks=len(results.tasks), **found))
    return rows


def forgetting_rows(results: StudyResults) -> Rows:
    """Zero-shot accuracy of each set: of the base model, and after fine-tuning on each task; the drop is before − after."""
    rows = []
    for m in results.members:
        before = m.zero_shot.get("", {"sets": {}})["sets"]
        for task, found in m.zero_shot.items():
            for name, after in found["sets"].items() if task else ():
                earlier = before.get(name)
                row = _tagged(m, task=task, set=name, examples=after["n"])
                for key in ("acc", "acc_norm"):
                    low, high = (None if one is None else number(one.get(key)) for one in (earlier, after))
                    row |= {f"{key}_before": low, f"{key}_after": high, f"{key}_drop": None if None in (low, high) else low - high}
                rows.append(row)
    return rows


def gain_rows(results: StudyResults) -> Rows:
    """Score and gain per point with 95% intervals: of the score, of the gain paired before/after, of both less the first point's paired by problem."""
    settings, field = results.config.report, results.axis.field
    rows = []
    for part in results.slices:
        for task in results.tasks:
            reference = next((p for p in part.points if part.mean(p, lambda m: m.after_task(task)) is not None), None)
            for point in part.points:
                after = part.mean(point, lambda m: m.after_task(task))
                if after is None:
                    continue
                row = {"task": task, **part.swept(point), "timescale_share": part.timescale(point)}
                row |= _with_interval("after", bootstrap_mean(after, samples=settings.bootstrap_samples, seed=settings.seed))
                before = part.mean(point, lambda m: m.before[task].greedy if task in m.before else None)
                gain = part.mean(point, lambda m: m.gain(task))
                row["before"] = None if before is None else float(before.mean())
                row |= _with_interval("gain", None if gain is None else bootstrap_mean(gain, samples=settings.bootstrap_samples, seed=settings.seed))
                row[f"reference_{field}"] = reference
                for name, of_gain in (("after_difference", False), ("gain_difference", True)):
                    row |= _with_interval(name, None if point == reference else score_difference(part, reference, point, (task,), gain=of_gain))
                rows.append(row)
    return rows


def _with_interval(name: str, interval: tuple[float, float, float] | None) -> dict[str, float | None]:
    mean, lower, upper = interval or (None, None, None)
    return {name: mean, f"{name}_lower": lower, f"{name}_upper": upper}


def probe_rows(results: StudyResults) -> Rows:
    """Probe accuracy by set and layer."""
    rows = []
    for m in results.members:
        for name, found in (m.probe or {"sets": {}})["sets"].items():
            for i, layer in enumerate(found["layers"]):
                rows.append(
                    _tagged(
                        m,
                        set=name,
                        layer=layer,
                        accuracy=number(found["accuracy"][i]),
                        accuracy_norm_free=number(found["accuracy_norm_free"][i]),
                        l2=number(found["l2"][i]),
                        majority=number(found["majority"]),
                        n_train=found["n_train"],
                        n_test=found["n_test"],
                    )
                )
    return rows


def spectra_rows(results: StudyResults) -> Rows:
    """Pseudo-rank, stable rank and effective rank by product, layer and head."""
    rows = []
    for m in results.members:
        for product in ("W_QK", "W_VO") if m.spectra else ():
            found = m.spectra[product]
            for layer, heads in enumerate(found["pseudo_rank"]):
                for head, rank in enumerate(heads):
                    other = {name: number(found[name][layer][head]) for name in ("stable_rank", "effective_rank", "nuclear_norm") if name in found}
                    rows.append(_tagged(m, product=product, layer=layer + 1, head=head + 1, pseudo_rank=number(rank), **other))
    return rows


def gap_rows(results: StudyResults) -> Rows:
    """Loss on seen and on held-out text, their gap with its interval, and the same of the unigram control."""
    rows = []
    for m in results.members:
        if m.gap:
            control = m.gap["control"]
            row = _tagged(m, seen=number(m.gap["seen"]), held_out=number(m.gap["held_out"]))
            row |= _with_interval("gap", (gap_of(m), *map(number, m.gap["interval"])))
            row |= {"seen_early": number(m.gap["seen_early"]), "seen_late": number(m.gap["seen_late"])}
            row |= _with_interval("control_gap", (number(control["gap"]), *map(number, control["interval"])))
            rows.append(row | {"control_passes": control["passes"], "tokens_per_side": m.gap["tokens_per_side"]})
    return rows


def correlation_rows(results: StudyResults) -> Rows:
    """Correlation over the points between held-out loss and score after fine-tuning, per task and for the mean over learnt tasks; needs three points."""
    rows = []
    for part in results.slices:
        scores = {
            task: {p: float(np.mean(s)) for p in part.losses if (s := part.mean(p, lambda m, t=task: m.after_task(t))) is not None}
            for task in results.tasks
        }
        if len(part.learnt) > 1:
            scores["mean (learnt)"] = {p: s for p in part.losses if (s := part.task_mean(p, lambda m, t: m.after_task(t))) is not None}
        for task, by_point in scores.items():
            if len(by_point) >= 3:
                losses, values = [part.losses[p] for p in by_point], list(by_point.values())
                # Two points always lie on a line: leaving one out of three says nothing.
                left_out = [v for v in map(number, leave_one_out_pearson(losses, values)) if v is not None] if len(by_point) > 3 else []
                rows.append(
                    {
                        **{axis.field: value for axis, value in part.facet},
                        "task": task,
                        "points": len(by_point),
                        "pearson": number(pearson(losses, values)),
                        "spearman": number(spearman(losses, values)),
                        "leave_one_out_lowest": min(left_out, default=None),
                        "leave_one_out_highest": max(left_out, default=None),
                    }
                )
    return rows


TABLES = {
    "members": member_rows,
    "curves": curve_rows,
    "held_out": held_out_rows,
    "scores": score_rows,
    "metrics": metric_rows,
    "macro": macro_rows,
    "forgetting": forgetting_rows,
    "gains": gain_rows,
    "probes": probe_rows,
    "pseudo_rank": spectra_rows,
    "gap": gap_rows,
    "correlation": correlation_rows,
}


def to_csv(rows: Rows) -> str:
    """Rows as CSV with a header of every key in order of appearance; numbers in full precision."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _tagged(member: MemberResults, **values: Any) -> dict[str, Any]:
    return {"member": member.name, **swept_values(member.member), "seed": member.member.seed, **values}
