"""Loads folders with the transformers that is installed and writes what it computes: `reference.py FOLDER... < tokens.json > answers.json`.

A program of its own, because one process has one version of transformers. Logits go to FOLDER-logits.npy.
"""

import io
import json
import logging
import sys
import warnings

import numpy as np
import torch
import transformers


def main(folders: list[str]) -> None:
    warnings.simplefilter("error")
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("transformers").addHandler(handler)
    logging.getLogger("transformers").setLevel(logging.WARNING)
    inputs = json.load(sys.stdin)
    answers = {"version": transformers.__version__}
    for folder in folders:
        said.truncate(0)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, dtype="auto", output_loading_info=True)
        dtype = str(model.dtype)
        with torch.no_grad():
            logits = model.float().eval()(torch.tensor(inputs["tokens"])).logits
        np.save(f"{folder}-logits.npy", logits.numpy())
        answer = {"class": type(model).__name__, "dtype": dtype, "info": {key: list(value) for key, value in info.items()}}
        if inputs.get("texts"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            answer |= {
                "ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in inputs["texts"]],
                "eos": tokenizer.eos_token_id,
                "pad": tokenizer.pad_token_id,
                "size": len(tokenizer),
            }
        answers[folder] = answer | {"said": said.getvalue(), "eos_of_generation": model.generation_config.eos_token_id}
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
