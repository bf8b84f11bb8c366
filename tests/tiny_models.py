"""Hugging Face folders of tiny random models with a tokenizer, as another lab would hand them out; written by hand and by the tokenizers library."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

WIDTH, HIDDEN, LAYERS = 16, 32, 2
ARCHITECTURES = {"llama": "LlamaForCausalLM", "olmo2": "Olmo2ForCausalLM"}


def tiny_model(folder: Path, family: str = "llama", *, seed: int = 0, merges: int = 20) -> Path:
    """A folder with config.json, model.safetensors, tokenizer.json, and tokenizer_config.json."""
    folder.mkdir(parents=True)
    vocab_size = write_tokenizer(folder, merges)
    settings = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(tensors(family, vocab_size, seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_tokenizer(folder: Path, merges: int) -> int:
    """A byte-level BPE that joins this many pairs of letters; its number of entries."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    pairs = [(a, b) for a in "etaoin" for b in "shrdlu"][:merges]
    vocab = {symbol: i for i, symbol in enumerate([*symbols, *(a + b for a, b in pairs)])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}))
    return len(vocab)


def tensors(family: str, vocab_size: int, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return (0.1 * generator.normal(size=shape)).astype(np.float32)

    ones = np.ones(WIDTH, np.float32)
    found = {"model.embed_tokens.weight": draw(vocab_size, WIDTH), "model.norm.weight": ones, "lm_head.weight": draw(vocab_size, WIDTH)}
    norms = {
        "llama": ("input_layernorm", "post_attention_layernorm"),
        "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm", "self_attn.q_norm", "self_attn.k_norm"),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}{name}.weight": ones.copy() for name in norms[family]}
        found |= {f"{prefix}self_attn.{name}_proj.weight": draw(WIDTH, WIDTH) for name in "qkvo"}
        found |= {f"{prefix}mlp.{name}_proj.weight": draw(HIDDEN, WIDTH) for name in ("gate", "up")}
        found[f"{prefix}mlp.down_proj.weight"] = draw(WIDTH, HIDDEN)
    return found
