"""Spectra: singular values of the attention products of every model, how many of them matter, and whether more than noise is left of the product."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Le

from plasticity_jax.config import StudyConfig
from plasticity_jax.config.schema import PositiveFraction, result
from plasticity_jax.runs.directory import CONFIG, PROVENANCE, RunDirectory
from plasticity_jax.runs.jsonfiles import read_json
from plasticity_jax.runs.storage import AnyPath, joined
from plasticity_jax.stages.stage import Column, Context, Figure, Program, Rows, Stage, Table, member_row, number
from plasticity_jax.stages.work import Ahead, Work

if TYPE_CHECKING:
    import numpy as np
    from jax.sharding import Mesh
    from matplotlib.figure import Figure as Drawing

    from plasticity_jax.report.effects import Measure
    from plasticity_jax.report.results import MemberResults, StudyResults
    from plasticity_jax.report.verdicts import Verdict

PRODUCTS = {"W_QK": "query-key product", "W_VO": "value-output product"}
RANK_MARGIN = 0.02  # of the pseudo-rank, a mean over heads: a change up to this counts as no effect
VANISHED = 0.9  # share of a model's heads that must not rise above the noise floor for its product to count as vanished
PER_HEAD = ("stable_rank", "effective_rank", "nuclear_norm", "frobenius_norm", "noise_floor", "left_norm", "right_norm", "balancedness")


@dataclass(frozen=True)
class SpectraConfig:
    """Singular values of the attention products W_QK and W_VO."""

    mass: PositiveFraction = result(0.95, "fraction of the sum that the leading singular values must reach")
    power: Annotated[int, Ge(1), Le(2)] = result(1, "1: sum of the values | 2: sum of their squares")
    fold_norms: bool = result(False, "multiply the input norm's gain into the factors")


@dataclass(frozen=True)
class Spectra:
    """Spectra of a model.

    Attributes:
      W_QK, W_VO: singular_values [layer][head][rank] and, [layer][head] each, pseudo_rank, the entries of `spectra_summary`, noise_floor, and the
        left_norm, right_norm and balancedness of `attention_products`.
      mass, power, fold_norms: the settings.
      norm_gains: root mean square of each norm's gain, [layer] or one number.
      seconds: wall time.
      noise_deviation: standard deviation of weights that are noise of the optimizer, see `noise_variance`; None where the training is not known.
    """

    W_QK: dict[str, Any]
    W_VO: dict[str, Any]
    mass: float
    power: int
    fold_norms: bool
    norm_gains: dict[str, Any]
    seconds: float
    noise_deviation: float | None = None


def run(context: Context) -> Spectra:
    """Computes the spectra of the parent "model"."""
    import jax
    import numpy as np

    from plasticity_jax.analysis.spectra import attention_products, noise_floor, pseudo_rank, spectra_summary
    from plasticity_jax.parallel.rules import param_paths

    start, settings, model = time.monotonic(), context.section, context.model()
    products, variance = {}, _noise_variance(context.parents["model"])
    for name, found in attention_products(model, fold_norms=settings.fold_norms).items():
        values = found["singular_values"]
        summary = {"pseudo_rank": pseudo_rank(values, mass=settings.mass, power=settings.power)} | spectra_summary(values)
        summary |= {"noise_floor": noise_floor(found, variance)} | {key: found[key] for key in ("left_norm", "right_norm", "balancedness")}
        products[name] = {key: value.tolist() for key, value in ({"singular_values": values} | summary).items()}
    gains = {path: leaf for path, leaf in zip(param_paths(model.params), jax.tree.leaves(model.params)) if path.endswith("norm/scale")}
    norm_gains = {path: np.sqrt(np.mean(np.asarray(gain, np.float64) ** 2, axis=-1)).tolist() for path, gain in gains.items()}
    return Spectra(
        **products,
        mass=settings.mass,
        power=settings.power,
        fold_norms=settings.fold_norms,
        norm_gains=norm_gains,
        seconds=time.monotonic() - start,
        noise_deviation=None if variance is None else variance**0.5,
    )


def _noise_variance(path: AnyPath) -> float | None:
    """`noise_variance` of a model's attention weights, from the config and the steps of its runs; None where a run's training is not recorded."""
    import jax.numpy as jnp
    import numpy as np

    from plasticity_jax.analysis.spectra import noise_variance
    from plasticity_jax.train.optimizer import Schedule, schedule_shape, warmup_steps
    from plasticity_jax.train.tuning import TO_ZERO, tuning_warmup_steps

    directory = RunDirectory(path)
    if not (path / CONFIG).is_file() or (run := directory.run()).stage not in ("pretrain", "finetune"):
        return None
    fields, steps = run.fields, directory.results().get("steps")
    if run.stage == "pretrain":
        recipe, start = fields.get("train"), 0.0
        decay, kind = fields.get("weight_decay"), fields.get("decay", {}).get("kind")
    else:
        recipe, decay, kind = fields, fields.get("weight_decay"), "coupled"
        base = read_json(path / PROVENANCE).get("parent_paths", {}).get("base")
        start = None if base is None else _noise_variance(joined(path, base))
    if not steps or not recipe or decay is None or start is None:
        return None
    if run.stage == "pretrain":
        schedule = Schedule(recipe["schedule"], recipe["final_lr_fraction"], recipe["decay_fraction"])
        warmup = warmup_steps(steps, recipe["warmup_fraction"])
    else:
        schedule, warmup = TO_ZERO, tuning_warmup_steps(steps, recipe["warmup_fraction"])
    shape = np.asarray(
        schedule_shape(jnp.arange(steps), warmup=jnp.asarray(warmup, float), total=jnp.asarray(steps, float), schedule=schedule), np.float64
    )
    rates = recipe["peak_lr"] * shape
    return noise_variance(rates, decay * (shape if kind == "independent" else rates), start)


def _programs(config: StudyConfig, mesh: "Mesh", members: int) -> Iterable[Program]:
    from plasticity_jax.analysis.spectra import lower_spectra
    from plasticity_jax.model.load import abstract_loaded
    from plasticity_jax.parallel.sharding import device_bytes

    params = abstract_loaded(config.model, mesh, "float32")
    yield Program("singular values", lambda own: lower_spectra(own.model, params, own.spectra.fold_norms, mesh), held=device_bytes(params))


def _work(ahead: Ahead) -> Iterable[Work]:
    """QR of every head's four factors, their products, and singular values alone. Source: Golub and Van Loan, Matrix Computations, 5.2.1 and 8.6."""
    model = ahead.config.model
    d, r = model.d_model, model.head_dim
    factors = 2 * (model.n_heads + model.n_kv_heads) * (2 * d * r**2 - 2 * r**3 / 3)
    products = 2 * model.n_heads * (2 * r**3 + 8 * r**3 / 3)
    yield Work(flops=model.n_layers * (factors + products))


