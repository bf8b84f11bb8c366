import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plasticity_jax.config import ModelConfig, RopeScaling
from plasticity_jax.model import apply, cache, init_params

CONFIG = ModelConfig(vocab_size=40, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24)
OTHER = dataclasses.replace(CONFIG, norm_position="post", qk_norm=True, tie_embeddings=True, d_head=12, rope_scaling=RopeScaling(4.0, 1.0, 4.0, 32))
LENGTHS, PADDED, NEW, COPIES = (7, 1, 4), 7, 6, 2


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, 0)


@pytest.fixture(scope="module")
def sequences():
    """Per prompt, two continuations of it."""
    generator = np.random.default_rng(2)
    prompts = [generator.integers(0, 40, length) for length in LENGTHS]
    return [[np.concatenate([prompt, generator.integers(0, 40, NEW)]) for _ in range(COPIES)] for prompt in prompts]


def decoded(params, sequences, *, config=CONFIG, fill=0, slots=NEW, rubbish=0.0):
    """Logits of every new position by reading the prompts and decoding token by token: [1 + NEW, prompts, COPIES, V]."""
    tokens, valid = np.full((3, PADDED), fill), np.zeros((3, PADDED), bool)
    for row, (copies, length) in enumerate(zip(sequences, LENGTHS)):
        tokens[row, PADDED - length :], valid[row, PADDED - length :] = copies[0][:length], True
    new_NxB = np.stack([copy[-NEW:] for copies in sequences for copy in copies], axis=1)

    def all_steps(params, tokens, valid, new_NxB):
        first, prompt, rows = cache.read_prompts(config, params, tokens, valid, rows_per_prompt=COPIES, slots=slots, compute_dtype=jnp.float32)
        rows = cache.RowCache(*jax.tree.map(lambda x: x + rubbish, (rows.k, rows.v)), rows.position_B)

        def step(rows, token_and_slot):
            token_B, slot = token_and_slot
            logits, rows = cache.decode(config, params, token_B, slot, prompt, rows, compute_dtype=jnp.float32)
            return rows, logits

        rows, rest = jax.lax.scan(step, rows, (new_NxB, jnp.arange(NEW)))
        return first, rest, rows.position_B

    first, rest, position_B = jax.jit(all_steps)(params, tokens, valid, new_NxB)
    np.testing.assert_array_equal(position_B, np.repeat(LENGTHS, COPIES) + NEW)
    logits = np.concatenate([np.repeat(first, COPIES, axis=0)[None], rest])
    return logits.reshape(1 + NEW, len(LENGTHS), COPIES, -1)


@pytest.mark.parametrize("config", [CONFIG, OTHER], ids=["llama", "olmo2, tied, wide heads, scaled"])
def test_decoding_equals_the_full_forward(config, sequences):
    params = init_params(config, 0)
    logits = decoded(params, sequences, config=config)
    right_padded = np.stack([np.pad(copy, (0, PADDED + NEW - len(copy))) for copies in sequences for copy in copies])
    full = np.asarray(jax.jit(apply, static_argnums=0)(config, params, right_padded)[0]).reshape(len(LENGTHS), COPIES, PADDED + NEW, -1)
    for prompt, length in enumerate(LENGTHS):
        for copy in range(COPIES):
            expected = full[prompt, copy, length - 1 : length + NEW]
            np.testing.assert_allclose(logits[:, prompt, copy], expected, atol=1e-5, rtol=0)


def test_padding_tokens_change_nothing(params, sequences):
    np.testing.assert_array_equal(decoded(params, sequences, fill=0), decoded(params, sequences, fill=39))


def test_unused_slots_change_nothing(params, sequences):
    """A cache longer than needed, with rubbish in the slots not written yet, gives the same logits."""
    np.testing.assert_allclose(decoded(params, sequences, slots=NEW + 9, rubbish=1e4), decoded(params, sequences), atol=1e-5)
