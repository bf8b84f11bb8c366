import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plasticity_jax.config import ModelConfig
from plasticity_jax.model import apply, init_cache, init_params, repeat_cache
from plasticity_jax.model import cache as cache_module

CONFIG = ModelConfig(vocab_size=40, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24)
prefill, decode_step = (jax.jit(f, static_argnums=0) for f in (cache_module.prefill, cache_module.decode_step))
LENGTHS, PADDED, NEW = (7, 1, 4), 7, 6


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, 0)


@pytest.fixture(scope="module")
def sequences():
    generator = np.random.default_rng(2)
    return [generator.integers(0, 40, length + NEW) for length in LENGTHS]


def padded(sequences, fill):
    tokens, valid = np.full((3, PADDED), fill), np.zeros((3, PADDED), bool)
    for row, (sequence, length) in enumerate(zip(sequences, LENGTHS)):
        tokens[row, PADDED - length :], valid[row, PADDED - length :] = sequence[:length], True
    return jnp.asarray(tokens), jnp.asarray(valid)


def decoded(params, sequences, fill=0):
    """Logits of every new position by prefill and a scan of decode steps: [1 + NEW, B, V]."""
    tokens, valid = padded(sequences, fill)
    new_NxB = jnp.asarray(np.stack([s[-NEW:] for s in sequences], axis=1))
    first, cache = prefill(CONFIG, params, tokens, valid, init_cache(CONFIG, 3, PADDED + NEW, jnp.float32))

    def step(cache, token_and_slot):
        token_B, slot = token_and_slot
        logits, cache = decode_step(CONFIG, params, token_B, slot, cache)
        return cache, logits

    cache, rest = jax.lax.scan(step, cache, (new_NxB, PADDED + jnp.arange(NEW)))
    np.testing.assert_array_equal(cache.length_B, np.array(LENGTHS) + NEW)
    return np.concatenate([first[None], rest])


def test_decoding_equals_the_full_forward(params, sequences):
    logits = decoded(params, sequences)
    right_padded = np.stack([np.pad(sequence, (0, PADDED + NEW - len(sequence))) for sequence in sequences])
    full, _ = jax.jit(apply, static_argnums=0)(CONFIG, params, right_padded)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(logits[:, row], full[row, length - 1 : length + NEW], atol=1e-5, rtol=0)


def test_padding_tokens_change_nothing(params, sequences):
    np.testing.assert_array_equal(decoded(params, sequences, fill=0), decoded(params, sequences, fill=39))


def test_unused_slots_change_nothing(params, sequences):
    """A cache longer than needed, with rubbish in the slots not written yet, gives the same logits."""
    tokens, valid = padded(sequences, 0)
    token_B = jnp.asarray([3, 5, 7])
    _, tight = prefill(CONFIG, params, tokens, valid, init_cache(CONFIG, 3, PADDED + 1, jnp.float32))
    _, wide = prefill(CONFIG, params, tokens, valid, init_cache(CONFIG, 3, PADDED + 9, jnp.float32))
    wide = wide._replace(k_LxBxSxKxD=wide.k_LxBxSxKxD.at[:, :, PADDED:].set(1e4), v_LxBxSxKxD=wide.v_LxBxSxKxD.at[:, :, PADDED:].set(1e4))
    expected, _ = decode_step(CONFIG, params, token_B, PADDED, tight)
    actual, _ = decode_step(CONFIG, params, token_B, PADDED, wide)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_repeated_rows_continue_like_their_prompt(params, sequences):
    tokens, valid = padded(sequences, 0)
    _, cache = prefill(CONFIG, params, tokens, valid, init_cache(CONFIG, 3, PADDED + 1, jnp.float32))
    token_B = jnp.asarray([3, 5, 7])
    once, _ = decode_step(CONFIG, params, token_B, PADDED, cache)
    twice, _ = decode_step(CONFIG, params, jnp.repeat(token_B, 2), PADDED, repeat_cache(cache, 2))
    np.testing.assert_allclose(twice, np.repeat(once, 2, axis=0), atol=1e-5)
