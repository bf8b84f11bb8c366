"""Random small models of both families against transformers: what it wrote, read here, and what is written here, read by its versions 5 and 4."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from plasticity_jax.config import ModelConfig, RopeScaling, StudyConfig
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.model import Checkpoints, apply, init_params, load_model
from plasticity_jax.model.hf_config import describe
from plasticity_jax.model.hf_export import export_model
from plasticity_jax.model.hf_import import import_folder
from plasticity_jax.model.hf_names import family_of
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.runs.run import Run

pytestmark = pytest.mark.parity

HERE = Path(__file__).parent
SMALL = dict(vocab_size=330, d_model=48, n_layers=3, n_heads=6, n_kv_heads=2, d_ff=80)
CASES = {
    "llama": ModelConfig(**SMALL),
    "llama-wide-heads": ModelConfig(**SMALL, d_head=12, norm_eps=1e-6),
    "llama-tied-scaled": ModelConfig(**SMALL, tie_embeddings=True, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32)),
    "olmo2": ModelConfig(**SMALL | {"n_kv_heads": 6}, norm_position="post", qk_norm=True, norm_eps=1e-6, rope_theta=500000.0, init="truncated"),
    "olmo2-grouped": ModelConfig(**SMALL, norm_position="post", qk_norm=True, init="truncated"),
}
LENGTH = 160  # five times the length that the scaled rotary positions start from
TOKENS = np.random.default_rng(7).integers(0, SMALL["vocab_size"], (2, LENGTH))
TEXTS = ["The 384,400 km to the Moon.", "  two spaces\n\nnewlines\t", "naïve café ☕ 漢字"]


def difference(ours, theirs) -> float:
    return float(np.max(np.abs(np.asarray(ours) - theirs)) / np.max(np.abs(theirs)))


def theirs(config: ModelConfig, folder: Path):
    """A model of transformers with random weights and gains, saved by it."""
    folder.mkdir()
    settings = describe(
        config, family_of(config), "float32", {"max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    )
    (folder / "config.json").write_text(json.dumps(settings))
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(1 + 0.3 * torch.randn(parameter.shape) if parameter.ndim == 1 else 4 * parameter)
    (folder / "config.json").unlink()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", CASES)
def test_an_import_computes_what_transformers_does_and_so_do_its_gradients(name, tmp_path):
    model = theirs(CASES[name], tmp_path / "hf")
    loaded = load_model(tmp_path / "hf")
    assert dataclasses.replace(loaded.config, init=CASES[name].init) == CASES[name] and loaded.tokenizer is None
    output = model(torch.tensor(TOKENS), labels=torch.tensor(TOKENS))
    logits, _ = loaded(TOKENS, capture=())
    assert difference(logits, output.logits.detach().numpy()) < 1e-4
    if CASES[name].rope_scaling is not None:
        unscaled = apply(dataclasses.replace(loaded.config, rope_scaling=None), loaded.params, TOKENS)[0]
        assert difference(unscaled, output.logits.detach().numpy()) > 1e-2, "the scaling does not matter at these lengths"

    def loss(params):
        logits, _ = apply(loaded.config, params, TOKENS)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), TOKENS[:, 1:, None], axis=-1)
        return -jnp.mean(chosen)

    value, gradient = jax.jit(jax.value_and_grad(loss))(loaded.params)
    output.loss.backward()
    assert abs(float(value) - output.loss.item()) < 1e-5 * output.loss.item()
    q = model.model.layers[1].self_attn.q_proj.weight.grad.numpy().T
    assert difference(gradient["blocks"]["attn"]["q"]["kernel"][1], q) < 1e-4
    assert difference(gradient["embed"]["embedding"], model.model.embed_tokens.weight.grad.numpy()) < 1e-4


@pytest.mark.parametrize("name", ["llama", "olmo2"])
@pytest.mark.parametrize(
    "settings",
    [
        {"sliding_window": 16},
        {"sliding_window": 16, "use_sliding_window": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "factor": 8.0, "attention_factor": 2.0}},
    ],
)
def test_settings_that_transformers_does_not_read_change_nothing_here_either(name, settings, tmp_path):
    theirs(CASES[name], tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    settings = {key: value | {"rope_theta": CASES[name].rope_theta} if isinstance(value, dict) else value for key, value in settings.items()}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | settings))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS)).logits.numpy()
    assert difference(load_model(tmp_path / "hf")(TOKENS, capture=())[0], expected) < 1e-4


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Of every case: our initial parameters with random gains, exported from a run with a tokenizer; and of one case, in bfloat16."""
    folder = tmp_path_factory.mktemp("exports")
    tokenizer = Tokenizer.train(["In 1969 the first people landed on the Moon, 384,400 kilometres away from the Earth. " * 9], 300)
    made = {}
    for name, config in CASES.items():
        params = init_params(config, 5)
        params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape) if x.ndim == 2 and x.shape[0] == 3 else 3 * x, params)
        run = RunDirectory(folder / f"{name}-run")
        with run.work(Run("study", "pretrain", "wd0", {"x": name}), StudyConfig(model=config)):
            with Checkpoints(run.path / "checkpoints") as checkpoints:
                checkpoints.save(0, params)
            tokenizer.save(run.path / "tokenizer.json")
            run.finish({})
        export_model(run.path, folder / name, None)
        made[folder / name] = load_model(run.path)
    export_model(folder / "llama-run", folder / "llama-bfloat16", "bfloat16")
    import_folder(folder / "llama-bfloat16", folder / "llama-bfloat16-run")
    export_model(folder / "llama-bfloat16-run", folder / "llama-bfloat16-again", None)
    made[folder / "llama-bfloat16-again"] = load_model(folder / "llama-bfloat16")
    return made, tokenizer


@pytest.mark.parametrize("version", ["5", "4"])
def test_transformers_loads_an_export_without_a_word_and_computes_the_same(exports, version):
    made, tokenizer = exports
    path = {} if version == "5" else {"PYTHONPATH": str(Path(sys.prefix) / "transformers4")}
    done = subprocess.run(
        [sys.executable, HERE / "reference.py", *made],
        input=json.dumps({"tokens": TOKENS.tolist(), "texts": TEXTS}),
        capture_output=True,
        text=True,
        env=os.environ | path,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout)
    assert answers["version"].split(".")[0] == version
    for folder, model in made.items():
        answer = answers[str(folder)]
        assert answer["said"] == "", answer
        assert not any(answer["info"].values()), answer
        assert answer["class"] == family_of(model.config).architecture
        assert answer["dtype"] == ("torch.bfloat16" if "bfloat16" in folder.name else "torch.float32")
        logits, _ = model(TOKENS, capture=())
        assert difference(logits, np.load(f"{folder}-logits.npy")) < 1e-4, folder.name
        assert answer["ids"] == [tokenizer.encode(text) for text in TEXTS]
        assert (answer["eos"], answer["pad"], answer["size"]) == (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size)
        assert answer["eos_of_generation"] == tokenizer.eos_id
