"""Linear probes: how well a linear classifier predicts a label from the state of a text's last token, layer by layer."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from plasticity_jax.config import ModelConfig
from plasticity_jax.data.batching import padded_batches, power_of_two_buckets
from plasticity_jax.parallel import processes

if TYPE_CHECKING:
    from plasticity_jax.data.tokenizer import Tokenizer
    from plasticity_jax.model.forward import Forward
    from plasticity_jax.model.load import LoadedModel

VALIDATION_FRACTION = 0.2
MAX_ITERATIONS = 500
# Largest entry of the gradient; float32 resolves little less. Without a penalty, separable classes have no minimum and stop when they stall.
GRADIENT_TOLERANCE = 2e-6
STALLED_ITERATIONS = 8

SHORTEST_BUCKET = 16
TOKENS_PER_BATCH = 8192  # where nothing else is asked for


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

    Minimizes mean cross-entropy (nats) + 0.5 · l2 · ||W||² by L-BFGS in float32; the bias is not penalized. Chooses the penalty with the lowest
    cross-entropy on a validation split (a fifth of each class's training rows), then fits the probe again to all training rows.

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
    x_train, x_test = np.asarray(x_train, np.float64), np.asarray(x_test, np.float64)
    labels_train, labels_test = np.asarray(y_train), np.asarray(y_test)
    penalties = sorted({float(value) for value in l2}, reverse=True)
    _check_rows(x_train, labels_train, x_test, labels_test)
    if not penalties or penalties[-1] < 0:
        raise ValueError(f"l2={tuple(l2)} must hold at least one penalty, none negative.")
    classes, y_n = np.unique(labels_train, return_inverse=True)

    chosen, validation_loss = penalties[0], {}
    if len(penalties) > 1:
        held_n = _validation_rows(y_n, seed)
        validation_loss = _validation_losses(x_train, y_n, held_n, penalties, len(classes), standardize)
        # Ties go to the larger penalty, which comes first.
        chosen = min(validation_loss, key=validation_loss.__getitem__)
    mean, scale = _statistics(x_train, standardize)
    start = _zeros(x_train.shape[1], len(classes))
    (weights, bias), converged = _minimize((x_train - mean) / scale, y_n, np.ones(len(y_n)), chosen, start)
    predicted = classes[np.argmax((x_test - mean) / scale @ weights + bias, axis=-1)]
    correct = predicted == labels_test
    return ProbeResult(
        accuracy=float(correct.mean()),
        per_class={c.item(): float(correct[labels_test == c].mean()) for c in classes if (labels_test == c).any()},
        l2=chosen,
        correct=correct,
        classes=tuple(classes.tolist()),
        weights=weights,
        bias=bias,
        mean=mean,
        scale=scale,
        validation_loss=validation_loss,
        converged=converged,
    )


def _check_rows(x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> None:
    for side, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        if x.ndim != 2 or y.ndim != 1 or len(x) != len(y) or len(x) == 0:
            raise ValueError(f"x_{side} has shape {x.shape} and y_{side} {y.shape}; they must be [n, d] and [n] with n at least 1.")
        if not np.isfinite(x).all():
            raise ValueError(f"x_{side} has values that are not finite; leave out the model that gave them.")
    if x_train.shape[1] != x_test.shape[1]:
        raise ValueError(f"x_train has {x_train.shape[1]} features and x_test {x_test.shape[1]}; take both from the same layer.")
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


def _validation_losses(
    x: np.ndarray, y_n: np.ndarray, held_n: np.ndarray, penalties: list[float], n_classes: int, standardize: bool
) -> dict[float, float]:
    """Cross-entropy on the held-out rows for each penalty, from the largest down. Each fit starts from the previous one."""
    mean, scale = _statistics(x[~held_n], standardize)
    x = (x - mean) / scale
    losses, fitted = {}, _zeros(x.shape[1], n_classes)
    for penalty in penalties:
        # Held-out rows get weight 0 instead of being removed: all fits to a data set have one shape and compile once.
        fitted, _ = _minimize(x, y_n, ~held_n, penalty, fitted)
        logits = x[held_n] @ fitted[0] + fitted[1]
        largest = logits.max(axis=-1, keepdims=True)
        log_sum = largest[:, 0] + np.log(np.exp(logits - largest).sum(axis=-1))
        losses[penalty] = float(np.mean(log_sum - logits[np.arange(len(logits)), y_n[held_n]]))
    return losses


def _statistics(x: np.ndarray, standardize: bool) -> tuple[np.ndarray, np.ndarray]:
    if not standardize:
        return np.zeros(x.shape[1]), np.ones(x.shape[1])
    mean, scale = x.mean(axis=0), x.std(axis=0)
    # The deviation of a constant feature is the rounding error of its mean; dividing by it would turn the feature into noise.
    return mean, np.where(scale > 1e-9 * np.maximum(np.abs(mean), 1e-30), scale, 1.0)


def _zeros(d: int, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((d, n_classes)), np.zeros(n_classes)


def _minimize(x: np.ndarray, y_n: np.ndarray, rows_n: np.ndarray, l2: float, start: tuple) -> tuple[tuple[np.ndarray, np.ndarray], bool]:
    """((weights, bias) in float64, whether the fit reached the gradient tolerance)."""
    as_float32 = functools.partial(np.asarray, dtype=np.float32)
    params, gradient = _lbfgs(as_float32(x), y_n.astype(np.int32), as_float32(rows_n), as_float32(l2), tuple(map(as_float32, start)))
    weights, bias = (np.asarray(p, np.float64) for p in params)
    return (weights, bias), bool(gradient <= GRADIENT_TOLERANCE)


@jax.jit
@jax.default_matmul_precision("highest")
def _lbfgs(
    x_NxD: Float[Array, "n d"], y_N: Int[Array, " n"], rows_N: Float[Array, " n"], l2: Float[Array, ""], start: tuple[Array, Array]
) -> tuple[tuple[Array, Array], Float[Array, ""]]:
    def objective(params):
        weights_DxC, bias_C = params
        losses_N = optax.softmax_cross_entropy_with_integer_labels(x_NxD @ weights_DxC + bias_C, y_N)
        return losses_N @ rows_N / rows_N.sum() + 0.5 * l2 * jnp.sum(weights_DxC**2)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def unfinished(carry):
        _, _, _, gradient, stalled, iteration = carry
        return (gradient > GRADIENT_TOLERANCE) & (stalled < STALLED_ITERATIONS) & (iteration < MAX_ITERATIONS)

    def iterate(carry):
        params, state, lowest, _, stalled, iteration = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=objective)
        value, grad = optax.tree.get(state, "value"), optax.tree.get(state, "grad")
        stalled = jnp.where(value < lowest, 0, stalled + 1)
        return optax.apply_updates(params, updates), state, jnp.minimum(value, lowest), _largest(grad), stalled, iteration + 1

    params, _, _, gradient, _, _ = jax.lax.while_loop(unfinished, iterate, (start, solver.init(start), jnp.inf, jnp.inf, 0, 0))
    return params, gradient  # pyright: ignore[reportReturnType]


def _largest(tree) -> Float[Array, ""]:
    return jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)]))


def features(
    model: "LoadedModel",
    texts: Sequence[str],
    tokenizer: "Tokenizer",
    max_length: int,
    forward: "Forward | None" = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> Float[np.ndarray, "layers n d"]:
    """States at the last token of each text: after the embedding, then after each block.

    Args:
      model: what `load_model` returns (its `config` and `params` are read).
      texts: raw texts, without template or special tokens.
      tokenizer: the model's.
      max_length: in tokens; a longer text loses its end.
      forward: how to run the model; None for one device, in float32.
      tokens_per_batch: read at once, with padding; at least one text per row shard.
    Returns:
      float32 [n_layers + 1, len(texts), d_model].
    Raises:
      ValueError: there are no texts, or a text has no token.
    """
    from plasticity_jax.model.forward import Forward

    forward = forward or Forward("float32")
    if len(texts) == 0:
        raise ValueError("texts is empty; give at least one text.")
    rows = [ids[:max_length] for ids in tokenizer.encode_batch(texts)]
    empty = [i for i, ids in enumerate(rows) if not ids]
    if empty:
        raise ValueError(f"texts[{empty[0]}]={texts[empty[0]]!r} has no token; leave such texts out.")
    states_LxNxD = np.empty((model.config.n_layers + 1, len(rows), model.config.d_model), np.float32)
    padded = padded_batches(
        rows,
        buckets=power_of_two_buckets(rows, SHORTEST_BUCKET),
        tokens_per_batch=tokens_per_batch,
        multiple_of=forward.row_shards,
        pad_id=tokenizer.pad_id,
    )
    batches = ((batch.indices, {"tokens": batch.tokens, "lengths": batch.lengths}) for batch in padded)
    for indices, found_BxLxD in forward.run(_last_states, (model.config,), model.params, batches, what="read states", total=len(rows), unit="texts"):
        states_LxNxD[:, np.asarray(indices)] = found_BxLxD.swapaxes(0, 1)
    return states_LxNxD


def _last_states(forward: "Forward", config: ModelConfig, params: dict, batch: Any) -> Float[Array, "B layers D"]:
    _, activations = forward.hidden_states(config, params, batch["tokens"], capture=("embed", "block_out"))
    last_Bx1x1 = jnp.maximum(batch["lengths"] - 1, 0)[:, None, None]
    embed_BxD = jnp.take_along_axis(activations["embed"], last_Bx1x1, axis=1)[:, 0]
    blocks_LxBxD = jnp.take_along_axis(activations["block_out"], last_Bx1x1[None], axis=2)[:, :, 0]
    return jnp.concatenate([embed_BxD[None], blocks_LxBxD]).swapaxes(0, 1).astype(jnp.float32)


def longest_batch(forward: "Forward", length: int, tokens_per_batch: int) -> tuple[int, int]:
    """Rows and length of the batches of texts of up to `length` tokens."""
    longest = power_of_two_buckets([range(length)], SHORTEST_BUCKET)[-1]
    return forward.batch_size(max(1, tokens_per_batch // longest)), longest


def lower_states(forward: "Forward", config: ModelConfig, params: dict, length: int, tokens_per_batch: int) -> Any:
    """The program of `features` for texts of up to `length` tokens, lowered for the mesh's devices."""
    rows, longest = longest_batch(forward, length, tokens_per_batch)
    return forward.lower(_last_states, (config,), params, {"tokens": (rows, longest), "lengths": (rows,)})


