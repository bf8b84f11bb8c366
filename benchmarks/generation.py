"""Sampling 16 completions of each of 32 prompts, beside `generate` of transformers: same weights, same dtype, same cores, in turns.

Command: python benchmarks/generation.py

A random Llama of 13 million parameters in float32, prompts of 128 tokens, 64 new tokens, no end of text, temperature 1. Each side gets one round
beforehand that does not count, in which ours compiles. Needs torch and transformers, from the environment that tests/environment makes; run
from another one, it starts itself again there.

On 2 idle CPU cores, transformers 5.23, jax 0.10.2: medians of 46.3 s against 14.0 s, 707 and 2,337 tokens/s, ratio 3.3.
"""

import importlib.util
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

ROUNDS = 3
PROMPTS, SAMPLES, LENGTH, NEW = 32, 16, 128, 64
PARITY = Path(__file__).resolve().parents[1] / ".venv-extra" / "bin" / "python"


def prepared(folder: Path) -> dict:
    """Name → function that generates all completions and returns how many tokens they have."""
    import jax.numpy as jnp
    import numpy as np
    import torch
    import transformers

    from plasticity_jax.config import ModelConfig
    from plasticity_jax.evaluate.generate import Sampling, generate
    from plasticity_jax.model.hf_config import describe
    from plasticity_jax.model.hf_names import family_of
    from plasticity_jax.model.load import load_model

    config = ModelConfig(vocab_size=8192, d_model=320, n_layers=6, n_heads=5, n_kv_heads=5, d_ff=896)
    settings = describe(
        config, family_of(config), "float32", {"max_position_embeddings": 2048, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    )
    (folder / "config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
    (folder / "config.json").unlink()
    reference.save_pretrained(folder)
    ours = load_model(folder)
    prompts = np.random.default_rng(0).integers(2, config.vocab_size, (PROMPTS, LENGTH))

    def by_transformers() -> int:
        with torch.no_grad():
            out = reference.generate(
                torch.tensor(prompts),
                attention_mask=torch.ones(prompts.shape, dtype=torch.long),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                num_return_sequences=SAMPLES,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                pad_token_id=0,
            )
        return out[:, LENGTH:].numel()

    def by_us() -> int:
        # No token has this id, so that every completion has all its tokens, as on the other side.
        made = generate(
            ours,
            prompts.tolist(),
            sampling=Sampling(n_samples=SAMPLES),
            max_new_tokens=NEW,
            buckets=(LENGTH,),
            batch_size=PROMPTS * SAMPLES,
            eos_id=config.vocab_size,
            pad_id=0,
            compute_dtype=jnp.float32,
        )
        return sum(len(tokens) for of_prompt in made for tokens in of_prompt)

    return {"transformers": by_transformers, "plasticity_jax": by_us}


def main() -> None:
    from plasticity_jax.parallel.allocator import keep_freed_memory

    keep_freed_memory()
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        sides = prepared(Path(folder))
        for round_ in range(ROUNDS + 1):
            for name, run in sides.items():
                start = time.perf_counter()
                assert run() == PROMPTS * SAMPLES * NEW
                if round_:
                    seconds.setdefault(name, []).append(time.perf_counter() - start)
    medians = {name: statistics.median(of_side) for name, of_side in seconds.items()}
    for name, median in medians.items():
        print(f"{name:<16}{median:8.2f} s {PROMPTS * SAMPLES * NEW / median:10,.0f} tokens/s")
    ratio = medians["transformers"] / medians["plasticity_jax"]
    print(f"ratio of medians: {ratio:.2f}")
    print(json.dumps({"seconds": seconds, "ratio": ratio}))


if __name__ == "__main__":
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        main()
    elif PARITY.is_file():
        os.execv(PARITY, [str(PARITY), __file__])
    else:
        print("needs torch and transformers: run `tests/environment extra` first")
