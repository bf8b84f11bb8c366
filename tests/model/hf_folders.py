"""Hugging Face folders for tests, written with the safetensors library and by hand; nothing of the package under test is used."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parents[1] / "golden" / "hf"
NAMES = ("llama", "llama-tied-scaled", "olmo2")

VOCAB, WIDTH, LAYERS, HIDDEN = 320, 16, 2, 24
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
}


def golden_folder(name: str, version: int, folder: Path) -> Path:
    """A model as transformers of that version wrote it."""
    folder.mkdir()
    shutil.copyfile(GOLDEN / name / "model.safetensors", folder / "model.safetensors")
    shutil.copyfile(GOLDEN / name / f"config-{version}.json", folder / "config.json")
    return folder


def llama_tensors(dtype=np.float32) -> dict[str, np.ndarray]:
    """Random weights of LLAMA, with every kind of finite or infinite number among them."""
    generator = np.random.default_rng(0)

    def draw(*shape):
        return generator.normal(size=shape).astype(dtype)

    tensors = {"model.embed_tokens.weight": draw(VOCAB, WIDTH), "model.norm.weight": draw(WIDTH), "lm_head.weight": draw(VOCAB, WIDTH)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        tensors |= {
            f"{prefix}input_layernorm.weight": draw(WIDTH),
            f"{prefix}post_attention_layernorm.weight": draw(WIDTH),
            f"{prefix}self_attn.q_proj.weight": draw(WIDTH, WIDTH),
            f"{prefix}self_attn.k_proj.weight": draw(WIDTH // 2, WIDTH),
            f"{prefix}self_attn.v_proj.weight": draw(WIDTH // 2, WIDTH),
            f"{prefix}self_attn.o_proj.weight": draw(WIDTH, WIDTH),
            f"{prefix}mlp.gate_proj.weight": draw(HIDDEN, WIDTH),
            f"{prefix}mlp.up_proj.weight": draw(HIDDEN, WIDTH),
            f"{prefix}mlp.down_proj.weight": draw(WIDTH, HIDDEN),
        }
    smallest = 2.0**-149 if dtype == np.float32 else 2.0**-133 if dtype == ml_dtypes.bfloat16 else 2.0**-24
    tensors["model.norm.weight"][:4] = np.array([-0.0, np.inf, -np.inf, smallest], dtype)
    return tensors


def write_folder(folder: Path, tensors: dict[str, np.ndarray] | None = None, **settings) -> Path:
    """A whole folder; a setting of None is left out of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in (LLAMA | settings).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(llama_tensors() if tensors is None else tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def assert_same_tensors(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Names, types, shapes and every bit."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape), name
        assert actual[name].tobytes() == tensor.tobytes(), name
