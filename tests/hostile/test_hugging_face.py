"""Hugging Face folders that are damaged, or made to do harm: each is refused in one line, or is read; nothing is written."""

import json
import shutil
import struct
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutate import change_bytes, change_tree, files_below, within_limits

from plasticity_jax.cli import main
from plasticity_jax.model import load_model
from plasticity_jax.parallel import hardware

sys.path.append(str(Path(__file__).parents[1] / "model"))
from hf_folders import llama_tensors, write_folder  # noqa: E402

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with every kind of file: weights in two shards with their index, a tokenizer, its settings and a chat template."""
    from safetensors.numpy import save_file

    from plasticity_jax.data.tokenizer import Tokenizer

    folder = write_folder(tmp_path_factory.mktemp("hf") / "whole", rope_scaling=LLAMA3, bos_token_id=1, eos_token_id=[0])
    (folder / "model.safetensors").unlink()
    tensors = llama_tensors()
    shards = {"model-00001-of-00002.safetensors": list(tensors)[:8], "model-00002-of-00002.safetensors": list(tensors)[8:]}
    for name, of_shard in shards.items():
        save_file({tensor: tensors[tensor] for tensor in of_shard}, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": {tensor: name for name, of_shard in shards.items() for tensor in of_shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    Tokenizer.train(["the cat sees a dog " * 9, "some more words, and 12 numbers"], 290).save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "pad_token": {"content": "<|pad|>"}, "bos_token": None}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    load_model(folder)
    return folder


def change_header(content: bytes, random: Random) -> bytes:
    """A safetensors file with a header of another length, or with other shapes, types and offsets in it."""
    length = struct.unpack("<Q", content[:8])[0]
    if random.random() < 0.2:
        return struct.pack("<Q", random.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, len(content)))) + content[8:]
    header = json.dumps(change_tree(json.loads(content[8 : 8 + length]), random)).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def harm(folder: Path, random: Random) -> None:
    path = random.choice(sorted(folder.iterdir()))
    content, kind = path.read_bytes(), random.randrange(10)
    if kind == 0:
        path.unlink()
        random.choice(
            (lambda: None, path.mkdir, lambda: path.symlink_to("/dev/zero"), lambda: path.symlink_to(folder), lambda: path.write_bytes(b""))
        )()
    elif kind < 4:
        path.write_bytes(change_bytes(content, random))
    elif path.suffix == ".json":
        path.write_text(json.dumps(change_tree(json.loads(content), random)))
    elif path.suffix == ".safetensors":
        path.write_bytes(change_header(content, random))
    else:
        path.write_bytes(change_bytes(content, random))


@given(random=st.randoms(use_true_random=False))
def test_a_folder_that_was_changed(whole, tmp_path_factory, random: Random):
    work = tmp_path_factory.mktemp("hostile")
    folder = Path(shutil.copytree(whole, work / "folder"))
    try:
        harm(folder, random)
        before = files_below(work)
        with within_limits() as answered:
            answered(lambda: read_as_a_model(folder))
        assert files_below(work) == before
    finally:
        shutil.rmtree(work)


def read_as_a_model(folder):
    """All that is read of a folder before it is used: weights, tokenizer, and texts to and fro."""
    from plasticity_jax.config import StudyConfig
    from plasticity_jax.model.hf_import import import_run

    model = load_model(folder)
    import_run(folder, StudyConfig(name="import"))
    if model.tokenizer is not None:
        model.tokenizer.decode(model.tokenizer.encode("the cat \u00e9 12"))
        assert model.tokenizer.prefix_ids is not None and len(model.tokenizer.token_bytes) == model.tokenizer.vocab_size


@pytest.mark.parametrize(
    ("prompt", "words"), [("\udcff", "no valid text"), ("the cat sees a dog " * 4000, "give a shorter prompt"), ("", "--prompt is empty")]
)
def test_a_prompt_that_is_no_text_or_takes_more_than_the_memory(whole, monkeypatch, capsys, prompt, words):
    monkeypatch.setattr(hardware, "memory_of", lambda device: 2**30)
    assert main(["generate", "--model", str(whole), "--prompt", prompt]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert words in line
