"""Singular values of W_QK and W_VO for every attention head, statistics of them, and the norm that noise alone would give."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from plasticity_jax.config import ModelConfig
from plasticity_jax.parallel import arrays

if TYPE_CHECKING:
    from plasticity_jax.model.load import LoadedModel


def attention_spectra(model: "LoadedModel | tuple[ModelConfig, dict]", fold_norms: bool = False) -> dict[str, Float[np.ndarray, "layer head rank"]]:
    """Singular values of W_Q[h] W_K[g]^T and W_V[g] W_O[h] for every query head h with its key-value head g.

    A B^T has the singular values of R_A R_B^T, where R_A and R_B come from QR decompositions of A and B, so no d_model x d_model matrix is formed. The
    rotary embedding, which depends on the position, is left out.

    Args:
      model: what `load_model` returns, or (config, params).
      fold_norms: multiply the gains of adjacent norms into the factors: the input norm (both sides of W_QK, the value side of W_VO) or, with
        post-norm, the output norm (the output side of W_VO); and the norms of queries and keys.
    Returns:
      "W_QK" and "W_VO", float32 [n_layers, n_heads, head_dim] each, descending along the last axis.
    Source: Kobayashi et al. 2024 (arXiv 2410.23819).
    """
    return {name: found["singular_values"] for name, found in attention_products(model, fold_norms).items()}


def attention_products(
    model: "LoadedModel | tuple[ModelConfig, dict]", fold_norms: bool = False
) -> dict[str, dict[str, Float[np.ndarray, "layer head *rank"]]]:
    """`attention_spectra` of the products A B^T, and what the factors A and B [d_model, head_dim] say of them.

    Args:
      model, fold_norms: as in `attention_spectra`.
    Returns:
      "W_QK" and "W_VO", each with "singular_values" [L, H, R] and, [L, H] each, float32: "left_norm" and "right_norm", the Frobenius norms of A and B;
      "balancedness", the Frobenius norm of A^T A - B^T B (0 for factors that L2 regularization has balanced); "unit_noise_norm", the root mean square
      of the product's Frobenius norm if all weights were independent with mean 0 and variance 1.
    Source: balancedness: Kobayashi et al. 2024 (arXiv 2410.23819), who write A and B transposed.
    """
    config, params, mesh = (*model, None) if isinstance(model, tuple) else (model.config, model.params, getattr(model, "mesh", None))
    return arrays.to_host(_products(config, params["blocks"], fold_norms, mesh))


def lower_spectra(config: ModelConfig, params: dict, fold_norms: bool, mesh: Mesh) -> Any:
    """The program of `attention_spectra`, lowered for the mesh's devices."""
    return _products.lower(config, params["blocks"], fold_norms, mesh)


