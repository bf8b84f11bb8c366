"""Folders that transformers makes itself, through a study of models that exist: the held-out loss is transformers' own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from running import plasticity
from tiny_models import write_tokenizer

from plasticity_jax.data.loader import TokenRecords
from plasticity_jax.report.results import collect

pytestmark = pytest.mark.parity

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
CONFIG = """
from plasticity_jax.config import base_config

def get_config():
    config = base_config()
    config.name = "elsewhere"
    config.grid.axis = "family"
    config.grid.models = (("Llama", {llama!r}), ("OLMo-2", {olmo2!r}))
    config.data.sources = ()
    config.data.files = {text!r}
    config.data.held_out_fraction = 0.5
    config.data.workers = 1
    config.train.seq_len = 32
    config.train.held_out_tokens = 256
    config.train.compute_dtype = "float32"
    return config
"""


def saved(folder: Path, family: str) -> transformers.PreTrainedModel:
    folder.mkdir()
    torch.manual_seed(5)
    vocab_size = write_tokenizer(folder, 10)
    config = {"llama": transformers.LlamaConfig, "olmo2": transformers.Olmo2Config}[family](vocab_size=vocab_size, **SHAPE)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    return model


def test_held_out_losses_of_folders_that_transformers_made(tmp_path):
    models = {name: saved(tmp_path / family, family) for name, family in (("Llama", "llama"), ("OLMo-2", "olmo2"))}
    draw = np.random.default_rng(1)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "own.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(draw.choice(["sea", "hut", "ore"], 50))}) + "\n" for _ in range(30))
    )
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(llama=str(tmp_path / "llama"), olmo2=str(tmp_path / "olmo2"), text=str(tmp_path / "text")))
    done = plasticity("study", "--config", config, "--workdir", tmp_path / "work", "--stages", "import,prepare,held_out")
    assert done.returncode == 0, done.stderr
    results = collect(tmp_path / "work" / "elsewhere")
    (corpus,) = {s.run.parents["corpus"] for s in results.runs if s.run.stage == "held_out"}
    records = TokenRecords(results.path / corpus / "tokens", "held_out")
    tokens = torch.tensor(records.tokens(range(8)).astype(np.int64))
    for member in results.members:
        with torch.no_grad():
            logits = models[member.point](tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        assert member.loss == pytest.approx(float(loss), rel=1e-5)