def probe_layers(
    model: "LoadedModel", name: str, rows: dict, *, forward: "Forward", max_length: int, l2: Sequence[float], seed: int, tokens_per_batch: int
) -> dict:
    """Probes every layer of a model on one probe set.

    Args:
      name: of the set, for the progress.
      rows: of the set, as `read_probe_set` gives them.
      forward: how to run the model. With several processes, all call this; the probes are fitted on the first.
      max_length: tokens; a longer text loses its end.
      l2, seed: as in `fit_probe`.
      tokens_per_batch: as in `features`.
    Returns:
      On the first process (empty on the others): layers ("embed", "block1", ...); per layer, accuracy, accuracy_norm_free (features divided by their norm), per_class, l2, and correct ([n_test],
      1 where right); majority (accuracy of always giving the most common test label), n_train, n_test, classes, dropped_leaks.
    """
    from plasticity_jax.progress import Progress

    texts = [text for split in ("train", "test") for text, _ in rows[split]]
    n_train = len(rows["train"])
    y_train, y_test = ([label for _, label in rows[split]] for split in ("train", "test"))
    states_LxNxD = features(model, texts, model.text_tokenizer, max_length, forward, tokens_per_batch)
    if not processes.primary():
        return {}
    layers = ["embed"] + [f"block{i + 1}" for i in range(len(states_LxNxD) - 1)]
    fit = functools.partial(fit_probe, l2=l2, seed=seed)
    probes, norm_free = [], []
    with Progress(f"probe {name}", total=2 * len(layers), unit="probes") as progress:
        for x_NxD in states_LxNxD:
            probes.append(fit(x_NxD[:n_train], y_train, x_NxD[n_train:], y_test))
            progress.update(1, note=f"accuracy {probes[-1].accuracy:.3f}")
            unit_NxD = x_NxD / np.maximum(np.linalg.norm(x_NxD, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
            norm_free.append(fit(unit_NxD[:n_train], y_train, unit_NxD[n_train:], y_test))
            progress.update(1)
    return {
        "layers": layers,
        "accuracy": [probe.accuracy for probe in probes],
        "accuracy_norm_free": [probe.accuracy for probe in norm_free],
        "per_class": [probe.per_class for probe in probes],
        "l2": [probe.l2 for probe in probes],
        "correct": [probe.correct.astype(int).tolist() for probe in probes],
        "majority": rows["majority_share"],
        "n_train": n_train,
        "n_test": len(y_test),
        "classes": list(rows["labels"]),
        "dropped_leaks": rows["dropped_leaks"],
    }
