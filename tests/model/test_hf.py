import dataclasses
import json
import os
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from hf_folders import GOLDEN, LLAMA, NAMES, assert_same_tensors, golden_folder, llama_tensors, write_folder
from safetensors import safe_open
from safetensors.numpy import load_file

from plasticity_jax.cli import main
from plasticity_jax.config import ModelConfig, RopeScaling, StudyConfig
from plasticity_jax.data.tokenizer import Tokenizer, copy_tokenizer
from plasticity_jax.errors import UserError
from plasticity_jax.model import Checkpoints, hf_export, hf_tensors, init_params, load_model
from plasticity_jax.model.hf_export import export_model
from plasticity_jax.model.hf_import import import_folder
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.runs.jsonfiles import read_json
from plasticity_jax.runs.run import Run
from plasticity_jax.runs.storage import location

TINY = Path(__file__).parents[2] / "configs" / "tiny.py"


def make_run(path: Path, config: ModelConfig, seed: int = 0, tokenizer: Tokenizer | None = None) -> Path:
    directory = RunDirectory(path)
    with directory.work(Run("study", "pretrain", "wd0", {"x": 1}), StudyConfig(model=config)):
        with Checkpoints(path / "checkpoints") as checkpoints:
            checkpoints.save(0, init_params(config, seed))
        if tokenizer is not None:
            tokenizer.save(path / "tokenizer.json")
        directory.finish({})
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["What is 12 + 34? Which topic is this encyclopedia's text about, geography or history? The answer is 7. " * 20], 300)


# ------------------------------------------------------------------------------------------------------- the same network as transformers


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("name", NAMES)
def test_the_logits_of_transformers_are_met(name, version, tmp_path):
    golden = np.load(GOLDEN / name / "golden.npz")
    model = load_model(golden_folder(name, version, tmp_path / "hf"))
    assert model.run is None and model.tokenizer is None
    logits, _ = model(golden["tokens"], capture=())
    expected = golden["logits"]
    assert np.max(np.abs(np.asarray(logits)[:, golden["positions"]] - expected)) < 1e-4 * np.max(np.abs(expected))


def test_both_forms_of_config_json_say_the_same(tmp_path):
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=16)
    expected = ModelConfig(300, 16, 2, 4, 2, 40, d_head=8, rope_scaling=scaling, norm_eps=1e-6, tie_embeddings=True)
    assert load_model(golden_folder("llama-tied-scaled", 4, tmp_path / "4")).config == expected
    assert load_model(golden_folder("llama-tied-scaled", 5, tmp_path / "5")).config == expected


def test_an_epsilon_that_config_json_leaves_out_is_the_family_s(tmp_path):
    for name, epsilon in (("llama", 1e-6), ("olmo2", 1e-5)):  # LlamaConfig's and Olmo2Config's defaults
        config = golden_folder(name, 5, tmp_path / name) / "config.json"
        config.write_text(json.dumps({key: value for key, value in json.loads(config.read_text()).items() if key != "rms_norm_eps"}))
        assert load_model(tmp_path / name).config.norm_eps == epsilon


# ----------------------------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_an_export_of_an_import_has_the_tensors_of_the_source(dtype, tmp_path):
    source = write_folder(tmp_path / "hf", llama_tensors(dtype))
    import_folder(source, tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "out", None)
    assert_same_tensors(load_file(tmp_path / "out" / "model.safetensors"), llama_tensors(dtype))
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == np.dtype(dtype).name


def test_tensors_of_several_types_keep_theirs(tmp_path):
    tensors = llama_tensors(ml_dtypes.bfloat16)
    tensors = {name: tensor.astype(np.float32) if tensor.ndim == 1 else tensor for name, tensor in tensors.items()}
    import_folder(write_folder(tmp_path / "hf", tensors), tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "out", None)
    assert_same_tensors(load_file(tmp_path / "out" / "model.safetensors"), tensors)


