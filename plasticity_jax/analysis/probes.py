"""Linear probes: how well a linear classifier predicts a label from the states of a text, layer by layer."""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Shaped

from plasticity_jax.config import ModelConfig
from plasticity_jax.data.batching import padded_batches, power_of_two_buckets
from plasticity_jax.parallel import processes

if TYPE_CHECKING:
    from plasticity_jax.data.tokenizer import Tokenizer
    from plasticity_jax.model.forward import Forward
    from plasticity_jax.model.load import LoadedModel

Pooling = Literal["last", "mean"]

VALIDATION_FRACTION = 0.2
MAX_ITERATIONS = 500
# Largest entry of the gradient; float32 resolves little less. Without a penalty, separable classes have no minimum and stop when they stall.
GRADIENT_TOLERANCE = 2e-6
VALIDATION_TOLERANCE = 1e-5  # of the fits that only choose a penalty
STALLED_ITERATIONS = 30
LINE_SEARCH_TRIALS = 4
SLOPE_LEFT = 0.25  # fraction of the slope at which a step along a direction is long enough
# Smallest l2 that the preconditioner assumes, as a fraction of its mean diagonal: its inverse is in float32.
PRECONDITIONER_FLOOR = 1e-4
INVERSE_BLOCK = 48  # columns; of 16 to 96 the fastest on CPUs
TINY = np.finfo(np.float32).tiny

SHORTEST_BUCKET = 16
TOKENS_PER_BATCH = 8192  # where nothing else is asked for
BAG_OF_WORDS = 4096  # most common tokens of the training texts


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """A fitted probe and its accuracy on the test rows.

    Attributes:
      accuracy: fraction of the test rows that it labels correctly.
      per_class: the same for the test rows of each label.
      l2: the chosen penalty.
      correct: which test rows are right, [n_test].
      classes: the labels in ascending order; axis C below.
      weights, bias: [D, C] and [C], for features standardized by `mean` and `scale`, [D] each (zeros and ones if not standardized).
      validation_loss: penalty → mean cross-entropy on the validation rows, in nats; empty with a single penalty.
      converged: whether the final fit reached the gradient tolerance.
    """

    accuracy: float
    per_class: dict[Any, float]
    l2: float
    correct: Bool[np.ndarray, " n_test"]
    classes: tuple
    weights: Float[np.ndarray, "d c"]
    bias: Float[np.ndarray, " c"]
    mean: Float[np.ndarray, " d"]
    scale: Float[np.ndarray, " d"]
    validation_loss: dict[float, float]
    converged: bool


def fit_probe(
    x_train: Shaped[ArrayLike, "..."],
    y_train: Sequence | np.ndarray,
    x_test: Shaped[ArrayLike, "..."],
    y_test: Sequence | np.ndarray,
    *,
    l2: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1),
    seed: int = 0,
    standardize: bool = True,
) -> ProbeResult:
    """Multinomial logistic regression on frozen features.

    Minimizes mean cross-entropy (nats) + 0.5 · l2 · ||W||² in float32; the bias is not penalized. Chooses the penalty with the lowest cross-entropy on
    a validation split (a fifth of each class's training rows), then fits the probe again to all training rows.

    Args:
      x_train, x_test: features.
      y_train, y_test: labels, integers or strings.
      l2: candidate penalties.
      seed: of the validation split.
      standardize: scale every feature to mean 0 and variance 1, by the statistics of the rows that are fitted.
    Raises:
      ValueError: no rows, different numbers of rows or features, features that are not finite, fewer than two classes, a test label without training
        rows, no or negative penalties, or too few rows per class to choose a penalty.
    """
    return fit_probes(np.asarray(x_train)[None], y_train, np.asarray(x_test)[None], y_test, l2=l2, seed=seed, standardize=standardize)[0]