def pseudo_ranks(member: "MemberResults", product: str, task: str = "") -> "np.ndarray | None":
    """[L, H] pseudo-rank of "W_QK" or "W_VO", of the base model or as fine-tuned on a task; None without spectra."""
    return _per_head(member, product, "pseudo_rank", task)


def _per_head(member: "MemberResults", product: str, name: str, task: str = "") -> "np.ndarray | None":
    return _of_heads(member.record("spectra", task), product, name)


def _of_heads(found: Spectra | None, product: str, name: str) -> "np.ndarray | None":
    import numpy as np

    values = None if found is None else getattr(found, product).get(name)
    return None if values is None else np.asarray(values, dtype=np.float64)


def at_noise_floor(member: "MemberResults", product: str, task: str = "") -> "np.ndarray | None":
    """[L, H] whether a head's product is not above its noise floor, so that its pseudo-rank is that of noise; None where that is not known."""
    return _at_floor(member.record("spectra", task), product)


def _at_floor(found: Spectra | None, product: str) -> "np.ndarray | None":
    norm, floor = (_of_heads(found, product, name) for name in ("frobenius_norm", "noise_floor"))
    return None if norm is None or floor is None else norm <= floor


def vanished(member: "MemberResults", product: str, task: str = "") -> str | None:
    """Why a model's product has no rank, in words; None where at least a tenth of its heads rise above the noise floor."""
    return _vanished(member.record("spectra", task), product)


