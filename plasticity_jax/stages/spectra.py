"""Spectra: singular values of the attention products of every base model, and how many of them matter."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Le

from plasticity_jax.config import StudyConfig
from plasticity_jax.config.schema import PositiveFraction, result
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
      W_QK, W_VO: singular_values [layer][head][rank] and, [layer][head] each, pseudo_rank and the entries of `spectra_summary`.
      mass, power, fold_norms: the settings.
      norm_gains: root mean square of each norm's gain, [layer] or one number.
      seconds: wall time.
    """

    W_QK: dict[str, Any]
    W_VO: dict[str, Any]
    mass: float
    power: int
    fold_norms: bool
    norm_gains: dict[str, Any]
    seconds: float


def run(context: Context) -> Spectra:
    """Computes the spectra of the parent "model"."""
    import jax
    import numpy as np

    from plasticity_jax.analysis.spectra import attention_spectra, pseudo_rank, spectra_summary
    from plasticity_jax.parallel.rules import param_paths

    start, settings, model = time.monotonic(), context.section, context.model()
    products = {}
    for name, values in attention_spectra(model, fold_norms=settings.fold_norms).items():
        summary = {"pseudo_rank": pseudo_rank(values, mass=settings.mass, power=settings.power)} | spectra_summary(values)
        products[name] = {key: value.tolist() for key, value in ({"singular_values": values} | summary).items()}
    gains = {path: leaf for path, leaf in zip(param_paths(model.params), jax.tree.leaves(model.params)) if path.endswith("norm/scale")}
    norm_gains = {path: np.sqrt(np.mean(np.asarray(gain, np.float64) ** 2, axis=-1)).tolist() for path, gain in gains.items()}
    return Spectra(
        **products, mass=settings.mass, power=settings.power, fold_norms=settings.fold_norms, norm_gains=norm_gains, seconds=time.monotonic() - start
    )


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


def pseudo_ranks(member: "MemberResults", product: str) -> "np.ndarray | None":
    """[L, H] pseudo-rank of "W_QK" or "W_VO"; None without spectra."""
    import numpy as np

    found = member.record("spectra")
    return None if found is None else np.asarray(getattr(found, product)["pseudo_rank"], dtype=np.float64)


def _rows(results: "StudyResults") -> Rows:
    """Pseudo-rank, stable rank and effective rank by product, layer and head."""
    rows = []
    for m in results.members:
        found = m.record("spectra")
        for product in PRODUCTS if found else ():
            values = getattr(found, product)
            for layer, heads in enumerate(values["pseudo_rank"]):
                for head, rank in enumerate(heads):
                    other = {name: number(values[name][layer][head]) for name in ("stable_rank", "effective_rank", "nuclear_norm") if name in values}
                    rows.append(member_row(m, product=product, layer=layer + 1, head=head + 1, pseudo_rank=number(rank), **other))
    return rows


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
                axes.plot(layers, rank.mean(axis=1), color=drawing.color(results, point), marker=drawing.marker(results, point))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(0, 1.03)
        axes.set_ylabel("pseudo-rank")
    panels[-1].set_xlabel("layer (mean over heads)")
    return drawn


def _mean_query_key_rank(member: "MemberResults") -> float | None:
    rank = pseudo_ranks(member, "W_QK")
    return None if rank is None else float(rank.mean())


def rank_measure(product: str, less: str = "") -> "Measure":
    """Pseudo-rank of a product, less that of another: one number per model, the mean over heads."""
    from plasticity_jax.report.effects import Measure

    def groups(member: "MemberResults"):
        rank, other = pseudo_ranks(member, product), pseudo_ranks(member, less) if less else 0.0
        return None if rank is None or other is None else [(rank - other).ravel()]

    return Measure(f"{product} pseudo-rank" + (f" less that of {less}" if less else ""), groups, "", RANK_MARGIN, "share of the singular values")


def query_key_rank_falls(results: "StudyResults") -> "Verdict":
    """The claim about the attention matrices."""
    from plasticity_jax.report.verdicts import TREND_RULE, WORDS_RULE, judged, trend_found

    return judged(
        results,
        "The pseudo-rank of W_QK falls with weight decay, and falls more than that of W_VO.",
        "attention matrices, section 4.2",
        f"{TREND_RULE}. One number per model, the mean over heads: of W_QK, and of W_QK less W_VO. Both must fall for “supports”; either rising "
        "contradicts, at half the level. " + WORDS_RULE.format(delta=RANK_MARGIN),
        trend_found(results, [rank_measure("W_QK"), rank_measure("W_QK", "W_VO")], -1, "spectra"),
    )


STAGE = Stage(
    name="spectra",
    title="attention spectra",
    run=run,
    devices="all",
    programs=_programs,
    work=_work,
    record=Spectra,
    config=SpectraConfig,
    parents={"model": "pretrain"},
    tables={"pseudo_rank": Table(_rows, on_page=False)},
    figures={
        "pseudo_rank": Figure(
            "Attention pseudo-rank",
            "Fraction of the singular values that holds most of their sum, for the query-key and the value-output products of the base model.",
            lambda results: any(m.record("spectra") for m in results.members),
            _draw,
        )
    },
    columns={"W_QK pseudo-rank": Column(_mean_query_key_rank, "W_QK rank", digits=2)},
    claims=(query_key_rank_falls,),
    measures=lambda results: [rank_measure(product) for product in PRODUCTS],
)
