"""Sampling 16 completions of each of 32 prompts, beside `generate` of transformers and vLLM: same network, same dtype, same cores, in turns.

Command: python benchmarks/generation.py

A random Llama of 13 million parameters in float32, prompts of 128 tokens, 64 new tokens, no end of text, temperature 1.
"""

import tempfile

from side_by_side import ENVIRONMENTS, Round, Side, finish, measure, serve
from train_step import torch_config

PROMPTS, SAMPLES, LENGTH, NEW = 32, 16, 128, 64
VOCABULARY = 8192
SHAPE = dict(vocab_size=VOCABULARY, d_model=320, n_layers=6, n_heads=5, n_kv_heads=5, d_ff=896)


def prompts(number=PROMPTS):
    import numpy as np

    return np.random.default_rng(0).integers(2, VOCABULARY, (number, LENGTH))


def torch_model():
    import torch
    import transformers

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(torch_config(SHAPE)).eval()


def by_transformers() -> Round:
    import torch

    torch.set_num_threads(2)
    model = torch_model()
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


def by_vllm() -> Round:
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        torch_model().save_pretrained(folder)
        model = LLM(folder, skip_tokenizer_init=True, dtype="float32", max_model_len=LENGTH + NEW, max_num_seqs=PROMPTS * SAMPLES)
    sampling = SamplingParams(n=SAMPLES, temperature=1.0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts().tolist()]

    def one_round():
        made = model.generate(asked, sampling, use_tqdm=False)
        assert sum(len(one.token_ids) for of_prompt in made for one in of_prompt.outputs) == PROMPTS * SAMPLES * NEW

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


# vLLM keeps a core for itself unless told not to, and runs best with the OpenMP that it brings.
VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "LD_PRELOAD": str(ENVIRONMENTS["vllm"][0].parents[1] / "lib/libiomp5.so"),
}
SIDES = {
    "transformers": Side(by_transformers, "extra"),
    "vLLM": Side(by_vllm, "vllm", VLLM),
    "plasticity_jax": Side(by_us),
    "plasticity_jax, newest": Side(by_us, "newest"),
}


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