def _vanished(found: Spectra | None, product: str) -> str | None:
    heads = _at_floor(found, product)
    if heads is None or heads.mean() < VANISHED:
        return None
    norm, floor = (_of_heads(found, product, name) for name in ("frobenius_norm", "noise_floor"))
    assert norm is not None and floor is not None
    return f"{product} has vanished: {heads.sum()} of {heads.size} heads at the noise floor, mean norm {norm.mean():.2g}, floor {floor.mean():.2g}"


def median_rank(found: Spectra | None, product: str) -> float | None:
    """Median pseudo-rank over a model's heads; None without spectra, for a product that has vanished, and for ranks that are not finite."""
    import numpy as np

    rank = _of_heads(found, product, "pseudo_rank")
    return None if rank is None or _vanished(found, product) else number(np.median(rank))


def _rows(results: "StudyResults") -> Rows:
    """Ranks, norms, noise floor and balancedness by product, layer and head, of base models and of fine-tuned ones ("finetuned_on")."""
    rows = []
    for m in results.members:
        for task, found in m.records("spectra").items():
            for product in PRODUCTS:
                values, below = getattr(found, product), at_noise_floor(m, product, task)
                for layer, heads in enumerate(values["pseudo_rank"]):
                    for head, rank in enumerate(heads):
                        other = {name: number(values[name][layer][head]) for name in PER_HEAD if name in values}
                        about = {"finetuned_on": task, "product": product, "layer": layer + 1, "head": head + 1, "pseudo_rank": number(rank)}
                        rows.append(member_row(m, **about, **other, at_noise_floor=None if below is None else bool(below[layer, head])))
    return rows


def _model_rows(results: "StudyResults") -> Rows:
    """One row per model and product: means over heads, and how many heads are at the noise floor."""
    rows = []
    for m in results.members:
        for task in m.records("spectra"):
            for product in PRODUCTS:
                below = at_noise_floor(m, product, task)
                arrays = {name: _per_head(m, product, name, task) for name in ("pseudo_rank", *PER_HEAD)}
                means = {name: None if array is None else number(array.mean()) for name, array in arrays.items()}
                gone = vanished(m, product, task)
                means["pseudo_rank"] = None if gone else means["pseudo_rank"]
                heads = {
                    "heads": 0 if arrays["pseudo_rank"] is None else arrays["pseudo_rank"].size,
                    "heads_at_floor": None if below is None else int(below.sum()),
                }
                about = {"finetuned_on": task or "(base)", "product": product}
                rows.append(member_row(m, **about, **means, **heads, vanished="unknown" if below is None else "yes" if gone else "no"))
    return rows


def _warnings(results: "StudyResults") -> list[str]:
    from plasticity_jax.report.sentences import few

    found: dict[str, list[str]] = {}
    for m in results.members:
        for product in PRODUCTS:
            tuned = [task for task in m.records("spectra") if vanished(m, product, task)]
            if tuned:
                found.setdefault(product, []).append(m.name + ("" if "" in tuned else f" after {', '.join(tuned)}"))
    return [
        f"{product} has vanished in {few(names)}: its norm is within what the optimizer's noise or rounding gives, so it has no pseudo-rank there."
        for product, names in found.items()
    ]


def _draw(results: "StudyResults") -> "Drawing":
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    from plasticity_jax.report import drawing

    drawn, panels = drawing.member_panels(results, [f"{name}, {meaning}" for name, meaning in PRODUCTS.items()], 2.4)
    for axes, product in zip(panels, PRODUCTS):
        for point in results.points:
            rank = results.mean(point, lambda m: pseudo_ranks(m, product))
            if rank is not None:
                layers = np.arange(1, len(rank) + 1)
                gone = any(vanished(m, product) for m in results.at(point))
                style = {"linestyle": ":", "alpha": 0.6} if gone else {}
                axes.plot(layers, rank.mean(axis=1), color=drawing.color(results, point), marker=drawing.marker(results, point), **style)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(0, 1.03)
        axes.set_ylabel("pseudo-rank")
    panels[-1].set_xlabel("layer (mean over heads); dotted: vanished")
    return drawn


