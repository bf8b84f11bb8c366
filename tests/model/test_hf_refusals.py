"""What a Hugging Face folder can have wrong with it: refused in one line that names it, and nothing is left behind."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hf_folders import LLAMA, llama_tensors, write_folder
from safetensors.numpy import save_file

from plasticity_jax.cli import main
from plasticity_jax.config import ModelConfig
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.errors import UserError
from plasticity_jax.model import load_model
from plasticity_jax.model.hf_export import export_model
from plasticity_jax.model.hf_import import import_folder

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
Q = "model.layers.1.self_attn.q_proj.weight"


def refused(folder, tmp_path, capsys, *words) -> str:
    """Both ways to open the folder refuse it with the same line, which has the words; the command leaves nothing."""
    with pytest.raises(UserError) as caught:
        load_model(folder)
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line
    capsys.readouterr()
    assert main(["import", "--hf", str(folder), "--out", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.strip() == f"plasticity: {line}"
    assert not (tmp_path / "run").exists()
    return line


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"attention_bias": True}, ["attention_bias=True", "only False"]),
        ({"rms_norm_eps": 10**400}, ["rms_norm_eps=1000", "must be a positive number"]),
        ({"mlp_bias": True}, ["mlp_bias=True"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "only 'silu'"]),
        ({"attention_dropout": 0.1}, ["attention_dropout=0.1"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        ({"rope_interleaved": True}, ["rope_interleaved=True"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config={'bits': 4}"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "sliding_attention"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling.rope_type='linear'", "default and llama3"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ["'yarn'"]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}}, ["partial_rotary_factor=0.25"]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_theta": 5e5}, ["rope_theta=10000", "500000"]),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3}, ["rope_parameters and rope_scaling differ"]),
        ({"rope_scaling": LLAMA3 | {"factor": None}}, ["no rope_scaling.factor"]),
        ({"rope_scaling": LLAMA3 | {"beta_fast": 32}}, ["rope_scaling.beta_fast=32"]),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 5.0}}, ["low_freq_factor=5.0 must be below"]),
        ({"rope_scaling": "llama3"}, ["rope_scaling='llama3'"]),
        ({"architectures": ["MistralForCausalLM"]}, ["'MistralForCausalLM'", "LlamaForCausalLM, Olmo2ForCausalLM"]),
        ({"architectures": None, "model_type": "gpt2"}, ["'gpt2'", "LlamaForCausalLM, Olmo2ForCausalLM"]),
        ({"architectures": "MambaForCausalLM"}, ["'MambaForCausalLM'"]),
        ({"hidden_size": None}, ["has no hidden_size"]),
        ({"hidden_size": "16"}, ["hidden_size='16' must be a positive whole number"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers=0"]),
        ({"num_attention_heads": 3}, ["hidden_size=16 is not divisible by num_attention_heads=3"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads=4 is not divisible by num_key_value_heads=3"]),
        ({"head_dim": 5}, ["head size 5 is odd"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings='yes'"]),
        ({"vocab_size": 321}, ["model.embed_tokens.weight has shape [320, 16]", "[321, 16]"]),
        ({"num_hidden_layers": 10**12}, ["num_hidden_layers=1000000000000 is more than the 21 tensors"]),
        ({"num_hidden_layers": 3}, ["lacks the tensor model.layers.2.", "and 8 more"]),
        ({"num_hidden_layers": 1}, ["holds the tensor model.layers.1.", "and 8 more", "no place"]),
        ({"tie_word_embeddings": True}, ["lm_head.weight is not model.embed_tokens.weight", "set tie_word_embeddings to false"]),
    ],
)
def test_settings_that_the_decoder_does_not_have_are_refused_by_name_and_value(settings, words, tmp_path, capsys):
    line = refused(write_folder(tmp_path / "hf", **settings), tmp_path, capsys, *words)
    assert str(tmp_path / "hf") in line


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda tensors: tensors.pop(Q), [f"lacks the tensor {Q} [16, 16]"]),
        (lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(16, np.float32)}), ["q_proj.bias [16]", "no place"]),
        (lambda tensors: tensors.update({Q: np.zeros((16, 8), np.float32)}), [f"{Q} has shape [16, 8]", "makes it [16, 16]"]),
        (lambda tensors: tensors.update({Q: np.zeros((16, 16), ml_dtypes.float8_e4m3fn)}), [f"{Q} has dtype F8_E4M3", "F32, F16, BF16"]),
        (lambda tensors: tensors.update({Q: np.zeros((16, 16), np.float64)}), [f"{Q} has dtype F64"]),
        (lambda tensors: tensors.update({Q: np.zeros((16, 16), np.int8)}), [f"{Q} has dtype I8"]),
    ],
)
def test_tensors_that_do_not_fit_are_named_with_both_shapes(change, words, tmp_path, capsys):
    tensors = llama_tensors()
    change(tensors)
    refused(write_folder(tmp_path / "hf", tensors), tmp_path, capsys, *words)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_safetensors_are_refused(keep, tmp_path, capsys):
    path = write_folder(tmp_path / "hf") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(tmp_path / "hf", tmp_path, capsys, str(path), "cannot be read as safetensors", "copy the file again")


def test_a_header_of_an_absurd_size_is_refused(tmp_path, capsys):
    path = write_folder(tmp_path / "hf") / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    refused(tmp_path / "hf", tmp_path, capsys, str(path), "header too large")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_with_the_reason(name, tmp_path, capsys):
    (write_folder(tmp_path / "hf") / "model.safetensors").rename(tmp_path / "hf" / name)
    refused(tmp_path / "hf", tmp_path, capsys, name, "can run arbitrary code", "save the model as safetensors")


@pytest.mark.parametrize(
    "content, words",
    [
        (None, ["config.json is missing"]),
        ("{", ["config.json is not valid JSON"]),
        ("[]", ["holds a list"]),
    ],
)
def test_a_config_that_is_none_is_refused(content, words, tmp_path, capsys):
    path = write_folder(tmp_path / "hf") / "config.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    refused(tmp_path / "hf", tmp_path, capsys, *words)


def test_other_names_of_the_weights_are_refused(tmp_path, capsys):
    folder = write_folder(tmp_path / "hf")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    refused(folder, tmp_path, capsys, "weights.safetensors", "rename a single file to model.safetensors")
    (folder / "weights.safetensors").unlink()
    refused(folder, tmp_path, capsys, "holds no weights")


def sharded(folder, change=lambda index: None):
    """A folder of two shards, whose index is changed before it is written."""
    write_folder(folder)
    (folder / "model.safetensors").unlink()
    tensors, index = llama_tensors(), {"metadata": {}, "weight_map": {}}
    names = sorted(tensors)
    for number, part in enumerate((names[:9], names[9:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        index["weight_map"] |= dict.fromkeys(part, file)
    change(index)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_are_read_by_their_index(tmp_path):
    np.testing.assert_array_equal(load_model(sharded(tmp_path / "hf")).params["embed"]["embedding"], llama_tensors()["model.embed_tokens.weight"])


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/outside.safetensors", "sub/inside.safetensors", "..", "model.bin", ""])
def test_an_index_that_points_outside_its_folder_is_refused(file, tmp_path, capsys):
    save_file(llama_tensors(), tmp_path / "outside.safetensors")
    folder = sharded(tmp_path / "hf", lambda index: index["weight_map"].update({Q: file}))
    refused(folder, tmp_path, capsys, f"places {Q} in {file!r}", "own folder")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda index: index["weight_map"].update({Q: "model-00003-of-00002.safetensors"}), ["model-00003-of-00002.safetensors is missing", Q]),
        (lambda index: index["weight_map"].update({Q: "model-00001-of-00002.safetensors"}), [f"holds {Q}, but it does not"]),
        (lambda index: index["weight_map"].update({Q: 1}), ["is not an index of safetensors files"]),
        (lambda index: index.pop("weight_map"), ["is not an index of safetensors files"]),
        (lambda index: index.update(weight_map={}), ["is not an index of safetensors files"]),
        (lambda index: index.update(weight_map=[]), ["is not an index of safetensors files"]),
    ],
)
def test_an_index_that_is_wrong_is_refused(change, words, tmp_path, capsys):
    refused(sharded(tmp_path / "hf", change), tmp_path, capsys, *words)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path, capsys):
    folder = write_folder(tmp_path / "hf")
    text = " ".join(f"{a}{b}" for a in "abcdefghij" for b in "klmnopqrst")
    Tokenizer.train([text * 20], 330).save(folder / "tokenizer.json")
    refused(folder, tmp_path, capsys, "its tokenizer has 330 tokens and its model 320")


# ------------------------------------------------------------------------------------------------------------------------- where it goes


@pytest.fixture
def run(tmp_path):
    import_folder(write_folder(tmp_path / "hf"), tmp_path / "run")
    return tmp_path / "run"


def line_of(capsys, *argv) -> str:
    capsys.readouterr()
    assert main(list(map(str, argv))) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert captured.out == "" and len(lines) == 1, captured
    return lines[0]


def test_an_import_goes_nowhere_where_something_else_is(run, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    assert "is not an empty folder" in line_of(capsys, "import", "--hf", tmp_path / "hf", "--out", tmp_path / "full")
    assert "is not an empty folder" in line_of(capsys, "import", "--hf", tmp_path / "hf", "--out", tmp_path / "full" / "thesis.tex")
    other = write_folder(tmp_path / "other", norm_eps=None, rms_norm_eps=1e-6)
    assert "is an import of other files" in line_of(capsys, "import", "--hf", other, "--out", run)
    assert (tmp_path / "full" / "thesis.tex").read_text() == "mine"
    assert "is the directory of a run" in line_of(capsys, "import", "--hf", run, "--out", tmp_path / "new")
    assert "no such directory" in line_of(capsys, "import", "--hf", tmp_path / "nowhere", "--out", tmp_path / "new")


def test_an_export_goes_nowhere_where_something_else_is(run, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    assert "is not an empty folder" in line_of(capsys, "export", "--model", run, "--out", tmp_path / "full")
    assert "must be one of float32, bfloat16, float16" in line_of(capsys, "export", "--model", run, "--out", tmp_path / "out", "--dtype", "int8")
    assert "is a Hugging Face folder already" in line_of(capsys, "export", "--model", tmp_path / "hf", "--out", tmp_path / "out")
    assert "no such directory" in line_of(capsys, "export", "--model", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    export_model(run, tmp_path / "empty", None)
    assert (tmp_path / "empty" / "config.json").is_file()


def test_numbers_beyond_float16_are_refused_by_the_tensor_s_name(tmp_path, capsys):
    tensors = llama_tensors()
    tensors[Q][3, 4] = 1e5
    import_folder(write_folder(tmp_path / "hf", tensors), tmp_path / "run")
    line = line_of(capsys, "export", "--model", tmp_path / "run", "--out", tmp_path / "out", "--dtype", "float16")
    assert Q in line and "100000" in line and "use bfloat16 or float32" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"norm_position": "post"}, "is not a Hugging Face architecture"),
        ({"qk_norm": True}, "is not a Hugging Face architecture"),
        ({"d_model": 18, "d_head": 4}, "not divisible by model.n_heads=4"),
    ],
)
def test_networks_that_transformers_does_not_have_are_refused(changes, words, tmp_path):
    from test_hf import make_run

    config = ModelConfig(**{"vocab_size": 300, "d_model": 16, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "d_ff": 8} | changes)
    with pytest.raises(UserError, match=words):
        export_model(make_run(tmp_path / "run", config), tmp_path / "out", None)


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path):
    largest = max((run / "checkpoints" / "0" / "params").rglob("*"), key=lambda f: f.stat().st_size if f.is_file() else 0)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 0xFF
    largest.write_bytes(data)
    with pytest.raises(UserError, match="checkpoint .*/checkpoints/0 cannot be read"):
        export_model(run, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_a_sound_folder_is_read_although_config_json_says_more(tmp_path, caplog):
    caplog.set_level("INFO", logger="plasticity_jax")
    more = {"some_setting": 3, "sliding_window": None, "rope_scaling": None, "layer_types": ["full_attention"] * 2, "head_dim": 4}
    assert load_model(write_folder(tmp_path / "hf", **LLAMA | more)).config.d_head is None
    assert "ignored, as in LlamaForCausalLM: some_setting" in caplog.text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sliding_window": 64}, "sliding_window=64 is ignored, as in the forward pass of LlamaForCausalLM"),
        ({"sliding_window": 4096, "use_sliding_window": True}, "ignored, as in LlamaForCausalLM: sliding_window, use_sliding_window"),
        (
            {"rope_scaling": {"rope_type": "default", "factor": 8.0}},
            "rope_scaling: ignored, as in transformers, because rope_type is default: factor=8.0",
        ),
        ({"rope_scaling": {"type": "default", "factor": 8.0, "attention_factor": 2.0}}, "default: factor=8.0, attention_factor=2.0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 8.0}}, "rope_parameters: ignored, as in transformers"),
    ],
)
def test_what_the_architecture_does_not_read_changes_nothing_and_is_said(settings, said, tmp_path, caplog):
    """tests/parity/test_transformers.py holds the same settings against transformers."""
    caplog.set_level("INFO", logger="plasticity_jax")
    assert load_model(write_folder(tmp_path / "hf", **LLAMA | settings)).config == load_model(write_folder(tmp_path / "plain", **LLAMA)).config
    assert said in caplog.text