def fit_probes(
    x_train: Shaped[ArrayLike, "..."],
    y_train: Sequence | np.ndarray,
    x_test: Shaped[ArrayLike, "..."],
    y_test: Sequence | np.ndarray,
    *,
    l2: Sequence[float],
    seed: int,
    standardize: bool,
) -> list[ProbeResult]:
    """`fit_probe` for each of several layers, in one compiled program.

    The penalties of a layer are fitted together and share its features; layers follow one another, so that only one layer's work is in memory.

    Args:
      x_train, x_test: features, [layers, n, d] and [layers, n_test, d].
    Raises:
      ValueError: as `fit_probe`.
    """
    x_train, x_test = np.asarray(x_train, np.float32), np.asarray(x_test, np.float32)
    labels_train, labels_test = np.asarray(y_train), np.asarray(y_test)
    penalties = sorted({float(value) for value in l2}, reverse=True)
    _check_rows(x_train, labels_train, x_test, labels_test)
    if not penalties or penalties[-1] < 0:
        raise ValueError(f"l2={tuple(l2)} must hold at least one penalty, none negative.")
    classes, y_n = np.unique(labels_train, return_inverse=True)
    # Held-out rows get weight 0 instead of being removed: all fits to a data set have one shape and compile once.
    held_n = _validation_rows(y_n, seed) if len(penalties) > 1 else np.zeros(len(y_n), bool)
    fitted = _fit_layers(
        x_train, y_n.astype(np.int32), held_n.astype(np.float32), np.asarray(penalties, np.float32), n_classes=len(classes), standardize=standardize
    )
    found = []
    for x_MxD, fit in zip(x_test, (_Fit(*arrays) for arrays in zip(*map(np.asarray, fitted)))):
        # Ties went to the larger penalty, which comes first.
        weights, bias, mean, scale = (value.astype(np.float64) for value in (fit.weights.T, fit.bias, fit.mean, fit.scale))
        correct = classes[np.argmax((x_MxD - mean) / scale @ weights + bias, axis=-1)] == labels_test
        found.append(
            ProbeResult(
                accuracy=float(correct.mean()),
                per_class={c.item(): float(correct[labels_test == c].mean()) for c in classes if (labels_test == c).any()},
                l2=penalties[fit.chosen],
                correct=correct,
                classes=tuple(classes.tolist()),
                weights=weights,
                bias=bias,
                mean=mean,
                scale=scale,
                validation_loss=dict(zip(penalties, fit.validation_loss.tolist())) if len(penalties) > 1 else {},
                converged=bool(fit.gradient <= GRADIENT_TOLERANCE),
            )
        )
    return found