def _draw_over_points(results: "StudyResults") -> "Drawing":
    """Pseudo-rank of both products over the axis, and their norms beside the noise floor."""
    import numpy as np

    from plasticity_jax.report import drawing

    drawn, panels = drawing.panels_below(2, 2.4)

    def mean_of(product: str, name: str, task: str = "", *, kept: bool = False):
        def value(m: "MemberResults") -> float | None:
            found = None if kept and vanished(m, product, task) else _per_head(m, product, name, task)
            return None if found is None else number(found.mean())

        return value

    tuned = list(dict.fromkeys(task for m in results.members for task in m.records("spectra") if task))
    for i, product in enumerate(PRODUCTS):
        color = drawing.SERIES[i]
        means = drawing.seed_means(panels[0], results, mean_of(product, "pseudo_rank", kept=True), color)
        drawing.line(panels[0], results, means, color=color, marker=drawing.MARKERS[i], label=product)
        gone = {
            point: float(np.mean(found))
            for point in results.points
            if point not in means and (found := [v for m in results.at(point) if (v := mean_of(product, "pseudo_rank")(m)) is not None])
        }
        if gone:
            drawing.line(panels[0], results, gone, color=color, marker="x", linestyle="none", label=f"{product}, vanished")
        for task in tuned:
            after = {
                p: float(np.mean(found))
                for p in results.points
                if (found := [v for m in results.at(p) if (v := mean_of(product, "pseudo_rank", task, kept=True)(m)) is not None])
            }
            drawing.line(
                panels[0], results, after, color=color, linestyle="--", linewidth=0.8, label=f"{product} after" if task == tuned[0] else None
            )
        for name, style in (("frobenius_norm", "-"), ("noise_floor", ":")):
            found = {p: v for p in results.points if (v := results.mean(p, mean_of(product, name))) is not None and v > 0}
            label = f"{product}, {'norm' if name == 'frobenius_norm' else 'noise floor'}"
            drawing.line(panels[1], results, found, color=color, linestyle=style, marker=drawing.MARKERS[i] if style == "-" else None, label=label)
    panels[0].set_title("Pseudo-rank")
    panels[0].set_ylim(0, 1.03)
    panels[0].set_ylabel("mean over heads")
    panels[1].set_title("Frobenius norm and noise floor")
    panels[1].set_ylabel("mean over heads")
    if panels[1].lines:
        panels[1].set_yscale("log")
    for axes in panels:
        drawing.swept_axis(axes, results, label=axes is panels[-1])
        if handles := axes.get_legend_handles_labels()[0]:
            drawing.legend_above(axes, handles)
    return drawn


