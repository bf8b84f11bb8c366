"""Makes tests/golden/hf: small models as transformers wrote them, and the logits that it computes from them.

    .venv-extra/bin/python tests/golden/make_hf.py
    PYTHONPATH=.venv-extra/transformers4 .venv-extra/bin/python tests/golden/make_hf.py

The first, with transformers 5, writes <name>/model.safetensors, <name>/golden.npz and <name>/config-5.json; the second, with transformers 4,
<name>/config-4.json. The environment is what `tests/environment extra` makes.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent / "hf"
SHAPE = dict(vocab_size=300, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256,
             bos_token_id=None, eos_token_id=0, pad_token_id=None)  # fmt: skip
SCALING = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
VERSION = transformers.__version__.split(".")[0]


def rope(theta: float, scaling: dict | None = None) -> dict:
    if VERSION == "4":
        return {"rope_theta": theta, "rope_scaling": scaling}
    return {"rope_parameters": (scaling or {"rope_type": "default"}) | {"rope_theta": theta}}


MODELS = {
    "llama": (transformers.LlamaConfig(**SHAPE, num_key_value_heads=2, **rope(10000.0)), torch.float32),
    "llama-tied-scaled": (
        transformers.LlamaConfig(**SHAPE, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, **rope(10000.0, SCALING)),
        torch.bfloat16,
    ),
    "olmo2": (transformers.Olmo2Config(**SHAPE, **rope(500000.0)), torch.float16),
}


def main() -> None:
    for name, (config, dtype) in MODELS.items():
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for _, parameter in sorted(model.named_parameters()):
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape) if parameter.ndim == 1 else 0.2 * torch.randn(parameter.shape))
        folder = HERE / name
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as written:
            model.to(dtype).save_pretrained(written)
            shutil.copyfile(Path(written) / "config.json", folder / f"config-{VERSION}.json")
            if VERSION == "4":
                continue
            shutil.copyfile(Path(written) / "model.safetensors", folder / "model.safetensors")
            # Read again, because the model that was narrowed has narrowed rotary frequencies too.
            model = transformers.AutoModelForCausalLM.from_pretrained(written, use_safetensors=True, dtype=torch.float32).eval()
        tokens = np.random.default_rng(2).integers(0, SHAPE["vocab_size"], (2, 96)).astype(np.int32)
        with torch.no_grad():
            logits = model(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
        np.savez_compressed(folder / "golden.npz", tokens=tokens, positions=np.arange(5, 96, 10), logits=logits[:, 5::10])


main()