def _check_rows(x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> None:
    for side, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        if x.ndim != 3 or y.ndim != 1 or x.shape[1] != len(y) or len(y) == 0:
            raise ValueError(f"x_{side} has shape {x.shape[1:]} and y_{side} {y.shape}; they must be [n, d] and [n] with n at least 1.")
        if not np.isfinite(x).all():
            raise ValueError(f"x_{side} has values that are not finite; leave out the model that gave them.")
    if x_train.shape[2] != x_test.shape[2] or len(x_train) != len(x_test):
        raise ValueError(f"x_train has {x_train.shape[2]} features and x_test {x_test.shape[2]}; take both from the same layer.")
    classes = np.unique(y_train)
    if len(classes) < 2:
        raise ValueError(f"y_train has the single class {classes[0]!s}; a probe needs at least two.")
    unseen = sorted(set(y_test.tolist()) - set(y_train.tolist()))
    if unseen:
        raise ValueError(f"label {unseen[0]!r} is in y_test but not in y_train; give training rows of every class.")


def _validation_rows(y_n: np.ndarray, seed: int) -> np.ndarray:
    """Bool [n]: a fifth of each class, rounded down, so that every class keeps rows to fit."""
    rng = np.random.default_rng(seed)
    held_n = np.zeros(len(y_n), bool)
    for label in range(y_n.max() + 1):
        rows = rng.permutation(np.flatnonzero(y_n == label))
        held_n[rows[: int(len(rows) * VALIDATION_FRACTION)]] = True
    if not held_n.any():
        raise ValueError(f"{len(y_n)} training rows leave none to choose l2 with; give at least 5 rows of a class, or a single l2.")
    return held_n


class _Fit(NamedTuple):
    """A probe fitted to all rows, per layer; `chosen` is the index of its penalty, `gradient` its largest entry at the end."""

    weights: Any  # [C, D]
    bias: Any  # [C]
    mean: Any  # [D]
    scale: Any  # [D]
    chosen: Any
    validation_loss: Any  # [P]
    gradient: Any


@functools.partial(jax.jit, static_argnames=("n_classes", "standardize"))
@jax.default_matmul_precision("highest")
def _fit_layers(x_LxNxD: Array, y_N: Array, held_N: Array, l2_P: Array, *, n_classes: int, standardize: bool) -> _Fit:
    """Shapes: L layers, N rows, D features, P penalties."""
    is_class_CxN = jax.nn.one_hot(y_N, n_classes, axis=0)
    n_rows, d = x_LxNxD.shape[1:]

    def layer(x_NxD):
        all_N = jnp.ones(n_rows)
        all_NxD, mean_D, scale_D = _standardized(x_NxD, all_N, standardize)
        inverse_PxDxD = _preconditioner(all_NxD, l2_P, n_classes) if d <= n_rows else None
        chosen, losses_P = jnp.int32(0), jnp.zeros(len(l2_P))
        if len(l2_P) > 1:
            own_NxD, _, _ = _standardized(x_NxD, 1 - held_N, standardize)
            _, _, logits_PxCxN, _ = _minimize(own_NxD, is_class_CxN, 1 - held_N, l2_P, inverse_PxDxD, VALIDATION_TOLERANCE)
            losses_PxN = jax.nn.logsumexp(logits_PxCxN, axis=1) - jnp.sum(logits_PxCxN * is_class_CxN, axis=1)
            losses_P = losses_PxN @ held_N / held_N.sum()
            chosen = jnp.argmin(losses_P)
        own = None if inverse_PxDxD is None else inverse_PxDxD[chosen][None]
        weights_PxCxD, bias_PxC, _, gradient_P = _minimize(all_NxD, is_class_CxN, all_N, l2_P[chosen][None], own, GRADIENT_TOLERANCE)
        weights_CxD, bias_C = weights_PxCxD[0], bias_PxC[0]
        if not standardize:
            bias_C, mean_D = bias_C - weights_CxD @ mean_D, jnp.zeros(d)
        return _Fit(weights_CxD, bias_C, mean_D, scale_D, chosen, losses_P, gradient_P[0])

    return jax.lax.map(layer, x_LxNxD)


def _preconditioner(x_NxD: Array, l2_P: Array, n_classes: int) -> Array:
    """Inverse Hessians of each class's weights at W = 0, [P, D, D].

    They make up for correlated features, so that tens of steps are enough instead of hundreds. With more features than rows they would cost more than
    the steps that they save.
    """
    n_rows, d = x_NxD.shape
    gram_DxD = x_NxD.T @ x_NxD / (n_rows * n_classes)
    least = PRECONDITIONER_FLOOR * jnp.trace(gram_DxD) / d
    return _inverse(gram_DxD + jnp.maximum(l2_P, least)[:, None, None] * jnp.eye(d), INVERSE_BLOCK)


def _standardized(x_NxD: Array, rows_N: Array, scaled: bool) -> tuple[Array, Array, Array]:
    """(centered and, where `scaled`, divided by its deviation; mean; scale), by the statistics of the rows with weight 1.

    Centering changes no fit, because the bias is not penalized.
    """
    # A mean of values without their first is exactly 0 for a constant feature, whose deviation is then 0 too rather than rounding error.
    total = rows_N.sum()
    mean_D = x_NxD[0] + rows_N @ (x_NxD - x_NxD[0]) / total
    mean_D += rows_N @ (x_NxD - mean_D) / total  # the second time without the rounding of a far first row
    x_NxD = x_NxD - mean_D
    deviation_D = jnp.sqrt(rows_N @ x_NxD**2 / total)
    scale_D = jnp.where((deviation_D > 0) & scaled, deviation_D, 1.0)
    return x_NxD / scale_D, mean_D, scale_D


def _inverse(a_PxDxD: Array, block: int) -> Array:
    """Inverses of positive definite matrices, by Gauss-Jordan elimination of `block` columns at a time.

    Almost all of it is matrix products. LAPACK's threads wait for one another at every few columns: on cores that other work shares, its Cholesky
    decomposition of 576 columns took 200 times as long.
    """
    d = a_PxDxD.shape[-1]
    padded = -(-d // block) * block
    a_PxDxD = jnp.pad(a_PxDxD, ((0, 0), (0, padded - d), (0, padded - d))) + jnp.diag(jnp.where(jnp.arange(padded) < d, 0.0, 1.0))

    def eliminate(step, a):
        at = step * block
        columns, rows = jax.lax.dynamic_slice_in_dim(a, at, block, 2), jax.lax.dynamic_slice_in_dim(a, at, block, 1)
        pivot = jax.lax.dynamic_slice_in_dim(columns, at, block, 1)
        pivot = 1 / pivot if block == 1 else _inverse(pivot, 1)
        rows = jax.lax.dynamic_update_slice_in_dim(pivot @ rows, pivot, at, 2)
        others = jax.lax.dynamic_update_slice_in_dim(columns, jnp.zeros_like(pivot), at, 1)
        a = jax.lax.dynamic_update_slice_in_dim(a, jnp.zeros_like(columns), at, 2) - others @ rows
        return jax.lax.dynamic_update_slice_in_dim(a, rows, at, 1)

    return jax.lax.fori_loop(0, padded // block, eliminate, a_PxDxD)[:, :d, :d]


def _minimize(
    x_NxD: Array, is_class_CxN: Array, rows_N: Array, l2_P: Array, inverse_PxDxD: Array | None, tolerance: float
) -> tuple[Array, Array, Array, Array]:
    """Fits one probe per penalty to the same rows: (weights [P, C, D], bias [P, C], logits [P, C, N], largest entry of the gradient [P]).

    Preconditioned nonlinear conjugate gradients (Polak-Ribière+). Logits are linear in the step along a direction, so that an iteration multiplies by
    the features twice, however many steps are tried. A fit that is done no longer moves.

    Args:
      x_NxD: features with mean 0 over the fitted rows.
      rows_N: weight of each row.
      inverse_PxDxD: approximate inverse of the Hessian of each class's weights; None takes a multiple of the identity.
      tolerance: largest entry of the gradient.
    """
    n_fits, (n_classes, n_rows), d = len(l2_P), is_class_CxN.shape, x_NxD.shape[1]
    weight_N = rows_N / rows_N.sum()

    def inner(a, b):
        return jnp.sum(a * b, axis=tuple(range(1, a.ndim)))

    def per_fit(value_P):
        return value_P[:, None, None]

    def gradient_of(probabilities_PxCxN, weights_PxCxD):
        residual_PxCxN = (probabilities_PxCxN - is_class_CxN) * weight_N
        products_PxCxD = (residual_PxCxN.reshape(-1, n_rows) @ x_NxD).reshape(n_fits, n_classes, d)
        return products_PxCxD + per_fit(l2_P) * weights_PxCxD, residual_PxCxN.sum(axis=-1)

    def search(logits_PxCxN, probabilities_PxCxN, change_PxCxN, penalty_slope_P, penalty_curve_P, slope_P):
        """Step sizes by Newton's method in one dimension, and the probabilities there."""
        toward_P = jnp.sum(is_class_CxN * change_PxCxN * weight_N, axis=(1, 2)) - penalty_slope_P

        def slope_and_curve(p_PxCxN, step_P):
            along_PxN = jnp.sum(p_PxCxN * change_PxCxN, axis=1)
            curve_P = jnp.sum((jnp.sum(p_PxCxN * change_PxCxN**2, axis=1) - along_PxN**2) * weight_N, axis=1) + penalty_curve_P
            return jnp.sum(along_PxN * weight_N, axis=1) - toward_P + step_P * penalty_curve_P, jnp.maximum(curve_P, TINY)

        def unfinished(carry):
            *_, done_P, trial = carry
            return ~done_P.all() & (trial < LINE_SEARCH_TRIALS)

        def attempt(carry):
            step_P, low_P, high_P, _, _, trial = carry
            p_PxCxN = jax.nn.softmax(logits_PxCxN + per_fit(step_P) * change_PxCxN, axis=1)
            at_P, curve_P = slope_and_curve(p_PxCxN, step_P)
            done_P = (jnp.abs(at_P) <= SLOPE_LEFT * jnp.abs(slope_P)) | (trial == LINE_SEARCH_TRIALS - 1)
            low_P, high_P = jnp.where(at_P < 0, step_P, low_P), jnp.where(at_P < 0, high_P, step_P)
            next_P = step_P - at_P / curve_P
            between_P = (next_P > low_P) & (next_P < jnp.minimum(high_P, 10 * step_P))
            next_P = jnp.where(between_P, next_P, jnp.where(jnp.isfinite(high_P), (low_P + high_P) / 2, 2 * step_P))
            return jnp.where(done_P, step_P, next_P), low_P, high_P, p_PxCxN, done_P, trial + 1

        zero_P = jnp.zeros(n_fits)
        first_P = -slope_P / slope_and_curve(probabilities_PxCxN, zero_P)[1]
        start = (first_P, zero_P, zero_P + jnp.inf, probabilities_PxCxN, zero_P > 0, 0)
        step_P, _, _, probabilities_PxCxN, _, _ = jax.lax.while_loop(unfinished, attempt, start)
        return step_P, probabilities_PxCxN

    def unfinished(carry):
        return carry["active"].any() & (carry["iteration"] < MAX_ITERATIONS)

    def iterate(carry):
        weights, bias, logits, last = carry["weights"], carry["bias"], carry["logits"], carry["last"]
        grad = gradient_of(carry["probabilities"], weights)
        size_P = jnp.maximum(jnp.abs(grad[0]).max(axis=(1, 2)), jnp.abs(grad[1]).max(axis=1))
        stalled_P = jnp.where(size_P < carry["least"], 0, carry["stalled"] + 1)
        active_P = carry["active"] & (size_P > tolerance) & (stalled_P < STALLED_ITERATIONS)
        scaled_PxCxD = n_classes * grad[0] if inverse_PxDxD is None else jnp.einsum("pce,ped->pcd", grad[0], inverse_PxDxD)
        scaled = scaled_PxCxD, n_classes * grad[1]
        steepness_P = inner(grad[0], scaled[0]) + inner(grad[1], scaled[1])
        changed_P = steepness_P - inner(last["grad"][0], scaled[0]) - inner(last["grad"][1], scaled[1])
        kept_P = jnp.maximum(changed_P / jnp.maximum(last["steepness"], TINY), 0)
        slope_P = kept_P * (inner(last["direction"][0], grad[0]) + inner(last["direction"][1], grad[1])) - steepness_P
        kept_P, slope_P = jnp.where(slope_P < 0, kept_P, 0), jnp.where(slope_P < 0, slope_P, -steepness_P)
        direction = per_fit(kept_P) * last["direction"][0] - scaled[0], kept_P[:, None] * last["direction"][1] - scaled[1]
        change_PxCxN = (x_NxD @ direction[0].reshape(-1, d).T).T.reshape(n_fits, n_classes, n_rows) + direction[1][:, :, None]
        step_P, probabilities = search(
            logits, carry["probabilities"], change_PxCxN, l2_P * inner(weights, direction[0]), l2_P * inner(direction[0], direction[0]), slope_P
        )
        step_P = jnp.where(active_P, step_P, 0)
        return {
            "weights": weights + per_fit(step_P) * direction[0],
            "bias": bias + step_P[:, None] * direction[1],
            "logits": logits + per_fit(step_P) * change_PxCxN,
            "probabilities": jnp.where(per_fit(active_P), probabilities, carry["probabilities"]),
            "last": {"grad": grad, "direction": direction, "steepness": steepness_P},
            "size": size_P,
            "least": jnp.minimum(size_P, carry["least"]),
            "stalled": stalled_P,
            "active": active_P,
            "iteration": carry["iteration"] + 1,
        }

    weights, bias = jnp.zeros((n_fits, n_classes, d)), jnp.zeros((n_fits, n_classes))
    logits, infinite = jnp.zeros((n_fits, n_classes, n_rows)), jnp.full(n_fits, jnp.inf)
    start = {
        "weights": weights,
        "bias": bias,
        "logits": logits,
        "probabilities": jax.nn.softmax(logits, axis=1),
        "last": {"grad": (weights, bias), "direction": (weights, bias), "steepness": jnp.ones(n_fits)},
        "size": infinite,
        "least": infinite,
        "stalled": jnp.zeros(n_fits, jnp.int32),
        "active": jnp.ones(n_fits, bool),
        "iteration": 0,
    }
    found = jax.lax.while_loop(unfinished, iterate, start)
    return found["weights"], found["bias"], found["logits"], found["size"]


def features(
    model: "LoadedModel",
    texts: Sequence[str],
    tokenizer: "Tokenizer",
    max_length: int,
    forward: "Forward | None" = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    pooling: Pooling = "last",
) -> Float[np.ndarray, "layers n d"]:
    """States of each text: after the embedding, then after each block.

    Args:
      model: what `load_model` returns (its `config` and `params` are read).
      texts: raw texts, without template or special tokens.
      tokenizer: the model's.
      max_length: in tokens; a longer text loses its end.
      forward: how to run the model; None for one device, in float32.
      tokens_per_batch: read at once, with padding; at least one text per row shard.
      pooling: "last" for the state of the last token, "mean" for the mean over the tokens.
    Returns:
      float32 [n_layers + 1, len(texts), d_model].
    Raises:
      ValueError: there are no texts, or a text has no token.
    """
    from plasticity_jax.model.forward import Forward

    rows = _tokenize(texts, tokenizer, max_length)
    return _states(model, rows, tokenizer.pad_id, forward or Forward("float32"), tokens_per_batch, pooling)


def _tokenize(texts: Sequence[str], tokenizer: "Tokenizer", max_length: int) -> list[list[int]]:
    if len(texts) == 0:
        raise ValueError("texts is empty; give at least one text.")
    rows = [ids[:max_length] for ids in tokenizer.encode_batch(texts)]
    empty = [i for i, ids in enumerate(rows) if not ids]
    if empty:
        raise ValueError(f"texts[{empty[0]}]={texts[empty[0]]!r} has no token; leave such texts out.")
    return rows


def _states(
    model: "LoadedModel", rows: list[list[int]], pad_id: int, forward: "Forward", tokens_per_batch: int, pooling: Pooling
) -> Float[np.ndarray, "layers n d"]:
    states_LxNxD = np.empty((model.config.n_layers + 1, len(rows), model.config.d_model), np.float32)
    padded = padded_batches(
        rows,
        buckets=power_of_two_buckets(rows, SHORTEST_BUCKET),
        tokens_per_batch=tokens_per_batch,
        multiple_of=forward.row_shards,
        pad_id=pad_id,
    )
    batches = ((batch.indices, {"tokens": batch.tokens, "lengths": batch.lengths}) for batch in padded)
    for indices, found_BxLxD in forward.run(
        _text_states, (model.config, pooling), model.params, batches, what="read states", total=len(rows), unit="texts"
    ):
        states_LxNxD[:, np.asarray(indices)] = found_BxLxD.swapaxes(0, 1)
    return states_LxNxD


def _text_states(forward: "Forward", config: ModelConfig, pooling: Pooling, params: dict, batch: Any) -> Float[Array, "B layers D"]:
    _, activations = forward.hidden_states(config, params, batch["tokens"], capture=("embed", "block_out"))
    embed_BxTxD, blocks_LxBxTxD = activations["embed"], activations["block_out"]
    if pooling == "mean":
        positions_T = jnp.arange(embed_BxTxD.shape[1])
        share_BxT = (positions_T < batch["lengths"][:, None]) / jnp.maximum(batch["lengths"], 1)[:, None]
        embed_BxD = jnp.sum(embed_BxTxD.astype(jnp.float32) * share_BxT[..., None], axis=1)
        blocks_LxBxD = jnp.sum(blocks_LxBxTxD.astype(jnp.float32) * share_BxT[..., None], axis=2)
    else:
        last_Bx1x1 = jnp.maximum(batch["lengths"] - 1, 0)[:, None, None]
        embed_BxD = jnp.take_along_axis(embed_BxTxD, last_Bx1x1, axis=1)[:, 0]
        blocks_LxBxD = jnp.take_along_axis(blocks_LxBxTxD, last_Bx1x1[None], axis=2)[:, :, 0]
    return jnp.concatenate([embed_BxD[None], blocks_LxBxD]).swapaxes(0, 1).astype(jnp.float32)


def longest_batch(forward: "Forward", length: int, tokens_per_batch: int) -> tuple[int, int]:
    """Rows and length of the batches of texts of up to `length` tokens."""
    longest = power_of_two_buckets([range(length)], SHORTEST_BUCKET)[-1]
    return forward.batch_size(max(1, tokens_per_batch // longest)), longest


def lower_states(forward: "Forward", config: ModelConfig, params: dict, length: int, tokens_per_batch: int, pooling: Pooling) -> Any:
    """The program of `features` for texts of up to `length` tokens, lowered for the mesh's devices."""
    rows, longest = longest_batch(forward, length, tokens_per_batch)
    return forward.lower(_text_states, (config, pooling), params, {"tokens": (rows, longest), "lengths": (rows,)})


def _unit_norm(states_LxNxD: np.ndarray) -> np.ndarray:
    return states_LxNxD / np.maximum(np.linalg.norm(states_LxNxD, axis=-1, keepdims=True), np.finfo(np.float32).tiny)


def bag_of_words(tokens: Sequence[Sequence[int]], n_train: int) -> Float[np.ndarray, "n words"]:
    """log(1 + count) of tokens in each text, for the `BAG_OF_WORDS` most common tokens of the first `n_train` texts; ties go to the smaller id."""
    common = Counter(token for text in tokens[:n_train] for token in text)
    words = sorted(common, key=lambda token: (-common[token], token))[:BAG_OF_WORDS]
    column = {token: i for i, token in enumerate(words)}
    counts = np.zeros((len(tokens), len(words)), np.float32)
    for row, text in zip(counts, tokens):
        np.add.at(row, [column[token] for token in text if token in column], 1)
    return np.log1p(counts)


@functools.lru_cache(maxsize=16)
def _accuracy_of_words(tokens: tuple[tuple[int, ...], ...], y_train: tuple, y_test: tuple, l2: tuple[float, ...], seed: int) -> float:
    """Accuracy of a probe on `bag_of_words`: fitted once for all models that read a set with one tokenizer."""
    words_NxV = bag_of_words(tokens, len(y_train))
    return fit_probe(words_NxV[: len(y_train)], y_train, words_NxV[len(y_train) :], y_test, l2=l2, seed=seed).accuracy


def probe_layers(
    model: "LoadedModel",
    name: str,
    rows: dict,
    *,
    forward: "Forward",
    max_length: int,
    l2: Sequence[float],
    seed: int,
    tokens_per_batch: int,
    pooling: Pooling,
) -> dict:
    """Probes every layer of a model on one probe set, with two controls.

    Args:
      name: of the set, for the progress.
      rows: of the set, as `read_probe_set` gives them.
      forward: how to run the model. With several processes, all call this; the probes are fitted on the first.
      max_length: tokens; a longer text loses its end.
      l2: as in `fit_probe`.
      seed: of the validation split, and of the shuffled labels.
      tokens_per_batch, pooling: as in `features`.
    Returns:
      On the first process (empty on the others): layers ("embed", "block1", ...); per layer, accuracy, accuracy_norm_free (features divided by their
      norm), accuracy_shuffled (fitted to training labels in random order), per_class, l2, and correct ([n_test], 1 where right); bag_of_words
      (accuracy of a probe on `bag_of_words` of the texts), majority (accuracy of always giving the most common test label), n_train, n_test, classes,
      dropped_leaks.
    """
    from plasticity_jax.progress import Progress

    texts = [text for split in ("train", "test") for text, _ in rows[split]]
    n_train = len(rows["train"])
    y_train, y_test = ([label for _, label in rows[split]] for split in ("train", "test"))
    tokens = _tokenize(texts, model.text_tokenizer, max_length)
    states_LxNxD = _states(model, tokens, model.text_tokenizer.pad_id, forward, tokens_per_batch, pooling)
    if not processes.primary():
        return {}
    layers = ["embed"] + [f"block{i + 1}" for i in range(len(states_LxNxD) - 1)]

    def fit(x_LxNxD, labels):
        return fit_probes(x_LxNxD[:, :n_train], labels, x_LxNxD[:, n_train:], y_test, l2=l2, seed=seed, standardize=True)

    with Progress(f"probe {name}", total=3 * len(layers) + 1, unit="probes") as progress:
        probes = fit(states_LxNxD, y_train)
        progress.update(len(layers), note=f"accuracy {max(probe.accuracy for probe in probes):.3f}")
        norm_free = fit(_unit_norm(states_LxNxD), y_train)
        progress.update(len(layers))
        shuffled = fit(states_LxNxD, np.random.default_rng(seed).permutation(y_train))
        progress.update(len(layers))
        by_words = _accuracy_of_words(tuple(map(tuple, tokens)), tuple(y_train), tuple(y_test), tuple(l2), seed)
        progress.update(1)
    return {
        "layers": layers,
        "accuracy": [probe.accuracy for probe in probes],
        "accuracy_norm_free": [probe.accuracy for probe in norm_free],
        "accuracy_shuffled": [probe.accuracy for probe in shuffled],
        "per_class": [probe.per_class for probe in probes],
        "l2": [probe.l2 for probe in probes],
        "correct": [probe.correct.astype(int).tolist() for probe in probes],
        "bag_of_words": by_words,
        "majority": rows["majority_share"],
        "n_train": n_train,
        "n_test": len(y_test),
        "classes": list(rows["labels"]),
        "dropped_leaks": rows["dropped_leaks"],
    }
