"""The evaluate stage on a tiny model, its file graded again from scratch."""

import dataclasses
import json
import re
import string
from collections import Counter

import numpy as np
import pytest

from plasticity_jax.config import EvaluateConfig, ModelConfig, StudyConfig, TaskConfig, TrainConfig
from plasticity_jax.data.tasks import Example, write_task
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.errors import UserError
from plasticity_jax.evaluate import evaluate
from plasticity_jax.model.checkpoint import Checkpoints
from plasticity_jax.model.transformer import init_params
from plasticity_jax.records import Context, Run, RunDirectory

CONFIG = StudyConfig(
    name="tiny",
    model=ModelConfig(vocab_size=300, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=16),
    train=TrainConfig(compute_dtype="float32"),
    tasks={"topic": TaskConfig(max_new_tokens=5)},
    evaluate=EvaluateConfig(n_samples=4, prompt_buckets=(32,), batch_size=20),
)
WORDS = ("arts", "people", "history")


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    """A model that answers without reading: its head favours the pieces of "answer is <topic>" by chance alone."""
    root = tmp_path_factory.mktemp("study")
    tokenizer = Tokenizer.train([f"Human: answer is {word}. Assistant:" for word in WORDS] * 50, 290)
    with RunDirectory(root / "model").work(Run("tiny", "init", "s0", {}), CONFIG) as directory:
        with Checkpoints(directory.path / "checkpoints") as checkpoints:
            checkpoints.save(0, init_params(CONFIG.model, 0))
        tokenizer.save(directory.path / "tokenizer.json")
        directory.finish({})
    rows = [Example(str(i), f"Text {i}?", "The answer is x.", WORDS[i % 7 % 3], "generated", "held_out") for i in range(9)]
    write_task(root / "task", rows, rows)
    return Context(CONFIG, Run("tiny", "evaluate", "wd0-topic-before", {}, task="topic"), RunDirectory(root / "run"),
                   {"model": root / "model", "task": root / "task"})


@pytest.fixture
def scripted(monkeypatch):
    """Replaces the decoded text by one of a few real-looking completions, chosen by the tokens, so that every verdict occurs."""
    texts = [f" The answer is {word}." for word in WORDS] + [" The answer is", " ARTS answer is Arts\nHuman: answer is people", " hm"]
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids, skip_special=True: texts[sum(ids) % len(texts)])


def test_the_stage_end_to_end(context, scripted):
    with context.directory.work(context.run, context.config) as directory:
        results = evaluate.run(context)
        directory.finish(results)
    rows = [json.loads(line) for line in (directory.path / "completions.jsonl").read_text().splitlines()]
    assert directory.done and len(rows) == 9 and rows[3]["prompt"] == "Human: Text 3?\nAssistant:"

    def right(text, gold):  # the rule of the task, written again
        found = re.findall(r"answer is\s+(\S+)", text)
        return bool(found) and found[-1].strip(string.punctuation).lower() == gold

    greedy = [right(row["greedy"]["text"], row["gold"]) for row in rows]
    samples = np.array([[right(sample["text"], row["gold"]) for sample in row["samples"]] for row in rows])
    assert samples.shape == (9, 4) and samples.any() and not samples.all()
    assert [row["greedy"]["correct"] for row in rows] == greedy
    assert [[sample["correct"] for sample in row["samples"]] for row in rows] == samples.tolist()
    stored = json.loads((directory.path / "results.json").read_text())
    assert stored["per_problem"]["greedy"] == [int(x) for x in greedy]
    assert stored["per_problem"]["samples"] == samples.sum(1).tolist()
    for row, majority in zip(rows, stored["per_problem"]["majority"]):
        answers = [re.findall(r"answer is\s+(\S+)", sample["text"]) for sample in row["samples"]]
        keys = [found[-1].strip(".").lower() if found else f"none {i}" for i, found in enumerate(answers)]
        counts = Counter(keys)  # most_common keeps the order of first appearance among equals
        assert row["majority"] == keys.index(counts.most_common(1)[0][0])
        assert majority == int(right(row["samples"][row["majority"]]["text"], row["gold"]))
    assert stored["metrics"]["pass@1"] == pytest.approx(np.mean(greedy))
    assert stored["metrics"]["pass@4"] == pytest.approx(np.mean(samples.any(1)))
    assert not any("Human" in entry["text"] for row in rows for entry in (row["greedy"], *row["samples"]))
    assert stored["no_answer"]["samples"] == pytest.approx(np.mean([sample["answer"] is None for row in rows for sample in row["samples"]]))
    assert (stored["problems"], stored["n_samples"], stored["cut_prompts"], stored["diverged"]) == (9, 4, 0, None)
    assert stored["source_splits"] == ["held_out"]
    assert stored["majority_class"] == pytest.approx(max(Counter(row["gold"] for row in rows).values()) / 9)


@pytest.mark.parametrize("bos", [None, "<|pad|>"])
@pytest.mark.parametrize("faithful", [False, True])
def test_prompts_begin_with_the_beginning_of_text_in_faithful_studies_only(context, monkeypatch, faithful, bos):
    """And only where the tokenizer has such a token."""
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"} | ({"bos_token": bos} if bos else {})
    (context.parents["model"] / "tokenizer_config.json").write_text(json.dumps(special))
    read = []
    monkeypatch.setattr(evaluate, "generate", lambda model, prompts, **options: read.extend(prompts) or [[[2]] * 5 for _ in prompts])
    with context.directory.work(context.run, context.config) as directory:
        evaluate.run(Context(dataclasses.replace(CONFIG, faithful=faithful), context.run, directory, context.parents))
    (context.parents["model"] / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.load(context.parents["model"])
    plain = [tokenizer.encode(f"Human: Text {i}?\nAssistant:") for i in range(9)]
    assert read == [[1, *tokens] if faithful and bos else tokens for tokens in plain]


def test_a_model_without_tokenizer_is_refused(context):
    (context.parents["model"] / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json"):
        evaluate.run(context)