def _draw_heads(results: "StudyResults") -> "Drawing":
    """Heat maps of the pseudo-rank, layers by heads; a row of panels per point, a column per product. A cross marks a head at the noise floor."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import MaxNLocator

    from plasticity_jax.report import drawing

    points = [p for p in results.points if any(m.record("spectra") for m in results.at(p))]
    drawn = Canvas(figsize=(drawing.WIDTH, 0.5 + 1.35 * len(points)))
    grid = drawn.subplots(len(points), len(PRODUCTS), squeeze=False)
    image, shades = None, colormaps["viridis"].resampled(20)  # with more the color bar would be an image
    for row, point in zip(grid, points):
        for axes, product in zip(row, PRODUCTS):
            rank = results.mean(point, lambda m: pseudo_ranks(m, product))
            edges = [np.arange(n + 1) + 0.5 for n in (rank.shape[1], rank.shape[0])]
            image = axes.pcolormesh(*edges, rank, vmin=0, vmax=1, cmap=shades)
            axes.invert_yaxis()
            below = results.mean(point, lambda m: at_noise_floor(m, product))
            if below is not None:
                layers, heads = np.nonzero(below > 0.5)
                for color, width in (("white", 2.4), (drawing.INK, 1.0)):
                    axes.plot(heads + 1, layers + 1, "x", color=color, markersize=4, markeredgewidth=width)
            axes.set_title(f"{product}, {results.axis.equation(point)}")
            axes.grid(visible=False)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        row[0].set_ylabel("layer")
    for axes in grid[-1]:
        axes.set_xlabel("head")
    if image is not None:
        drawn.colorbar(image, ax=grid, shrink=0.6, aspect=30, label="pseudo-rank")
    return drawn


def _mean_query_key_rank(member: "MemberResults") -> float | None:
    rank = pseudo_ranks(member, "W_QK")
    return None if rank is None or vanished(member, "W_QK") else float(rank.mean())


def rank_measure(product: str, less: str = "") -> "Measure":
    """Pseudo-rank of a product, less that of another: one number per model, the mean over heads. None where a product has vanished."""
    from plasticity_jax.report.effects import Measure

    def gone(member: "MemberResults") -> str | None:
        return vanished(member, product) or (vanished(member, less) if less else None)

    def groups(member: "MemberResults"):
        rank, other = pseudo_ranks(member, product), pseudo_ranks(member, less) if less else 0.0
        return None if rank is None or other is None or gone(member) else [(rank - other).ravel()]

    name = f"{product} pseudo-rank" + (f" less that of {less}" if less else "")
    return Measure(name, groups, "", RANK_MARGIN, "share of the singular values", absent=gone)


def query_key_rank_falls(results: "StudyResults") -> "Verdict":
    """The claim about the attention matrices."""
    from plasticity_jax.report.verdicts import TREND_RULE, WORDS_RULE, judged, trend_found

    return judged(
        results,
        "The pseudo-rank of W_QK falls with weight decay, and falls more than that of W_VO.",
        "attention matrices, section 4.2",
        f"{TREND_RULE}. One number per model, the mean over heads: of W_QK, and of W_QK less W_VO. Both must fall for “supports”; either rising "
        "contradicts, at half the level. A model whose product has vanished, with at least nine heads of ten at the noise floor, has no rank and is left "
        "out by name. " + WORDS_RULE.format(delta=RANK_MARGIN),
        trend_found(results, [rank_measure("W_QK"), rank_measure("W_QK", "W_VO")], -1, "spectra"),
    )


def _available(results: "StudyResults") -> bool:
    return any(m.record("spectra") for m in results.members)


STAGE = Stage(
    name="spectra",
    title="attention spectra",
    version=2,
    run=run,
    devices="all",
    programs=_programs,
    work=_work,
    record=Spectra,
    config=SpectraConfig,
    parents={"model": ("pretrain", "finetune")},
    tables={
        "pseudo_rank": Table(_rows, on_page=False),
        "ranks": Table(
            _model_rows,
            title="Ranks and norms of the attention products",
            caption="Means over heads, of base models and of fine-tuned ones. The pseudo-rank means something only where the Frobenius norm exceeds the "
            "noise floor (docs/statistics.md); a model with at least nine heads of ten at the floor has vanished and shows none. Balancedness is the norm "
            "of AᵀA − BᵀB of a product’s two factors. By layer and head: pseudo_rank.csv.",
            optional=True,
        ),
    },
    figures={
        "pseudo_rank": Figure(
            "Attention pseudo-rank",
            "Fraction of the singular values that holds most of their sum, for the query-key and the value-output products of the base model.",
            _available,
            _draw,
        ),
        "rank_norms": Figure(
            "Rank and norm",
            "Over {symbol}: pseudo-rank of the base models (solid) and after fine-tuning on each task (dashed), and the norm of the product beside its noise floor. A "
            "cross marks a product that has vanished: what is left of it is noise, whose rank is high.",
            _available,
            _draw_over_points,
        ),
        "rank_heads": Figure(
            "Pseudo-rank by layer and head",
            "Mean over seeds, base models. A cross marks a head at the noise floor.",
            _available,
            _draw_heads,
        ),
    },
    columns={"W_QK pseudo-rank": Column(_mean_query_key_rank, "W_QK rank", digits=2)},
    claims=(query_key_rank_falls,),
    measures=lambda results: [rank_measure(product) for product in PRODUCTS],
    warnings=_warnings,
)