@functools.partial(jax.jit, static_argnames=("config", "fold_norms", "mesh"))
@jax.default_matmul_precision("highest")
def _products(config: ModelConfig, blocks: dict, fold_norms: bool, mesh: Mesh | None) -> dict[str, dict[str, Float[Array, "layer head *rank"]]]:
    # W_O is transposed, because its head index is on the rows.
    factors = {name: jnp.asarray(blocks["attn"][name]["kernel"], jnp.float32) for name in ("q", "k", "v", "o")}
    factors["o"] = jnp.swapaxes(factors["o"], 1, 2)
    # Of factors whose weights have variance 1: mean squared norm of each column.
    columns = {name: jnp.full((len(x), x.shape[2]), x.shape[1], jnp.float32) for name, x in factors.items()}
    if fold_norms:
        gain_LxDx1 = blocks["attn_norm"]["scale"][..., None]
        for name in ("q", "k", "v") if config.norm_position == "pre" else ("o",):
            factors[name] = gain_LxDx1 * factors[name]
            columns[name] *= jnp.mean(gain_LxDx1**2, axis=1)
        if config.qk_norm:
            for name in ("q", "k"):
                scale_LxHR = blocks["attn"][f"{name}_norm"]["scale"]
                factors[name] = factors[name] * scale_LxHR[:, None]
                columns[name] *= scale_LxHR**2
    heads = {"q": config.n_heads, "k": config.n_kv_heads, "v": config.n_kv_heads, "o": config.n_heads}
    # One decomposition after the other, of all factors and then of all products: on a CPU each waits for threads of the pool that it runs in, and two of
    # them at once can wait for each other forever (jaxlib 0.10.2).
    r_NxRxR = _each(mesh, _triangular, jnp.concatenate([_by_head(factors[name], n) for name, n in heads.items()]))
    ends = np.cumsum([config.n_layers * n for n in heads.values()])
    r = dict(zip(heads, jnp.split(r_NxRxR, ends[:-1])))
    r = {name: x.reshape(config.n_layers, heads[name], *x.shape[1:]) for name, x in r.items()}
    columns = {name: x.reshape(config.n_layers, heads[name], -1) for name, x in columns.items()}
    of_heads = {name: (r[name], columns[name]) for name in heads}
    for name in ("k", "v"):
        x, of_columns = (jnp.repeat(x, config.n_heads // config.n_kv_heads, axis=1) for x in of_heads[name])
        of_heads[name] = x, of_columns
    products, found = [], {}
    for product, a, b in (("W_QK", "q", "k"), ("W_VO", "v", "o")):
        (left, left_columns), (right, right_columns) = of_heads[a], of_heads[b]
        products.append((left @ jnp.swapaxes(right, -1, -2)).reshape(-1, config.head_dim, config.head_dim))
        found[product] = {
            "left_norm": _frobenius(left),
            "right_norm": _frobenius(right),
            "balancedness": _frobenius(jnp.swapaxes(left, -1, -2) @ left - jnp.swapaxes(right, -1, -2) @ right),
            "unit_noise_norm": jnp.sqrt(jnp.sum(left_columns * right_columns, axis=-1)),
        }
    singular_NxR = _each(mesh, lambda x: jnp.linalg.svd(x, compute_uv=False), jnp.concatenate(products))
    both = singular_NxR.reshape(2, config.n_layers, config.n_heads, -1)
    return {product: {"singular_values": both[i], **found[product]} for i, product in enumerate(found)}


def _frobenius(x: Float[Array, "*batch m n"]) -> Float[Array, "*batch"]:
    return jnp.sqrt(jnp.sum(x**2, axis=(-2, -1)))


def _triangular(x_NxDxR: Float[Array, "n d r"]) -> Float[Array, "n m r"]:
    """R of a QR decomposition of each matrix, by decomposing blocks of rows and then their stacked R.

    On a CPU a block stays in the cache, and LAPACK starts no threads for it: 3 to 18 times as fast for 2048 x 64 on two busy cores.
    Source: Demmel et al. 2012 (arXiv 0808.2664), TSQR.
    """
    while x_NxDxR.shape[1] > (rows := 2 * x_NxDxR.shape[2]):
        n, d, r = x_NxDxR.shape
        blocks = -(-d // rows)
        filled = jnp.pad(x_NxDxR, ((0, 0), (0, blocks * rows - d), (0, 0)))  # rows of zeros do not change R
        x_NxDxR = jnp.linalg.qr(filled.reshape(n * blocks, rows, r), mode="r").reshape(n, blocks * r, r)
    return jnp.linalg.qr(x_NxDxR, mode="r")


def _by_head(kernel_LxDxHR: Float[Array, "layer d_model features"], n_heads: int) -> Float[Array, "n d_model rank"]:
    n_layers, d_model, features = kernel_LxDxHR.shape
    factors_LxHxDxR = kernel_LxDxHR.reshape(n_layers, d_model, n_heads, features // n_heads).transpose(0, 2, 1, 3)
    return factors_LxHxDxR.reshape(n_layers * n_heads, d_model, -1)


def _each(mesh: Mesh | None, function: Callable[[Array], Array], x: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
    """A function of every matrix of a stack; each device computes its part of them."""
    if mesh is None:
        return function(x)
    missing = -len(x) % mesh.size
    filled = jnp.concatenate([x, jnp.ones((missing, *x.shape[1:]), x.dtype)]) if missing else x
    over = PartitionSpec(tuple(mesh.axis_names))
    # Not checked: on TPUs the decompositions are loops whose first values do not vary over the mesh.
    return jax.shard_map(function, mesh=mesh, in_specs=over, out_specs=over, check_vma=False)(filled)[: len(x)]


def pseudo_rank(s: Float[ArrayLike, "*batch r"] | Sequence, mass: float = 0.95, power: int = 1) -> Float[np.ndarray, "*batch"]:
    """Fraction of the singular values needed to reach `mass` of their sum.

    Args:
      s: non-negative singular values, in descending order along the last axis.
      mass: fraction of the sum, in (0, 1].
      power: 1 sums the values, 2 their squares.
    Returns:
      Number of leading values needed, at least one, divided by r. In (0, 1]; 1/r for a rank-one matrix and for the zero matrix; NaN if a value is not
      finite.
    Raises:
      ValueError: `mass` or `power` is out of range, or the values are empty, negative or not in descending order.
    Source: Kobayashi et al. 2024 (arXiv 2410.23819), section on attention rank; threshold unverified.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass={mass} must lie in (0, 1]; 0.95 is usual.")
    if power not in (1, 2):
        raise ValueError(f"power={power} must be 1 (values) or 2 (squares).")
    s, finite = _checked(s)
    r = s.shape[-1]
    held = np.cumsum(_relative(s) ** power, axis=-1)
    # k of r equal values have exactly k/r of the sum; the slack covers the rounding of the sums only.
    needed = held[..., -1:] * mass * (1 - r * np.finfo(np.float64).eps)
    # Index of the first value that reaches the mass; 0 for the zero matrix.
    leading = np.argmax(held >= needed, axis=-1) + 1
    return np.where(finite, leading / r, np.nan)


def spectra_summary(s: Float[ArrayLike, "*batch r"] | Sequence) -> dict[str, Float[np.ndarray, "*batch"]]:
    """Norms and soft ranks of spectra.

    Args:
      s: as in `pseudo_rank`.
    Returns:
      "nuclear_norm" (sum), "frobenius_norm", "stable_rank" (squared Frobenius norm over squared spectral norm) and "effective_rank" (exponential of
      the entropy of the values normalized by their sum; Roy & Vetterli 2007). Both ranks lie in [1, r], or are 0 for the zero matrix. NaN if a value is
      not finite.
    Raises:
      ValueError: as in `pseudo_rank`.
    """
    s, finite = _checked(s)
    relative = _relative(s)
    share = relative / np.maximum(relative.sum(axis=-1, keepdims=True), 1.0)
    entropy = -np.sum(share * np.log(np.where(share > 0, share, 1.0)), axis=-1)
    summary = {
        "nuclear_norm": s.sum(axis=-1),
        "frobenius_norm": s[..., 0] * np.sqrt(np.sum(relative**2, axis=-1)),
        "stable_rank": np.sum(relative**2, axis=-1),
        "effective_rank": np.where(s[..., 0] > 0, np.exp(entropy), 0.0),
    }
    return {name: np.where(finite, values, np.nan) for name, values in summary.items()}


def noise_variance(learning_rates: Float[ArrayLike, "step"], shrinks: Float[ArrayLike, "step"], start: float = 0.0) -> float:
    """Variance of a weight that AdamW moves without direction: what is left at the end of updates whose gradients are noise.

    A weight w becomes (1 - shrink_t) w - learning_rate_t u_t. Adam's direction u_t has a root mean square of at most about 1; averaged over steps, as
    weights average them, white noise moves them as if u_t were independent with variance 1. So v becomes (1 - shrink_t)^2 v + learning_rate_t^2, whose
    fixed point at constant rates is about learning_rate / (2 λ). Weights that gradients move in one direction grow beyond it.

    Args:
      learning_rates, shrinks: of every step; the shrink is learning rate times λ where decay is coupled.
      start: variance before the first step, such as that of an earlier training; the initial weights do not count as noise.
    Source: the random-walk equilibrium of AdamW, Kosson et al. 2023 (arXiv 2305.17212), with a schedule.
    """
    rates, kept = np.asarray(learning_rates, np.float64), 1.0 - np.asarray(shrinks, np.float64)
    after = np.cumprod(np.append(kept, 1.0)[::-1] ** 2)[::-1]  # [T + 1] how much of a variance before step t is left at the end
    return float(start * after[0] + np.sum(rates**2 * after[1:]))


def noise_floor(product: dict[str, Float[np.ndarray, "layer head *rank"]], variance: float | None) -> Float[np.ndarray, "layer head"]:
    """Frobenius norm that a head's product must exceed for its pseudo-rank to mean anything.

    The larger of two norms: of a product of independent weights of the given variance, and the bound on the rounding of a float32 product of
    head_dim terms, head_dim · 2^-23 · ‖A‖ ‖B‖.

    Args:
      product: an entry of `attention_products`.
      variance: of weights that are noise, as `noise_variance` gives it; None where the optimizer is not known, as for a public model.
    Source: rounding: Higham, Accuracy and Stability of Numerical Algorithms, 3.5.
    """
    norms = {name: np.asarray(product[name], np.float64) for name in ("left_norm", "right_norm", "unit_noise_norm")}
    rounding = product["singular_values"].shape[-1] * np.finfo(np.float32).eps * norms["left_norm"] * norms["right_norm"]
    return np.maximum(rounding, (variance or 0.0) * norms["unit_noise_norm"])


def _checked(s: ArrayLike | Sequence) -> tuple[np.ndarray, np.ndarray]:
    """(float64 spectra, with non-finite spectra set to zero; which spectra are finite)."""
    s = np.asarray(s, np.float64)
    if s.ndim == 0 or s.shape[-1] == 0:
        raise ValueError(f"singular values have shape {s.shape}; the last axis must hold at least one.")
    finite = np.asarray(np.isfinite(s).all(axis=-1))
    s = np.where(finite[..., None], s, 0.0)
    if (s < 0).any():
        raise ValueError(f"singular value {s.min()} is negative; give singular values, not eigenvalues.")
    if (np.diff(s, axis=-1) > 0).any():
        raise ValueError("singular values must be in descending order along the last axis; sort them first.")
    return s, finite


def _relative(s: np.ndarray) -> np.ndarray:
    """Values divided by the largest, so that squares neither overflow nor underflow; zeros for the zero matrix."""
    largest = s[..., :1]
    return np.divide(s, largest, out=np.zeros_like(s), where=largest > 0)
