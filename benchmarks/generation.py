"""Sampling 16 completions of each of 32 prompts, beside `generate` of transformers: same weights, same dtype, same cores, in turns.

Command: python benchmarks/generation.py

A random Llama of 13 million parameters in float32, prompts of 128 tokens, 64 new tokens, no end of text, temperature 1.
"""

import json
import tempfile
from pathlib import Path

from side_by_side import Round, Side, finish, measure, serve

PROMPTS, SAMPLES, LENGTH, NEW = 32, 16, 128, 64
VOCABULARY = 8192
SHAPE = dict(vocab_size=VOCABULARY, d_model=320, n_layers=6, n_heads=5, n_kv_heads=5, d_ff=896)


def prompts(number=PROMPTS):
    import numpy as np

    return np.random.default_rng(0).integers(2, VOCABULARY, (number, LENGTH))


def by_transformers() -> Round:
    import torch
    import transformers

    from plasticity_jax.config import ModelConfig
    from plasticity_jax.model.hf_config import describe
    from plasticity_jax.model.hf_names import family_of

    config = ModelConfig(**SHAPE)
    torch.manual_seed(0)
    torch.set_num_threads(2)
    settings = describe(
        config, family_of(config), "float32", {"max_position_embeddings": 2048, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(settings))
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
    asked = torch.tensor(prompts())

    def one_round():
        with torch.no_grad():
            out = model.generate(
                asked,
                attention_mask=torch.ones(asked.shape, dtype=torch.long),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                num_return_sequences=SAMPLES,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                pad_token_id=0,
            )
        assert out[:, LENGTH:].numel() == PROMPTS * SAMPLES * NEW

    return one_round


def by_us() -> Round:
    from plasticity_jax.parallel.allocator import keep_freed_memory

    keep_freed_memory()
    import jax.numpy as jnp

    from plasticity_jax.config import ModelConfig
    from plasticity_jax.evaluate.generate import Sampling, generate
    from plasticity_jax.model.transformer import init_params

    config = ModelConfig(**SHAPE)
    params, asked = init_params(config, 0), prompts().tolist()

    def one_round():
        # No token has this id, so that every completion has all its tokens, as on the other side.
        made = generate(
            (config, params),
            asked,
            sampling=Sampling(n_samples=SAMPLES),
            max_new_tokens=NEW,
            buckets=(LENGTH,),
            batch_size=PROMPTS * SAMPLES,
            eos_id=VOCABULARY,
            pad_id=0,
            compute_dtype=jnp.float32,
        )
        assert sum(len(tokens) for of_prompt in made for tokens in of_prompt) == PROMPTS * SAMPLES * NEW

    return one_round


SIDES = {"transformers": Side(by_transformers, "extra"), "plasticity_jax": Side(by_us), "plasticity_jax, newest": Side(by_us, "newest")}


def main() -> None:
    found = measure(SIDES, rounds=3)
    rows = [
        one.row(side, found["transformers"]) | ({} if one.missing else {"tokens/s": PROMPTS * SAMPLES * NEW / one.median})
        for side, one in found.items()
    ]
    finish("Generation", {f"{PROMPTS} prompts x {SAMPLES} samples x {NEW} tokens": rows})


if __name__ == "__main__":
    serve(SIDES)
    main()
