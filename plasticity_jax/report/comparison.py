"""The page of several studies: the best weight decays of every setting side by side, their tables and figures, and the claim about tokens."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import NullLocator

from plasticity_jax.errors import UserError
from plasticity_jax.progress import Progress
from plasticity_jax.report import drawing
from plasticity_jax.report.frame import digits, inline_svg, render_template, replace_file, shown_table
from plasticity_jax.report.optima import LARGER, Best
from plasticity_jax.report.tables import aligned, to_csv, to_tex
from plasticity_jax.report.verdicts import CONTRADICTS, SUPPORTS, USEFUL_LOSS
from plasticity_jax.runs.jsonfiles import read_json, write_json
from plasticity_jax.runs.storage import AnyPath, is_local, make_folder
from plasticity_jax.stages import number
from plasticity_jax.stages.spectra import PRODUCTS, median_rank, vanished
from plasticity_jax.stages.stage import Rows

if TYPE_CHECKING:
    from plasticity_jax.study.compare import Comparison, Setting

PAGE, WRITTEN = "index.html", "compare.json"  # the second lists what a comparison wrote, and so may replace or remove
_OWN = re.compile(r"index\.html|figures/\w+\.(svg|png)|tables/\w+\.(csv|tex)")

# ------------------------------------------------------------------------------------------------------------------------------ tables


def tables(comparison: "Comparison") -> dict[str, Rows]:
    """Name of every CSV file → its rows, of which the page shows some."""
    from plasticity_jax.study.compare import provenance

    return {
        "settings": [setting_row(setting, setting.tasks) for setting in comparison.settings],
        "by_task": [
            {"task": task} | setting_row(setting, (task,))
            for task in _learned(comparison)
            for setting in comparison.settings
            if task in setting.results.learned
        ],
        "every_decay": [row for setting in comparison.settings for row in _decay_rows(setting)],
        "ranks": rank_rows(comparison),
        "differences": difference_rows(comparison),
        "verdicts": [dict(vars(verdict)) for verdict in comparison.verdicts],
        "studies": provenance(comparison),
    }


def _learned(comparison: "Comparison") -> list[str]:
    return list(dict.fromkeys(task for setting in comparison.settings for task in setting.results.learned))


def setting_row(setting: "Setting", tasks: Sequence[str]) -> dict[str, Any]:
    """The best λ of a setting by held-out loss (nats per token) and by the mean score on tasks, both numbers at both, and whether the second is larger."""
    by_loss, by_score = setting.by_loss, setting.best_on(tasks)
    losses, scores, found = setting.losses, setting.scores(tasks), setting.larger(tasks) if tasks else None
    row = setting.about | {"peak_lr": setting.fields["train.peak_lr"], "seeds": len(setting.results.seeds), "tasks": tuple(tasks)}
    for name, best in (("loss_best", by_loss), ("score_best", by_score)):
        row |= {
            name: None if best is None else best.decay,
            f"{name}_equals": () if best is None else best.equals,
            f"{name}_timescale": None if best is None else setting.results.timescale(best.decay),
            f"{name}_in_seeds": None if best is None else best.agree,
            f"{name}_of_seeds": None if best is None else len(best.of_seeds),
            f"loss_at_{name}": None if best is None else losses.get(best.decay),
            f"score_at_{name}": None if best is None else scores.get(best.decay),
        }
    row |= dict(zip(("seeds_larger", "seeds_equal", "seeds_smaller"), _order(by_loss, by_score)))
    return row | {"larger": None if found is None else found.word, "larger_p": found and found.p, "larger_why": found and found.why}


def _order(by_loss: Best | None, by_score: Best | None) -> tuple[int | None, ...]:
    """Seeds whose own downstream-best λ is larger than, equal to and smaller than their own loss-best."""
    if by_loss is None or by_score is None:
        return None, None, None
    pairs = [(by_score.of_seeds[seed], decay) for seed, decay in by_loss.of_seeds.items() if seed in by_score.of_seeds]
    return sum(a > b for a, b in pairs), sum(a == b for a, b in pairs), sum(a < b for a, b in pairs)


def _decay_rows(setting: "Setting") -> Rows:
    """Everything compared, at every λ: means over seeds."""
    results, losses, scores = setting.results, setting.losses, setting.scores(setting.tasks)
    rows = []
    for decay in results.points:
        row = {"setting": setting.name, "weight_decay": decay, "timescale": results.timescale(decay), "models": len(results.at(decay))}
        row |= {"finished": sum(m.loss is not None for m in results.at(decay)), "held_out_loss": losses.get(decay)}
        bits = results.mean(decay, lambda m: number(m.held_out.get("bits_per_byte")) if m.held_out else None)
        row |= {"bits_per_byte": number(bits), "score": scores.get(decay)}
        rows.append(row | {f"{task} after": setting.scores((task,)).get(decay) for task in setting.results.tasks})
    return rows


def rank_rows(comparison: "Comparison") -> Rows:
    """Median pseudo-rank over heads of both products, a mean over seeds, for every λ of every setting, and for the models beside them."""
    rows = []
    for setting in comparison.settings:
        for decay in setting.results.points:
            members = [m for m in setting.results.at(decay) if m.record("spectra") is not None]
            if members:
                row = {"setting": setting.name, "weight_decay": decay, "timescale": setting.results.timescale(decay), "models": len(members)}
                row |= {f"{product} median": rank_at(setting, decay, product) for product in PRODUCTS}
                rows.append(row | {f"{product} vanished": sum(vanished(m, product) is not None for m in members) for product in PRODUCTS})
    for model in comparison.models:
        row = {"setting": model.name, "weight_decay": None, "timescale": None, "models": 1}
        row |= {f"{product} median": median_rank(model.spectra, product) for product in PRODUCTS}
        rows.append(row | {f"{product} vanished": int(median_rank(model.spectra, product) is None) for product in PRODUCTS})
    return rows


def rank_at(setting: "Setting", decay: float, product: str) -> float | None:
    return number(setting.results.mean(decay, lambda m: median_rank(m.record("spectra"), product)))


def difference_rows(comparison: "Comparison") -> Rows:
    """A row per field in which settings differ, with its value in each."""
    rows = []
    for name in dict.fromkeys(name for setting in comparison.settings for name in setting.fields):
        values = [setting.fields.get(name) for setting in comparison.settings]
        if any(value != values[0] for value in values):
            rows.append({"field": name} | {s.name: "–" if value is None else _shown(value) for s, value in zip(comparison.settings, values)})
    return rows


def _shown(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:59] + "…"


def format_settings(rows: Rows) -> str:
    """The rows of the table "settings" as aligned text, one line per setting."""
    lines = [["setting", "tokens/param", "seeds", "best λ by loss", "best λ by score", "larger"]]
    for row in rows:
        best = [
            _decay(row[name]) + ("" if row[name] is None else f" ({row[f'{name}_in_seeds']}/{row[f'{name}_of_seeds']})")
            for name in ("loss_best", "score_best")
        ]
        lines.append([row["setting"], digits(row["tokens_per_parameter"], 1), str(row["seeds"]), *best, row["larger"] or "–"])
    return aligned(lines)


def _decay(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


# ----------------------------------------------------------------------------------------------------------------------------- figures


@dataclass(frozen=True)
class Figure:
    """A figure of the page: see `stages.Figure`, with a comparison in place of a study."""

    title: str
    caption: Callable[["Comparison"], str]
    available: Callable[["Comparison"], bool]
    draw: Callable[["Comparison"], Drawing]


def draw(comparison: "Comparison", name: str) -> Drawing:
    """Draws a figure. Raises UserError for an unknown name, or where there is nothing to show."""
    if name not in FIGURES:
        raise UserError(f"figure {name!r} is unknown; known: {', '.join(FIGURES)}.")
    if not FIGURES[name].available(comparison):
        raise UserError(f"figure {name!r} has nothing to show yet; run the studies until their models have finished the stage it reads.")
    with matplotlib.rc_context(drawing.STYLE):
        drawn = FIGURES[name].draw(comparison)
        drawn.draw_without_rendering()
        drawn.set_layout_engine("none")
    return drawn


def _style(index: int) -> dict[str, Any]:
    return {"color": drawing.SERIES[index % len(drawing.SERIES)], "marker": drawing.MARKERS[index % len(drawing.MARKERS)]}


def _decay_axis(axis: Any, decays: Sequence[float]) -> None:
    """A logarithmic axis of λ with 0 a step below the smallest, and a tick at every λ; labels that would overlap are not shown."""
    ticks = sorted(set(decays))
    positive = [decay for decay in ticks if decay > 0]
    if positive and ticks[0] == 0:
        steps = np.diff(np.log10(positive))
        axis._set_axes_scale("symlog", linthresh=positive[0], linscale=float(np.clip(np.median(steps), 0.3, 1.0)) if len(steps) else 0.5)
    elif positive:
        axis._set_axes_scale("log")
    axis.set_ticks(ticks, [f"{decay:.3g}" for decay in ticks])
    axis.set_minor_locator(NullLocator())
    places = axis.get_transform().transform(np.array(ticks))
    room, last = 0.12 * (places[-1] - places[0]), -np.inf
    for label, place in zip(axis.get_ticklabels(), places):
        label.set_visible(bool(place - last >= room))
        last = place if place - last >= room else last


def _canvas(comparison: "Comparison", titles: Sequence[str], height: float, names: Sequence[str]) -> tuple[Drawing, list[Axes]]:
    """Panels as high as `height`, and room for a legend of `names` above the first."""
    drawn, panels = drawing.panels_below(len(titles), height)
    drawn.set_figheight(height * len(titles) + 0.17 * len(names))
    for axes, title in zip(panels, titles):
        axes.set_title(title)
    return drawn, panels


def _draw_best(comparison: "Comparison") -> Drawing:
    settings = _with_both(comparison)
    drawn, [axes] = _canvas(comparison, [""], 3.6, [setting.name for _, setting in settings])
    places: list[tuple[float, float]] = []
    for index, setting in settings:
        assert setting.by_loss is not None and setting.by_score is not None
        place = (setting.by_loss.decay, setting.by_score.decay)
        size = 6 + 4.5 * places.count(place)  # settings at one place are drawn around each other
        places.append(place)
        axes.plot(
            *[[value] for value in place],
            **_style(index),
            linestyle="none",
            label=setting.name,
            markersize=size,
            fillstyle="none",
            markeredgewidth=1.6,
        )
        both = [(decay, setting.by_score.of_seeds[seed]) for seed, decay in setting.by_loss.of_seeds.items() if seed in setting.by_score.of_seeds]
        if len(both) > 1:
            axes.plot(*zip(*both), ".", color=_style(index)["color"], alpha=0.45, markersize=4)
    decays = [decay for line in axes.lines for values in (line.get_xdata(), line.get_ydata()) for decay in np.asarray(values, float)]
    for axis in (axes.xaxis, axes.yaxis):
        _decay_axis(axis, decays)
    axes.margins(0.12)
    axes.plot([min(decays), max(decays)], [min(decays), max(decays)], color=drawing.REFERENCE, linestyle=":", linewidth=1.1, zorder=0)
    axes.set_xlabel("λ with the lowest held-out loss (log)")
    axes.set_ylabel("λ with the best score after fine-tuning (log)")
    drawing.legend_above(axes, axes.get_legend_handles_labels()[0])
    return drawn


def _with_both(comparison: "Comparison") -> list[tuple[int, "Setting"]]:
    return [(i, s) for i, s in enumerate(comparison.settings) if s.by_loss is not None and s.by_score is not None]


def _draw_over_decay(comparison: "Comparison") -> Drawing:
    same = comparison.same_losses
    titles = ("Held-out loss" if same else "Held-out loss above the setting’s lowest", "Score after fine-tuning")
    drawn, panels = _canvas(comparison, titles, 2.5, [setting.name for setting in comparison.settings])
    lowest = []
    for index, setting in enumerate(comparison.settings):
        losses = setting.losses
        less = 0.0 if same or not losses else min(losses.values())
        lowest += [min(losses.values()) - less] if losses else []
        for axes, values in zip(panels, ({d: loss - less for d, loss in losses.items()}, setting.scores(setting.tasks))):
            axes.plot(list(values), list(values.values()), **_style(index), label=setting.name)
    panels[0].set_ylabel("nats per token")
    panels[1].set_ylabel("accuracy")
    bottom, top = panels[0].get_ylim()
    if lowest:
        panels[0].set_ylim(bottom, min(top, max(lowest) + 5 * USEFUL_LOSS))
    _share_decays(comparison, panels)
    return drawn


def _draw_ranks(comparison: "Comparison") -> Drawing:
    names = [setting.name for setting in comparison.settings] + [model.name for model in comparison.models]
    drawn, panels = _canvas(comparison, [f"{product}, {meaning}" for product, meaning in PRODUCTS.items()], 2.3, names)
    for axes, product in zip(panels, PRODUCTS):
        for index, setting in enumerate(comparison.settings):
            found = {d: rank for d in setting.results.points if (rank := rank_at(setting, d, product)) is not None}
            axes.plot(list(found), list(found.values()), **_style(index), label=setting.name)
        for index, model in enumerate(comparison.models):
            rank = median_rank(model.spectra, product)
            if rank is not None:
                color = drawing.SERIES[(len(comparison.settings) + index) % len(drawing.SERIES)]
                axes.axhline(rank, color=color, linestyle="--", linewidth=1.2, label=model.name)
        axes.set_ylim(0, 1.03)
        axes.set_ylabel("median over heads")
    _share_decays(comparison, panels)
    return drawn


def _share_decays(comparison: "Comparison", panels: Sequence[Axes]) -> None:
    decays = [decay for setting in comparison.settings for decay in setting.results.points]
    for axes in panels:
        _decay_axis(axes.xaxis, decays)
        axes.margins(x=0.06)
    panels[-1].set_xlabel("weight decay λ (log)")
    drawing.legend_above(panels[0], panels[0].get_legend_handles_labels()[0])


FIGURES = {
    "best": Figure(
        "Best weight decay before and after fine-tuning",
        lambda comparison: "One mark per setting; above the dotted line the λ that is best after fine-tuning is the larger one. Settings at one place are drawn around each "
        "other. Dots: single pretraining seeds.",
        lambda comparison: bool(_with_both(comparison)),
        _draw_best,
    ),
    "over_decay": Figure(
        "Loss and score over λ",
        lambda comparison: "Means over seeds; the score is the mean over "
        + (", ".join(comparison.tasks) if comparison.tasks else "the tasks that each setting learned, which are not the same")
        + f". Losses more than {5 * USEFUL_LOSS:g} nats above a setting’s lowest run off the top."
        + ("" if comparison.same_losses else " Each loss is less the lowest of its own setting, because they do not stand beside each other."),
        lambda comparison: any(setting.losses for setting in comparison.settings),
        _draw_over_decay,
    ),
    "ranks": Figure(
        "Attention pseudo-rank over λ",
        lambda comparison: "Median over heads of the base models, a mean over seeds; a product that has vanished has none." + (" Dashed: models beside the studies, whose λ is not part of this." if comparison.models else ""),
        lambda comparison: any(row[f"{product} median"] is not None for row in rank_rows(comparison) if row["weight_decay"] is not None for product in PRODUCTS),
        _draw_ranks,
    ),
}  # fmt: skip

# -------------------------------------------------------------------------------------------------------------------------------- page


def check_out(out: AnyPath) -> None:
    """Refuses a place for the page that is a file, or holds files of its names that no comparison wrote. Raises UserError."""
    for place in (out, *out.parents) if is_local(out) else (out,):
        if place.is_file():
            raise UserError(f"--out={out}: {place} is a file; give a folder for the page, which is made if it is missing.")
    own = _written(out)
    for name in _names():
        if name not in own and (out / name).exists():
            raise UserError(f"--out={out} holds {name}, which no comparison wrote; give another folder, or move it away.")


def _names() -> list[str]:
    tables_ = ("settings", "by_task", "every_decay", "ranks", "differences", "verdicts", "studies")
    return [PAGE, *(f"figures/{n}.{k}" for n in FIGURES for k in ("svg", "png")), *(f"tables/{n}.{k}" for n in tables_ for k in ("csv", "tex"))]


def _written(out: AnyPath) -> set[str]:
    """Names of what an earlier comparison wrote to the folder."""
    if not (out / WRITTEN).is_file():
        return set()
    found = read_json(out / WRITTEN)
    names = found.get("files") if isinstance(found, dict) else None
    if not isinstance(names, list):
        raise UserError(f"--out={out} holds a {WRITTEN} that no comparison wrote; give another folder, or move it away.")
    return {name for name in names if isinstance(name, str) and _OWN.fullmatch(name)}


def write_comparison(comparison: "Comparison", out: AnyPath) -> AnyPath:
    """Writes index.html, figures/*.png and *.svg, tables/*.csv and *.tex into a folder, and compare.json, which lists them.

    Every file is replaced as a whole, the page last. What an earlier comparison left there and this one does not have is removed, and nothing else.

    Returns:
      Path of index.html.
    Raises:
      UserError: as `check_out`.
    """
    check_out(out)
    earlier, figures, numbers = _written(out), [name for name, figure in FIGURES.items() if figure.available(comparison)], tables(comparison)
    now = {PAGE, *(f"figures/{name}.{kind}" for name in figures for kind in ("svg", "png"))}
    now |= {f"tables/{name}.{kind}" for name in numbers for kind in ("csv", "tex")}
    make_folder(out)
    write_json(out / WRITTEN, {"files": sorted(earlier | now)})
    drawn = {}
    with Progress("compare", total=len(figures) + 2, unit="parts") as progress:
        for name in figures:
            picture, figure = draw(comparison, name), FIGURES[name]
            values = drawing.marked_values(picture)
            svg = drawing.render(picture, "svg").decode()
            drawn[name] = inline_svg(svg, name, f"{figure.title}. {figure.caption(comparison)}", values)
            replace_file(out / "figures" / f"{name}.svg", svg.encode())
            replace_file(out / "figures" / f"{name}.png", drawing.render(picture, "png"))
            progress.update(1, note=name)
        for name, rows in numbers.items():
            replace_file(out / "tables" / f"{name}.csv", to_csv(rows).encode())
            replace_file(out / "tables" / f"{name}.tex", to_tex(rows).encode())
        progress.update(1, note="tables")
        page = replace_file(out / PAGE, render_comparison(comparison, numbers, drawn).encode())
        progress.update(1, note="page")
    for name in earlier - now:
        (out / name).unlink(missing_ok=True)
    write_json(out / WRITTEN, {"files": sorted(now)})
    return page


def render_comparison(comparison: "Comparison", numbers: dict[str, Rows], drawn: dict[str, Any]) -> str:
    """The page's HTML.

    Args:
      numbers: as `tables` gives them.
      drawn: figure name → inline SVG, for the figures that are available.
    """
    return render_template(
        "compare.html",
        {"decay": _decay},
        comparison=comparison,
        answer=" ".join(answer(comparison, numbers["settings"])),
        settings=numbers["settings"],
        by_task=numbers["by_task"],
        figures={name: (figure.title, figure.caption(comparison)) for name, figure in FIGURES.items()},
        drawn=drawn,
        shown={
            "ranks": shown_table("Median pseudo-rank", "Of all heads of the base models, a mean over seeds. Vanished: models whose product is noise and has no rank.", numbers["ranks"]),
            "differences": shown_table("What the settings differ in", "Fields that define the models and their fine-tuning; λ and the seed are not among them.", numbers["differences"], empty="Nothing: they are equal in all settings."),
            "every_decay": shown_table("Every weight decay", "Means over seeds: held-out loss in nats per token, bits per byte, greedy accuracy after fine-tuning.", numbers["every_decay"]),
            "studies": shown_table("Studies", "", numbers["studies"]),
        },
        csv_files=sorted(numbers),
    )  # fmt: skip


def answer(comparison: "Comparison", rows: Rows) -> list[str]:
    """Sentences: what is compared, where the best λ lie, what is certain of it, and whether they move."""
    models = f", with the ranks of {', '.join(model.name for model in comparison.models)}" if comparison.models else ""
    said = [f"{len(comparison.settings)} settings of {len(comparison.studies)} studies are compared{models}."]
    both = [row for row in rows if row["loss_best"] is not None and row["score_best"] is not None]
    if both:
        order = [sum(compare(row["score_best"], row["loss_best"]) for row in both) for compare in (float.__gt__, float.__eq__, float.__lt__)]
        sure = sum(row["larger"] == LARGER for row in rows)
        said.append(
            f"The weight decay with the best score after fine-tuning is larger than the one with the lowest held-out loss in {order[0]} of {len(both)} "
            f"settings, the same in {order[1]} and smaller in {order[2]}; the chance of pretraining is ruled out as the reason for a larger one in {sure}."
        )
    else:
        said.append("No setting has both a held-out loss and a score after fine-tuning yet.")
    words = [verdict.verdict for verdict in comparison.verdicts]
    if words:
        said.append(
            f"That both optima move down with more tokens is judged on {len(words)} pair{'s' if len(words) > 1 else ''} of settings: {words.count(SUPPORTS)} "
            f"support it, {words.count(CONTRADICTS)} contradict it."
        )
    return said