@pytest.mark.parametrize("name", NAMES)
def test_golden_folders_come_back_as_they_were(name, tmp_path):
    import_folder(golden_folder(name, 5, tmp_path / "hf"), tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "out", None)
    assert_same_tensors(load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors"))
    written, source = read_json(tmp_path / "out" / "config.json"), read_json(tmp_path / "hf" / "config.json")
    for key in set(source) - {"transformers_version", "pretraining_tp"}:
        assert written[key] == source[key], key
    assert written["rope_theta"] == source["rope_parameters"]["rope_theta"]  # what transformers 4 reads


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"d_head": 10, "tie_embeddings": True, "rope_scaling": RopeScaling(4.0, 1.0, 4.0, 64)},
        {"norm_position": "post", "qk_norm": True, "n_kv_heads": 4, "init": "truncated"},
    ],
)
def test_an_import_of_an_export_is_the_run_bit_for_bit(changes, tmp_path, tokenizer):
    config = ModelConfig(**{"vocab_size": 300, "d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "d_ff": 40} | changes)
    make_run(tmp_path / "run", config, tokenizer=tokenizer)
    export_model(tmp_path / "run", tmp_path / "hf", None)
    import_folder(tmp_path / "hf", tmp_path / "again")
    original, again = load_model(tmp_path / "run"), load_model(tmp_path / "again")
    assert again.config == original.config and again.run.stage == "import"
    assert jax.tree.structure(again.params) == jax.tree.structure(original.params)
    for one, other in zip(jax.tree.leaves(again.params), jax.tree.leaves(original.params)):
        assert one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes()
    assert again.tokenizer.encode("Which topic? 12") == tokenizer.encode("Which topic? 12")
    written = read_json(tmp_path / "hf" / "config.json")
    assert (written["eos_token_id"], written["pad_token_id"], written["bos_token_id"]) == (tokenizer.eos_id, tokenizer.pad_id, None)
    assert read_json(tmp_path / "hf" / "generation_config.json") == {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


@pytest.mark.parametrize(("name", "dtype"), [("float32", np.float32), ("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_the_type_asked_for_is_written(tmp_path, name, dtype):
    import_folder(write_folder(tmp_path / "hf"), tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "out", name)
    narrowed = {name: tensor.astype(dtype) for name, tensor in llama_tensors().items()}
    assert_same_tensors(load_file(tmp_path / "out" / "model.safetensors"), narrowed)


def test_whoever_may_read_the_config_may_read_the_weights(tmp_path):
    import_folder(write_folder(tmp_path / "hf"), tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "out", None)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == (tmp_path / "out" / "config.json").stat().st_mode


def test_an_import_to_a_store_without_checkpoints_is_refused_before_anything_is_written(tmp_path, capsys):
    store = location(f"memory://{uuid.uuid4().hex}/run")
    assert main(["import", "--hf", str(write_folder(tmp_path / "hf")), "--out", str(store)]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"plasticity: {store}: checkpoints are written to a local or shared disk")
    assert not store.fs.find(store.path)


def test_shards_are_written_and_read(tmp_path, monkeypatch):
    import_folder(write_folder(tmp_path / "hf"), tmp_path / "run")
    monkeypatch.setattr(hf_tensors, "MAX_SHARD_BYTES", 20_000)
    export_model(tmp_path / "run", tmp_path / "out", None)
    shards = sorted((tmp_path / "out").glob("model-*-of-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "out" / "model.safetensors").exists()
    found = {}
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")
    for shard in shards:
        tensors = load_file(shard)
        assert all(index["weight_map"][name] == shard.name for name in tensors)
        found |= tensors
    assert_same_tensors(found, llama_tensors())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    for leaf, single in zip(jax.tree.leaves(load_model(tmp_path / "out").params), jax.tree.leaves(load_model(tmp_path / "hf").params)):
        np.testing.assert_array_equal(leaf, single)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_safe_open_reads_each_dtype_from_the_shard_in_the_index(tmp_path, monkeypatch, dtype):
    arrays = {name: tensor.astype(dtype) for name, tensor in llama_tensors().items()}
    monkeypatch.setattr(hf_tensors, "MAX_SHARD_BYTES", 10_000)
    hf_tensors.write_weights(tmp_path, [hf_tensors.ToWrite(name, x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()])
    index = read_json(tmp_path / "model.safetensors.index.json")
    assert index["weight_map"].keys() == arrays.keys() and index["metadata"]["total_size"] == sum(x.nbytes for x in arrays.values())
    assert len(set(index["weight_map"].values())) > 2
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, framework="numpy") as shard:
            tensor = shard.get_tensor(name)
        assert (tensor.shape, tensor.dtype) == (arrays[name].shape, arrays[name].dtype) and tensor.tobytes() == arrays[name].tobytes()


def test_the_output_matrix_may_be_stored_although_it_is_tied(tmp_path):
    tensors = llama_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    inverse_frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}  # as the first Llama checkpoints hold them
    folder = write_folder(tmp_path / "hf", tensors | inverse_frequencies, tie_word_embeddings=True)
    assert "head" not in load_model(folder).params


def test_files_beside_the_weights_are_carried_along(tmp_path, tokenizer):
    folder = write_folder(tmp_path / "hf", eos_token_id=[0, 7], bos_token_id=5)
    tokenizer.save(folder / "tokenizer.json")
    carried = {
        "tokenizer_config.json": {"eos_token": {"content": "<|endoftext|>"}, "pad_token": "<|endoftext|>", "chat_template": "{{ messages }}"},
        "special_tokens_map.json": {"eos_token": "<|endoftext|>"},
        "generation_config.json": {"eos_token_id": [0, 7], "temperature": 0.6},
        "chat_template.jinja": {},
        "additional_chat_templates/tools.jinja": {},
    }
    for name, content in carried.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    import_folder(folder, tmp_path / "run")
    assert load_model(tmp_path / "run").tokenizer.pad_id == tokenizer.eos_id
    assert load_model(tmp_path / "run").tokenizer.eos_ids == load_model(folder).tokenizer.eos_ids == (0, 7)
    copy_tokenizer(tmp_path / "run", make_run(tmp_path / "tuned", load_model(folder).config))  # as a fine-tuned run gets its files
    export_model(tmp_path / "tuned", tmp_path / "tuned-hf", None)
    for name in (*carried, "tokenizer.json"):
        assert (tmp_path / "tuned-hf" / name).read_bytes() == (folder / name).read_bytes()
    assert read_json(tmp_path / "tuned-hf" / "config.json")["eos_token_id"] == [0, 7]
    export_model(tmp_path / "run", tmp_path / "out", None)
    for name in (*carried, "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert read_json(tmp_path / "out" / "config.json")["eos_token_id"] == [0, 7]
    assert read_json(tmp_path / "out" / "config.json")["max_position_embeddings"] == LLAMA["max_position_embeddings"]


def test_ends_of_text_that_config_json_alone_names_stay(tmp_path, tokenizer):
    folder = write_folder(tmp_path / "hf", eos_token_id=[0, 7])
    tokenizer.save(folder / "tokenizer.json")
    import_folder(folder, tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "out", None)
    for place in (folder, tmp_path / "run", tmp_path / "out"):
        assert load_model(place).tokenizer.eos_ids == (0, 7)
    assert read_json(tmp_path / "out" / "generation_config.json") == {"eos_token_id": [0, 7]}


def test_a_sentencepiece_model_alone_becomes_a_tokenizer_json(tmp_path):
    import sentencepiece

    folder, text = write_folder(tmp_path / "hf"), "Which topic is this text about, the Earth or the Moon? 12 + 34 = 46."
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 50), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=310, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    expected = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ x }}", "bos_token": "<s>"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    import_folder(folder, tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "out", None)
    for place in (folder, tmp_path / "run", tmp_path / "out"):
        tokenizer = load_model(place).tokenizer
        assert tokenizer.encode(text) == expected.encode(text) and tokenizer.eos_id == expected.eos_id() and tokenizer.eos_ids == (2, 9)
        assert read_json(place / "tokenizer_config.json")["chat_template"] == "{{ x }}"
    assert (tmp_path / "out" / "tokenizer.json").is_file()


# ---------------------------------------------------------------------------------------------------------------------------- the stages


@pytest.mark.slow
def test_every_stage_takes_the_folder_and_its_import(tmp_path, tokenizer, capsys):
    tame = {name: np.ones_like(tensor) if tensor.ndim == 1 else 0.2 * tensor for name, tensor in llama_tensors().items()}
    folder = write_folder(tmp_path / "Some Model", tame)
    tokenizer.save(folder / "tokenizer.json")
    options = ["--config", str(TINY), "--workdir", str(tmp_path / "work"), "--config.finetune.length_buckets=(64,)"]
    assert main(["import", "--hf", str(folder), "--out", str(tmp_path / "run")]) == 0
    assert main(["analyze", *options, "--model", str(folder), "--only", "spectra"]) == 0
    imported = next((tmp_path / "work" / "tiny" / "import").iterdir())
    assert imported.name == RunDirectory(tmp_path / "run").run().id.removeprefix("import/") and imported.name.startswith("Some-Model-")
    capsys.readouterr()
    assert main(["finetune", *options, "--base", str(folder), "--task", "addition2"]) == 0
    tuned = Path(capsys.readouterr().out.split()[-1])
    assert main(["finetune", *options, "--base", str(tmp_path / "run"), "--task", "addition2"]) == 0
    assert Path(capsys.readouterr().out.split()[-1]) == tuned, "the folder and its import are the same base"
    assert main(["evaluate", *options, "--model", str(folder), "--task", "addition2"]) == 0
    assert main(["evaluate", *options, "--model", str(tuned), "--task", "addition2"]) == 0
    assert main(["generate", "--model", str(folder), "--prompt", "12+34", "--max-new-tokens", "2"]) == 0
    assert main(["export", "--model", str(tuned), "--out", str(tmp_path / "tuned-hf")]) == 0
    exported = load_model(tmp_path / "tuned-hf")
    for one, other in zip(jax.tree.leaves(exported.params), jax.tree.leaves(load_model(tuned).params)):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(exported.params["head"]["kernel"], load_model(folder).params["head"]["kernel"])
    written = read_json(tmp_path / "tuned-hf" / "config.json")
    assert written["dtype"] == "float32" and written["max_position_embeddings"] == LLAMA["max_position_embeddings"]


# ------------------------------------------------------------------------------------------------------------------------ whole or nothing


def test_an_import_is_left_as_it_is_when_it_is_there_already(tmp_path, capsys):
    argv = ["import", "--hf", str(write_folder(tmp_path / "hf")), "--out", str(tmp_path / "run")]
    assert main(argv) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert main(argv) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


KILLED = """
    import os, signal
    from pathlib import Path
    from plasticity_jax.model import hf_tensors
    from plasticity_jax.model.hf_export import export_model
    from plasticity_jax.model.hf_import import import_folder

    def die(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    {when} = die
    {call}
"""


@pytest.mark.parametrize("when", ["hf_tensors.Weights.read", "__import__('plasticity_jax').runs.directory.RunDirectory.finish"])
def test_a_killed_import_is_no_run_and_is_done_again(when, tmp_path):
    folder, run = write_folder(tmp_path / "hf"), tmp_path / "run"
    kill(when, f"import_folder(Path({str(folder)!r}), Path({str(run)!r}))")
    with pytest.raises(ValueError, match="not finished"):
        load_model(run)
    import_folder(folder, run)
    np.testing.assert_array_equal(load_model(run).params["embed"]["embedding"], llama_tensors()["model.embed_tokens.weight"])


def test_a_killed_export_leaves_no_folder_of_that_name(tmp_path):
    import_folder(write_folder(tmp_path / "hf"), tmp_path / "run")
    kill("hf_tensors.os.fsync", f"export_model(Path({str(tmp_path / 'run')!r}), Path({str(tmp_path / 'out')!r}), None)")
    assert not (tmp_path / "out").exists()
    export_model(tmp_path / "run", tmp_path / "out", None)
    assert_same_tensors(load_file(tmp_path / "out" / "model.safetensors"), llama_tensors())


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    import_folder(write_folder(tmp_path / "hf"), tmp_path / "run")

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(hf_export, "describe", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_model(tmp_path / "run", tmp_path / "out", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


def kill(when: str, call: str) -> None:
    code = textwrap.dedent(KILLED).format(when=when, call=call)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}, timeout=120)
    assert done.returncode == -9, done.stderr


# ---------------------------------------------------------------------------------------------------------------------------------- memory

MEASURED = """
    import sys
    from pathlib import Path
    from plasticity_jax.parallel.allocator import return_freed_memory

    return_freed_memory()  # as the command line does
    from plasticity_jax.model import hf_tensors
    from plasticity_jax.model.hf_export import export_model
    from plasticity_jax.model.hf_import import import_folder
    from plasticity_jax.model.load import load_model

    def peak():
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

    root, what = Path(sys.argv[1]), sys.argv[2]
    # A small model first: the code of every library is then in memory, and what follows is the large model's alone.
    import_folder(root / "small", root / f"small-run-{what}")
    export_model(root / f"small-run-{what}", root / f"small-out-{what}", None)
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    if what == "load":
        model = load_model(root / "hf")
    elif what == "import":
        import_folder(root / "hf", root / "run")
    else:
        hf_tensors.MAX_SHARD_BYTES = 60_000_000
        export_model(root / "run", root / "out", None)
    print(peak() - before)
"""


@pytest.mark.nightly
def test_the_model_and_one_parameter_are_the_most_that_is_in_memory(tmp_path):
    """283 MB of float32 parameters, of which the largest, with its layers, has 66 MB; allowed beside them are 24 MB of buffers."""
    width, hidden, layers, vocab = 640, 2560, 10, 8000
    shapes = {"embed_tokens.weight": (vocab, width), "norm.weight": (width,)}
    for layer in range(layers):
        prefix = f"layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (hidden, width) for name in ("gate", "up")}
        shapes |= {f"{prefix}mlp.down_proj.weight": (width, hidden)}
        shapes |= {f"{prefix}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    generator = np.random.default_rng(0)
    tensors = {f"model.{name}": generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    write_folder(tmp_path / "hf", tensors, vocab_size=vocab, hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers,
                 num_key_value_heads=None, tie_word_embeddings=True)  # fmt: skip
    write_folder(tmp_path / "small")
    model = 4 * sum(tensor.size for tensor in tensors.values())
    largest = 4 * layers * hidden * width
    assert (model // 10**6, largest // 10**6) == (282, 65)
    del tensors
    measured = {}
    for what in ("load", "import", "export"):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(MEASURED), tmp_path, what],
            capture_output=True,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        measured[what] = int(done.stdout)
    print(measured)
    assert max(measured.values()) < model + largest + 24e6, measured
    assert measured["export"] < model, measured
    exported, source = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert_same_tensors(exported, source)


def test_pretraining_begins_with_the_weights_of_a_folder(tmp_path):
    """OLMo-2's, as transformers wrote them: checkpoint 0 holds every tensor of the folder; another network is refused in one line."""
    from plasticity_jax.config import StudyConfig, TrainConfig
    from plasticity_jax.stages import init
    from plasticity_jax.stages.stage import Context

    folder = golden_folder("olmo2", 5, tmp_path / "step0")
    model = dataclasses.replace(load_model(folder).config, init="truncated")
    config = StudyConfig(name="tiny", model=model, train=TrainConfig(initial=str(folder)))
    run = init.init_run(config, 0)
    assert run.hash != init.init_run(StudyConfig(name="tiny", model=model), 0).hash
    with RunDirectory(tmp_path / "init").work(run, config) as directory:
        directory.finish(dataclasses.asdict(init.run(Context(config, run, directory, {}))))
    export_model(tmp_path / "init", tmp_path / "out", None)
    in_float32 = {name: tensor.astype(np.float32) for name, tensor in load_file(folder / "model.safetensors").items()}
    assert_same_tensors(load_file(tmp_path / "out" / "model.safetensors"), in_float32)
    other = dataclasses.replace(config, model=dataclasses.replace(model, n_layers=model.n_layers + 1))
    nowhere = dataclasses.replace(config, train=dataclasses.replace(config.train, initial="nowhere"))
    for wrong, words in ((other, f"n_layers {model.n_layers} for {model.n_layers + 1}"), (nowhere, "no such directory")):
        with pytest.raises(UserError, match=words):
            init.STAGE.check(wrong, [])
