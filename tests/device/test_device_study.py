"""On the accelerator that is here: generation, and the tiny study from nothing to its report."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plasticity_jax.cli import main
from plasticity_jax.config import ModelConfig
from plasticity_jax.evaluate.generate import Sampling, generate
from plasticity_jax.model.transformer import apply, init_params
from plasticity_jax.runs.jsonfiles import read_json, read_jsonl
from plasticity_jax.study.status import study_status

pytestmark = pytest.mark.device

TINY = Path(__file__).parents[2] / "configs" / "tiny.py"


def test_greedy_tokens_are_the_likeliest_by_a_full_forward_on_the_cpu():
    """Every token chosen here has, within rounding, the highest logit that the CPU finds for it in float32, given the tokens before it."""
    config = ModelConfig(vocab_size=300, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=128)
    params = init_params(config, 3)
    params["head"]["kernel"] = params["head"]["kernel"] * 8  # logits apart by more than their rounding
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 300, length).tolist() for length in (1, 5, 8, 16)]
    settings = dict(sampling=Sampling(n_samples=0), max_new_tokens=12, buckets=(8, 16), batch_size=4, eos_id=0, pad_id=1)
    completions = generate((config, params), prompts, **settings, compute_dtype=jnp.float32)
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        params = jax.device_put(params, cpu)
        for prompt, [completion] in zip(prompts, completions):
            assert completion
            logits = np.asarray(apply(config, params, np.array([prompt + completion]))[0][0])
            for position, token in enumerate(completion, len(prompt) - 1):
                assert logits[position].max() - logits[position, token] <= 0.05 * logits[position].std()


@pytest.mark.slow
def test_the_tiny_study_is_carried_out_with_the_kernel_of_this_device(tmp_path, wheels_dir):
    kernel = {"gpu": "cudnn", "tpu": "splash"}[jax.default_backend()]
    options = {"data.wheels": wheels_dir, "train.compute_dtype": "bfloat16", "train.attention": kernel}
    assert main(["study", "--config", str(TINY), "--workdir", str(tmp_path), *(f"--config.{name}={value}" for name, value in options.items())]) == 0
    rows = study_status(tmp_path)
    assert {row["state"] for row in rows} == {"done"}
    assert list(tmp_path.glob("*/report/*.html"))
    for row in rows:
        if row["stage"] == "pretrain":
            metrics = read_jsonl(Path(row["path"]) / "metrics.jsonl")
            losses = [entry["loss"] for entry in metrics if "loss" in entry]
            assert losses[0] == pytest.approx(np.log(512), abs=0.5) and losses[-1] < losses[0] - 0.1
            assert read_json(Path(row["path"]) / "provenance.json")["execution"]["train.attention"] == kernel
