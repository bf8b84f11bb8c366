import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plasticity_jax.model import masked_sum, token_losses, vocabulary_losses
from plasticity_jax.model.loss import chunks_that_fit

GENERATOR = np.random.default_rng(0)
LOGITS = GENERATOR.normal(0, 4, (3, 5, 11)).astype(np.float32)
TARGETS = GENERATOR.integers(0, 11, (3, 5))
MASK = GENERATOR.integers(0, 2, (3, 5))


def cross_entropy(logits, targets, mask):
    return masked_sum(token_losses(logits, targets)[0], mask)


def softmax_float64(logits):
    weights = np.exp(np.float64(logits) - np.float64(logits).max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_token_losses_equal_float64():
    losses, log_sums = token_losses(jnp.asarray(LOGITS), jnp.asarray(TARGETS))
    expected = -np.log(np.take_along_axis(softmax_float64(LOGITS), TARGETS[..., None], -1)[..., 0])
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(log_sums, np.log(np.exp(np.float64(LOGITS)).sum(-1)), rtol=1e-6)


def test_gradient_is_softmax_minus_one_hot_on_counted_targets_only():
    gradient = jax.grad(lambda logits: cross_entropy(logits, jnp.asarray(TARGETS), jnp.asarray(MASK))[0])(jnp.asarray(LOGITS))
    expected = (softmax_float64(LOGITS) - np.eye(11)[TARGETS]) * MASK[..., None]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_sums_and_counts_add_up_over_parts():
    """Halves of a batch, one of them padded, sum to the whole: accumulation and padding change nothing."""
    whole = cross_entropy(jnp.asarray(LOGITS), jnp.asarray(TARGETS), jnp.asarray(MASK))
    parts = [cross_entropy(jnp.asarray(LOGITS[rows]), jnp.asarray(TARGETS[rows]), jnp.asarray(MASK[rows])) for rows in ([0], [1, 2])]
    padded = cross_entropy(jnp.asarray(LOGITS), jnp.asarray(TARGETS), jnp.asarray(MASK * [[1], [0], [0]]))
    np.testing.assert_allclose(padded, parts[0], rtol=1e-6)
    np.testing.assert_allclose(whole, np.sum(parts, axis=0), rtol=1e-6)
    assert whole[1] == MASK.sum()


def test_large_logits_stay_finite():
    logits = jnp.asarray([[[1e4, -1e4, 0.0]]])
    loss, gradient = jax.value_and_grad(lambda x: cross_entropy(x, jnp.asarray([[1]]), jnp.ones((1, 1)))[0])(logits)
    assert loss == 2e4 and np.isfinite(gradient).all()


def test_gradient_of_the_log_normalizer():
    """d/dx of Σ w·log² Z, the z-loss, is 2 w log Z · softmax, beside a cross-entropy with weights of its own."""
    weights = GENERATOR.normal(size=(2, 3, 5))

    def mixed(logits):
        losses, log_sums = token_losses(logits, jnp.asarray(TARGETS))
        return jnp.sum(weights[0] * losses) + jnp.sum(weights[1] * jnp.square(log_sums))

    softmax, log_sums = softmax_float64(LOGITS), np.log(np.exp(np.float64(LOGITS)).sum(-1))
    expected = weights[0][..., None] * (softmax - np.eye(11)[TARGETS]) + (2 * weights[1] * log_sums)[..., None] * softmax
    np.testing.assert_allclose(jax.grad(mixed)(jnp.asarray(LOGITS)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunks", [2, 6, 12, 9])
def test_chunks_change_no_loss_and_no_gradient(chunks):
    """Also a number that does not divide the length (9 of 12 tokens: parts of 4)."""
    x, kernel = (jnp.asarray(GENERATOR.normal(size=shape), jnp.float32) for shape in ((2, 12, 8), (8, 30)))
    targets, weights = jnp.asarray(GENERATOR.integers(0, 30, (2, 12))), jnp.asarray(GENERATOR.normal(size=(2, 12)), jnp.float32)

    def total(x, kernel, chunks):
        losses, log_sums = vocabulary_losses(x, kernel, targets, compute_dtype=jnp.float32, chunks=chunks)
        return jnp.sum(weights * losses + 0.1 * log_sums**2)

    whole, of_parts = (jax.jit(jax.value_and_grad(total, argnums=(0, 1)), static_argnums=2)(x, kernel, c) for c in (1, chunks))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), of_parts, whole)


def test_chunks_never_hold_all_logits():
    """Memory of the gradient, from the compiler: 64 MB of logits [2, 256, 32768] whole, an eighth of that in 8 parts."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 256, 16), (16, 32768))]

    def total(x, kernel, chunks):
        return jnp.sum(vocabulary_losses(x, kernel, jnp.zeros((2, 256), jnp.int32), compute_dtype=jnp.float32, chunks=chunks)[0])

    def temporary(chunks):
        return jax.jit(jax.grad(total, argnums=(0, 1)), static_argnums=2).lower(*shapes, chunks).compile().memory_analysis().temp_size_in_bytes

    logits = 2 * 256 * 32768 * 4
    assert temporary(1) > logits
    assert temporary(8) < logits / 2


@pytest.mark.parametrize(
    "chunks, rows, seq_len, vocab_size, expected",
    [
        (0, 32, 128, 1024, 1),  # 16 MiB
        (0, 32, 2048, 32000, 32),  # 7.8 GiB: 31.25 parts of 256 MiB
        (0, 16, 96, 2**16, 2),  # 384 MiB
        (0, 4096, 2, 2**20, 2),  # none is enough: one position at a time
        (3, 32, 2048, 32000, 3),  # what is asked for stays
    ],
)
def test_logits_are_held_in_as_few_chunks_as_fit(chunks, rows, seq_len, vocab_size, expected):
    assert chunks_that_fit(chunks, rows=rows, seq_len=seq_len, vocab_size=vocab_size) == expected
