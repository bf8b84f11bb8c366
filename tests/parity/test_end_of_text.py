"""Special tokens and ends of generation against transformers 5 and 4, whose folders disagree about them in every way of tests/special_tokens.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from special_tokens import CASES, SPECIALS, tokenizer_folder
from test_transformers import CASES as MODELS
from test_transformers import theirs

from plasticity_jax.evaluate.generate import Sampling, generate
from plasticity_jax.model import load_model

pytestmark = pytest.mark.parity

SCRIPT = """
import json, sys, transformers
transformers.logging.set_verbosity_error()
found = {}
for folder in sys.argv[1:]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    try:
        ids = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:  # as a model's own constructor does where there is no such file
        ids = transformers.GenerationConfig.from_model_config(transformers.AutoConfig.from_pretrained(folder)).eos_token_id
    found[folder] = [tokenizer.eos_token, tokenizer.bos_token, ids]
print(json.dumps([transformers.__version__, found]))
"""


@pytest.mark.parametrize("version", ["5", "4"])
def test_the_cases_are_what_transformers_says(version, tmp_path):
    folders = {}
    for name, case in CASES.items():
        model = {"config.json": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "eos_token_id": None, "bos_token_id": None}}
        files = {key: model.get(key, {}) | content for key, content in (model | case.files).items()}
        files["tokenizer_config.json"] = {"tokenizer_class": "PreTrainedTokenizerFast"} | files["tokenizer_config.json"]
        folders[str(tokenizer_folder(tmp_path / str(len(folders)), files))] = case
    path = {} if version == "5" else {"PYTHONPATH": str(Path(sys.prefix) / "transformers4")}
    done = subprocess.run([sys.executable, "-c", SCRIPT, *folders], capture_output=True, text=True, env=os.environ | path, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    found_version, found = json.loads(done.stdout)
    assert found_version.split(".")[0] == version
    for folder, case in folders.items():
        eos, bos, ids = found[folder]
        assert (eos, bos) == (case.eos, case.bos), case
        assert (() if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)) == case.generation, case


def test_each_end_of_text_ends_a_text_as_in_transformers(tmp_path):
    folder = tmp_path / "hf"
    model = theirs(MODELS["llama"], folder)
    prompts = np.random.default_rng(1).integers(2, 200, (6, 5)).tolist()

    def generated(prompt):
        with torch.no_grad():
            row = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=0)[0, 5:].tolist()
        return row

    model.generation_config.eos_token_id = None
    free = [generated(prompt) for prompt in prompts]
    ends = [free[0][3], free[1][9], free[2][5]]
    model.generation_config.eos_token_id = ends
    model.generation_config.save_pretrained(folder)
    tokenizer_folder(folder, {"tokenizer_config.json": {"eos_token": "</s>"}})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = [generated(prompt) for prompt in prompts]
    ours = load_model(folder)
    assert ours.tokenizer.eos_ids == (SPECIALS["</s>"], *ends)
    assert not any(SPECIALS["</s>"] in row for row in expected), "which transformers would not stop at"
    made = generate(
        ours, prompts, sampling=Sampling(n_samples=0), max_new_tokens=24, buckets=(8,), batch_size=6, eos_id=ours.tokenizer.eos_ids, pad_id=0,
        compute_dtype=jnp.float32,
    )  # fmt: skip
    assert [tokens for [tokens] in made] == [row[:-1] if row[-1] in ends else row for row in expected]
    assert len({row[-1] for row in expected if len(row) < 24}) >= 2
