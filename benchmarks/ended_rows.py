"""Completions that end at very different places: with and without the ended rows' leaving the batch; and those that all end together.

Command: python benchmarks/ended_rows.py

A random Llama of 2.5 million parameters in float32, 8 prompts of 128 tokens, 8 completions of each. In the first table they have up to 512 tokens and
end about where answers to GSM8K do: median 120 tokens, log-normal, and one in fifty never. In the second all have 128 tokens, with and without the looks
between segments that leaving needs. On one core. Processor seconds count no time in which others had it.
"""

import functools
import os
import time

from side_by_side import Round, Side, finish, measure, serve

PROMPTS, EACH, LENGTH, LONG, TOGETHER = 8, 8, 128, 512, 128  # prompts, completions of each; tokens of a prompt, and most of a completion
VOCABULARY = 2048
SHAPE = dict(vocab_size=VOCABULARY, d_model=192, n_layers=4, n_heads=3, n_kv_heads=3, d_ff=512)


def answer_lengths():
    """Of 4,096 completions, in tokens."""
    import numpy as np

    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(120), 0.45, 4096)).astype(int)
    return np.where(rng.random(4096) < 0.02, LONG, lengths).tolist()


def of_long_completions(tokens: int, is_end, **constants) -> Round:
    """Completions of up to so many tokens, with other constants of the module."""
    from plasticity_jax.parallel.allocator import keep_freed_memory

    # Threads of several cores wait for one another at every product, and so for whatever else runs on any of them.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    keep_freed_memory()
    import jax.numpy as jnp
    import numpy as np

    from plasticity_jax.config import ModelConfig
    from plasticity_jax.evaluate import generate
    from plasticity_jax.model.transformer import init_params

    for name, value in constants.items():
        setattr(generate, name, value)
    config, decoded, continue_decoding = ModelConfig(**SHAPE), [0], generate.continue_decoding
    params, asked = init_params(config, 0), np.random.default_rng(0).integers(2, VOCABULARY, (PROMPTS, LENGTH)).tolist()

    def counted(plan, params, batch, *rest):
        decoded[0] += len(batch.limit_B) * generate.SEGMENT
        return continue_decoding(plan, params, batch, *rest)

    generate.continue_decoding = counted

    def one_round():
        decoded[0], start = 0, time.process_time()
        found = generate.completions(
            (config, params),
            asked,
            sampling=generate.Sampling(n_samples=EACH - 1, greedy_first=True),
            max_new_tokens=tokens,
            buckets=(LENGTH,),
            batch_size=PROMPTS * EACH,
            eos_id=VOCABULARY,
            pad_id=0,
            compute_dtype=jnp.float32,
            is_end=is_end,
        )
        kept = sum(len(row.tokens) for _, of_batch in found for of_prompt in of_batch for row in of_prompt)
        return {"processor seconds": time.process_time() - start, "tokens": kept} | (
            {"of ended rows, %": 100 * (1 - kept / decoded[0])} if is_end else {}
        )

    return one_round


def of_answers(**constants) -> Round:
    lengths = answer_lengths()
    return of_long_completions(LONG, lambda made: len(made) > 1 and len(made) >= lengths[(made[0] * 7919 + made[1]) % len(lengths)], **constants)


def of_one_end(**constants) -> Round:
    return of_long_completions(TOGETHER, None, **constants)


ANSWERS = {
    "ended rows stay": Side(functools.partial(of_answers, WORTH=LONG + 1)),
    "ended rows leave": Side(of_answers),
}
ONE_END = {
    "in one call": Side(functools.partial(of_one_end, SEGMENT=TOGETHER)),
    "in segments": Side(of_one_end),
}


def main() -> None:
    tables = {}
    for heading, sides in (
        (f"{PROMPTS} prompts x {EACH} completions of up to {LONG} tokens, which end about where answers to GSM8K do", ANSWERS),
        (f"{PROMPTS} prompts x {EACH} completions x {TOGETHER} tokens", ONE_END),
    ):
        found = measure(sides, rounds=5)
        tables[heading] = [one.row(side, found[next(iter(sides))]) for side, one in found.items()]
    finish("Ended rows", tables)


if __name__ == "__main__":
    serve(ANSWERS | ONE_END)
    main()
