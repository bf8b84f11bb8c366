import jax
import jax.numpy as jnp
import numpy as np

from plasticity_jax.model import cross_entropy, token_losses

GENERATOR = np.random.default_rng(0)
LOGITS = GENERATOR.normal(0, 4, (3, 5, 11)).astype(np.float32)
TARGETS = GENERATOR.integers(0, 11, (3, 5))
MASK = GENERATOR.integers(0, 2, (3, 5))


def softmax_float64(logits):
    weights = np.exp(np.float64(logits) - np.float64(logits).max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_token_losses_equal_float64():
    expected = -np.log(np.take_along_axis(softmax_float64(LOGITS), TARGETS[..., None], -1)[..., 0])
    np.testing.assert_allclose(token_losses(jnp.asarray(LOGITS), jnp.asarray(TARGETS)), expected, rtol=1e-5, atol=1e-6)


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
