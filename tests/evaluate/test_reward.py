"""The reward stage on a tiny model and on a reward model's folder written here, its numbers counted again."""

import dataclasses
import json
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers, processors

from plasticity_jax.config import ModelConfig, RewardConfig, StudyConfig, TaskConfig, TrainConfig
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.errors import UserError
from plasticity_jax.evaluate import reward
from plasticity_jax.evaluate.reward_model import check_folder, open_reward_model
from plasticity_jax.model.checkpoint import Checkpoints
from plasticity_jax.model.load import load_model
from plasticity_jax.model.transformer import hidden_states, init_params
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.runs.run import Run
from plasticity_jax.stages import reward as stage
from plasticity_jax.stages.stage import Context
from plasticity_jax.study.graph import build_graph

MODEL = ModelConfig(vocab_size=300, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=16)
CONFIG = StudyConfig(
    name="tiny", model=MODEL, train=TrainConfig(compute_dtype="float32"), reward=RewardConfig(scorer="log-probability", max_length=64, batch_size=4)
)
TEXTS = [" red", " the tree", "", " red", " a red tree", " x", " the tree", " yes", " no", " maybe", " it is so", " red"]
CORRECT = [True, False, False, True, False, True, False, True, True, False, False, False]
TEMPLATE = (
    "{{- bos_token }}{% for message in messages %}\n"
    "    {{- '<|head|>' + message['role'] + '<|/head|>\\n\\n' + message['content'] | trim + '<|eot|>' }}\n"
    "{%- endfor %}\n"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, and the completions of three problems: a greedy one and three samples each."""
    root = tmp_path_factory.mktemp("study")
    with RunDirectory(root / "model").work(Run("tiny", "init", "s0", {}), CONFIG) as directory:
        with Checkpoints(directory.path / "checkpoints") as checkpoints:
            checkpoints.save(0, init_params(MODEL, 0))
        Tokenizer.train(["Human: the red tree. Assistant: yes it is so"] * 50, 280).save(directory.path / "tokenizer.json")
        directory.finish({})
    with RunDirectory(root / "completions").work(Run("tiny", "evaluate", "wd0", {}, task="topic"), CONFIG) as directory:
        problems = [{"id": f"p{i}", "problem": f"is {i} red?", "prompt": f"Human: is {i} red?\nAssistant:"} for i in range(3)]
        rows = [
            {"id": f"p{i // 4}", "sample": i % 4, "text": text, "correct": correct, "ended": i != 4}
            for i, (text, correct) in enumerate(zip(TEXTS, CORRECT, strict=True))
        ]
        for name, lines in (("problems", problems), ("completions", rows)):
            (directory.path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        directory.finish({})
    return root


def rated(world, name: str, settings: RewardConfig, *, faithful: bool = False, **parents) -> tuple[dict, np.ndarray]:
    """Results, and the rewards that were written, [problem, completion]."""
    run, config = Run("tiny", "reward", name, {}, task="topic"), dataclasses.replace(CONFIG, reward=settings, faithful=faithful)
    context = Context(
        config, run, RunDirectory(world / name), {"completions": world / "completions"} | {role: world / path for role, path in parents.items()}
    )
    with context.directory.work(run, config) as directory:
        results = asdict(stage.run(context))
        directory.finish(results)
    rows = [json.loads(line) for line in (world / name / "rewards.jsonl").read_text().splitlines()]
    assert [(row["id"], row["sample"]) for row in rows] == [(f"p{i // 4}", i % 4) for i in range(12)]
    return results, np.array([row["reward"] for row in rows]).reshape(3, 4)


def assert_numbers_follow(results, rewards):
    """RM@n and the ORM score, counted again from the rewards, the first of equals."""
    correct = np.array(CORRECT).reshape(3, 4)[:, 1:]
    chosen = [max(range(3), key=lambda j: (row[j], -j)) for row in rewards[:, 1:]]
    assert list(results["per_problem"]["rm"]) == [int(correct[i, j]) for i, j in enumerate(chosen)]
    assert results["metrics"]["rm@3"] == pytest.approx(np.mean([correct[i, j] for i, j in enumerate(chosen)]))
    assert results["metrics"]["orm_score"] == pytest.approx(rewards[:, 1:].mean(axis=1).mean(), rel=1e-6)
    assert results["per_problem"]["orm"] == pytest.approx(rewards[:, 1:].mean(axis=1), rel=1e-6)
    assert results["seconds"] > 0


def test_log_probability_is_the_mean_over_the_completions_tokens_and_its_end(world, monkeypatch):
    """Against float64 from the logits of the whole text; a text that ran into the limit has no end, an empty one is its end alone."""
    asked = []
    real = reward.log_likelihoods
    monkeypatch.setattr(reward, "log_likelihoods", lambda model, pairs, **options: asked.append(len(pairs)) or real(model, pairs, **options))
    results, rewards = rated(world, "by-probability", CONFIG.reward, scorer="model")
    model = load_model(world / "model")
    expected = []
    for i, text in enumerate(TEXTS):
        prompt = model.tokenizer.encode(f"Human: is {i // 4} red?\nAssistant:")
        answer = model.tokenizer.encode(text) + ([model.tokenizer.eos_id] if i != 4 else [])
        tokens = np.array([*prompt, *answer, *[7] * 40])[:40]  # one length for all: what follows is not read
        logits = np.asarray(model([tokens], capture=())[0], np.float64)[0]
        logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        expected.append(np.mean([logp[len(prompt) - 1 + k, token] for k, token in enumerate(answer)]))
    assert rewards.reshape(-1) == pytest.approx(np.array(expected), abs=1e-5)
    assert asked == [11], "a text that a problem has twice is rated once"
    assert results["scorer"] == "length-normalized log-probability under the model that wrote the completion" and results["cut"] == 0
    assert_numbers_follow(results, rewards)
    short, _ = rated(world, "short", dataclasses.replace(CONFIG.reward, max_length=8), scorer="model")
    assert short["cut"] == 11


# ------------------------------------------------------------------------------------------------------------------------ reward models


def write_reward_model(folder, **changes):
    """A random LlamaForSequenceClassification folder of byte-level tokens; settings of None are left out."""
    folder.mkdir()
    specials = ["<|begin|>", "<|head|>", "<|/head|>", "<|eot|>", "<|pad|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(specials)
    backend.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 256)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|begin|>", "eos_token": {"content": "<|eot|>"}, "chat_template": TEMPLATE})
    )
    settings = {
        "architectures": ["LlamaForSequenceClassification"], "model_type": "llama", "vocab_size": 261, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "pad_token_id": 260, "id2label": {"0": "LABEL_0"},
    } | changes  # fmt: skip
    (folder / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    generator = np.random.default_rng(0)

    def draw(*shape):
        return generator.normal(size=shape).astype(np.float32)

    tensors = {"model.embed_tokens.weight": draw(261, 16), "model.norm.weight": draw(16), "score.weight": draw(1, 16)}
    for i in range(2):
        shapes = {"self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16), "self_attn.o_proj": (16, 16),
                  "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24), "input_layernorm": (16,), "post_attention_layernorm": (16,)}  # fmt: skip
        tensors |= {f"model.layers.{i}.{name}.weight": draw(*shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, tensors


def change_tensors(folder, tensors):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_reward_model_reads_the_chat_and_is_read_at_its_last_token(world, tmp_path):
    """The text and its tokens written by hand; the reward is the head times the last normed state of the decoder without padding."""
    folder, tensors = write_reward_model(tmp_path / "Some-Reward-8B")
    settings = RewardConfig(scorer="sequence-classification", model=str(folder), max_length=96, batch_size=4)
    results, rewards = rated(world, "by-reward-model", settings)
    assert results["scorer"] == "Some-Reward-8B" and results["cut"] == 0
    provenance = json.loads((world / "by-reward-model" / "provenance.json").read_text())
    assert set(provenance["reward_model"]) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    model, chat = open_reward_model(folder)
    text = "<|begin|><|head|>user<|/head|>\n\nis 1 red?<|eot|><|head|>assistant<|/head|>\n\na red tree<|eot|>"
    assert chat.text("is 1 red?", " a red tree ") == text
    byte = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    of_byte = {" ": byte["Ġ"], "\n": byte["Ċ"]} | {c: byte[c] for c in "abcdefghijklmnopqrstuvwxyz0123456789?"}
    pieces = [256, 257, *map(of_byte.get, "user"), 258, *map(of_byte.get, "\n\nis 1 red?"), 259, 257, *map(of_byte.get, "assistant"), 258,
              *map(of_byte.get, "\n\na red tree"), 259]  # fmt: skip
    assert chat.rows([("is 1 red?", " a red tree")], 96) == ([pieces], 0)
    states = jax.jit(lambda params: hidden_states(model.config, params, np.array([pieces]))[0])(model.params["decoder"])
    assert rewards[1, 0] == pytest.approx(float(np.asarray(states)[0, -1] @ tensors["score.weight"][0]), rel=1e-4)
    assert_numbers_follow(results, rewards)


def test_padding_at_the_end_is_not_read_and_a_doubled_beginning_is_one(tmp_path):
    folder, _ = write_reward_model(tmp_path / "hf", pad_token_id=259)
    _, chat = open_reward_model(folder)
    (row,), n_cut = chat.rows([("a", "b")], 64)
    assert row[-1] not in (259,) and row[:2] == [256, 257] and n_cut == 0
    (folder / "chat_template.jinja").write_text("<|begin|>" + TEMPLATE)
    (again,), _ = open_reward_model(folder)[1].rows([("a", "b")], 64)
    assert again == row
    (cut,), n_cut = chat.rows([("a", "b")], 10)
    assert n_cut == 1 and cut == [256, *row[-9:]]


def test_faithful_keeps_two_beginnings_and_cuts_nothing(world, tmp_path):
    """The rule written by hand: what the template wrote, with one more beginning of text; rewards also of texts beyond `reward.max_length`."""
    folder, tensors = write_reward_model(tmp_path / "hf")
    model, chat = open_reward_model(folder)
    (row,), _ = chat.rows([("a", "b")], 64)
    assert chat.rows([("a", "b")], 10, faithful=True) == ([[256, *row]], 0)
    settings = RewardConfig(scorer="sequence-classification", model=str(folder), max_length=16, batch_size=4)
    results, rewards = rated(world, "faithful", settings, faithful=True)
    clean, others = rated(world, "clean", settings)
    assert results["cut"] == 0 and clean["cut"] > 0 and not np.any(rewards == others)
    (whole,), _ = chat.rows([("is 1 red?", TEXTS[4])], 500)
    states = jax.jit(lambda params: hidden_states(model.config, params, np.array([[256, *whole]]))[0])(model.params["decoder"])
    assert len(whole) > 32 and rewards[1, 0] == pytest.approx(float(np.asarray(states)[0, -1] @ tensors["score.weight"][0]), rel=1e-4)


@pytest.mark.parametrize("faithful", [False, True])
def test_base_models_are_rated_where_the_original_rates_them(faithful):
    config = dataclasses.replace(CONFIG, faithful=faithful, tasks={"topic": TaskConfig(), "PIQA": TaskConfig()})
    graph = build_graph(config)
    completions = {run.id: run.fields["when"] for run in graph if run.stage == "evaluate" and run.task == "topic"}
    rated_runs = [run for run in graph if run.stage == "reward"]
    assert {completions[run.parents["completions"]] for run in rated_runs} == ({"before", "after"} if faithful else {"after"})
    assert len({run.id for run in rated_runs}) == len(rated_runs) == (len(completions) if faithful else len(completions) // 2)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM has no score head"),
        ({"architectures": ["Gemma2ForSequenceClassification"]}, "'Gemma2ForSequenceClassification' is unknown"),
        ({"id2label": {"0": "a", "1": "b"}}, "gives 2 numbers"),
        ({"num_labels": 3}, "gives 3 numbers"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' changes the network"),
    ],
)
def test_other_models_are_refused_in_one_line(changes, words, tmp_path):
    folder, _ = write_reward_model(tmp_path / "hf", **changes)
    assert_refused(folder, words)


def assert_refused(folder, words):
    with pytest.raises(UserError) as error:
        check_folder(folder)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_folders_that_lack_something_are_refused_in_one_line(tmp_path):
    folder, tensors = write_reward_model(tmp_path / "hf")
    check_folder(folder)
    assert_refused(tmp_path / "nowhere", "no such directory")
    change_tensors(folder, {name: tensor for name, tensor in tensors.items() if name != "score.weight"})
    assert_refused(folder, "has no score head")
    change_tensors(folder, tensors | {"score.weight": np.zeros((5, 16), np.float32)})
    assert_refused(folder, "gives 5 numbers")
    change_tensors(folder, tensors | {"score.bias": np.zeros(1, np.float32)})
    assert_refused(folder, "score.bias [1]")
    change_tensors(folder, tensors)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for template, words in (("{% for x in %}", "is not valid"), ("{% endfor", "is not valid")):
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        assert_refused(folder, words)
    for template, words in (("{{ raise_exception('no\nassistant here') }}", "no assistant here"), ("{{ messages.__class__.__mro__ }}", "unsafe"),
                            ("{{ nothing.at.all }}", "undefined"), ("{{ messages.append(1) }}", "unsafe")):  # fmt: skip
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        with pytest.raises(UserError, match="the chat template fails") as error:
            open_reward_model(folder)[1].text("a", "b")
        assert words in str(error.value) and "\n" not in str(error.value)
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": [{"name": "tools", "template": "x"}]}))
    assert_refused(folder, "has no chat template")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    check_folder(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert_refused(folder, "is not a valid tokenizer")
    (folder / "tokenizer.json").unlink()
    assert_refused(folder, "holds no tokenizer.json")


# ----------------------------------------------------------------------------------------------------------------------------- the rest


def test_a_verifier_rates_and_is_named_with_its_auc(world):
    """Against the head times the state of the last token, the end of text, of the whole text."""
    head = np.random.default_rng(1).normal(size=16).astype(np.float32)
    run, source = Run("tiny", "verifier", "topic", {}, task="topic"), load_model(world / "model")
    with RunDirectory(world / "verifier").work(run, CONFIG) as directory:
        decoder = {name: part for name, part in source.params.items() if name != "head"}
        with Checkpoints(directory.path / "checkpoints") as checkpoints:
            checkpoints.save(3, {"decoder": decoder, "head": jnp.asarray(head)})
        (directory.path / "tokenizer.json").write_bytes((world / "model" / "tokenizer.json").read_bytes())
        directory.finish({"auc": 0.8349, "reason": ""})
    results, rewards = rated(world, "by-verifier", dataclasses.replace(CONFIG.reward, scorer="verifier"), scorer="verifier")
    assert results["scorer"] == "outcome verifier (held-out AUC 0.83)"
    encode = source.tokenizer.encode
    rows = [[*encode(f"Human: is {i // 4} red?\nAssistant:"), *encode(text), source.tokenizer.eos_id] for i, text in enumerate(TEXTS)]
    _, activations = source([row + [9] * (40 - len(row)) for row in rows], capture=("final_norm",))
    states = np.asarray(activations["final_norm"], np.float64)
    assert rewards.reshape(-1) == pytest.approx(np.array([states[i, len(row) - 1] @ head for i, row in enumerate(rows)]), abs=1e-4)
    assert_numbers_follow(results, rewards)
    with pytest.raises(UserError, match="not of stage verifier"):
        rated(world, "wrong", dataclasses.replace(CONFIG.reward, scorer="verifier"), scorer="model")


def test_rewards_do_not_depend_on_what_they_are_computed_with(world, tmp_path):
    """Two rows at a time and another batch composition; the same number for the same text."""
    folder, _ = write_reward_model(tmp_path / "hf")
    settings = RewardConfig(scorer="sequence-classification", model=str(folder), max_length=96, batch_size=4)
    _, rewards = rated(world, "four", settings)
    _, others = rated(world, "two", dataclasses.replace(settings, batch_size=2))
    assert rewards == pytest.approx(others, abs=1e-5) and rewards[0, 0] == rewards[0, 3]
