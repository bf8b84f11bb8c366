"""The evaluate stage on a tiny model, its file graded again from scratch."""

import contextlib
import dataclasses
import json
import re
import shutil
import string
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
import tokenizers
from tokenizers import processors

from plasticity_jax.config import EvaluateConfig, ModelConfig, StudyConfig, TaskConfig, TrainConfig
from plasticity_jax.data.tasks import Example, Rows, write_task
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.errors import UserError
from plasticity_jax.evaluate import evaluate
from plasticity_jax.evaluate.generate import Completion
from plasticity_jax.model.checkpoint import Checkpoints
from plasticity_jax.model.transformer import init_params
from plasticity_jax.runs.directory import DONE, RunDirectory
from plasticity_jax.runs.run import Run
from plasticity_jax.stages import evaluate as stage
from plasticity_jax.stages.stage import Context

CONFIG = StudyConfig(
    name="tiny",
    model=ModelConfig(vocab_size=300, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=16),
    train=TrainConfig(compute_dtype="float32"),
    tasks={"topic": TaskConfig(max_new_tokens=5)},
    evaluate=EvaluateConfig(n_samples=4, max_length=37, prompt_buckets=(32,), batch_size=20),
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
    rows = [Example(str(i), f"Text {i}?", "The answer is x.", WORDS[i % 7 % 3], "generated", "held_out", ("even", "odd")[i % 2]) for i in range(9)]
    write_task(root / "task", Rows(rows, rows, validation=rows))
    return Context(
        CONFIG,
        Run("tiny", "evaluate", "wd0-topic-before", {"split": "test", "n_samples": 4, "max_new_tokens": 5}, task="topic"),
        RunDirectory(root / "run"),
        {"model": root / "model", "task": root / "task"},
    )


@pytest.fixture
def scripted(monkeypatch):
    """Replaces the decoded text by one of a few real-looking completions, chosen by the tokens, so that every verdict occurs."""
    texts = [f" The answer is {word}." for word in WORDS] + [" The answer is", " ARTS answer is Arts\nHuman: answer is people", " hm"]
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids, skip_special=True: texts[sum(ids) % len(texts)])


def test_the_stage_end_to_end(context, scripted):
    with context.directory.work(context.run, context.config) as directory:
        results = asdict(stage.run(context))
        directory.finish(results)
    rows = [json.loads(line) for line in (directory.path / "completions.jsonl").read_text().splitlines()]
    problems = [json.loads(line) for line in (directory.path / "problems.jsonl").read_text().splitlines()]
    assert directory.done and len(problems) == 9 and problems[3]["prompt"] == "Human: Text 3?\nAssistant:"
    assert [(row["id"], row["sample"]) for row in rows] == [(problem["id"], sample) for problem in problems for sample in range(5)]
    assert not list(directory.path.glob("generated*"))

    def right(text, gold):  # the rule of the task, written again
        found = re.findall(r"answer is\s+(\S+)", text)
        return bool(found) and found[-1].strip(string.punctuation).lower() == gold

    golds = [problem["gold"] for problem in problems]
    correct = np.array([[right(rows[5 * i + s]["text"], gold) for s in range(5)] for i, gold in enumerate(golds)])
    greedy, samples = correct[:, 0], correct[:, 1:]
    assert samples.any() and not samples.all()
    assert [row["correct"] for row in rows] == correct.ravel().tolist()
    assert [row["verdict"] for row in rows] == ["right" if row["correct"] else "no answer" if row["answer"] is None else "wrong" for row in rows]
    stored = json.loads((directory.path / "results.json").read_text())
    assert stored["per_problem"]["greedy"] == greedy.astype(int).tolist()
    assert stored["per_problem"]["samples"] == samples.sum(1).tolist()
    for i, (gold, majority) in enumerate(zip(golds, stored["per_problem"]["majority"])):
        of_problem = rows[5 * i + 1 : 5 * i + 5]
        answers = [re.findall(r"answer is\s+(\S+)", row["text"]) for row in of_problem]
        keys = [found[-1].strip(".").lower() if found else f"none {j}" for j, found in enumerate(answers)]
        counts = Counter(keys)  # most_common keeps the order of first appearance among equals
        chosen = keys.index(counts.most_common(1)[0][0])
        assert [row["majority"] for row in of_problem] == [j == chosen for j in range(4)] and not rows[5 * i]["majority"]
        assert majority == int(right(of_problem[chosen]["text"], gold))
    assert stored["metrics"]["pass@1"] == pytest.approx(np.mean(greedy))
    assert stored["metrics"]["pass@4"] == pytest.approx(np.mean(samples.any(1)))
    assert not any("Human" in row["text"] for row in rows)
    assert stored["failures"]["samples"]["no answer"] == pytest.approx(np.mean([row["answer"] is None for row in rows if row["sample"]]))
    assert (stored["problems"], stored["n_samples"], stored["cut_prompts"]) == (9, 4, 0)
    assert stored["source_splits"] == ["held_out"]
    assert stored["majority_class"] == pytest.approx(max(Counter(golds).values()) / 9)
    for name in ("even", "odd"):
        held = [i for i, problem in enumerate(problems) if problem["subset"] == name]
        assert stored["subsets"][name]["pass@1"] == pytest.approx(greedy[held].mean()) and stored["subsets"][name]["problems"] == len(held)
    assert stored["macro"]["pass@4"] == pytest.approx(np.mean([stored["subsets"][name]["pass@4"] for name in ("even", "odd")]))


def test_validation_rows_are_answered_once_and_greedily(context, scripted, tmp_path):
    one = on_validation(context)
    with RunDirectory(tmp_path / "run").work(one.run, one.config) as directory:
        results = asdict(stage.run(dataclasses.replace(one, directory=directory)))
    rows = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    right = [re.findall(r"answer is\s+(\w+)", row["text"])[-1:] == [WORDS[i % 7 % 3]] for i, row in enumerate(rows)]
    assert [(row["id"], row["sample"], row["majority"]) for row in rows] == [(str(i), 0, False) for i in range(9)]
    assert results["per_problem"].keys() == {"greedy"} and list(results["per_problem"]["greedy"]) == right
    assert results["metrics"] == {"pass@1": np.mean(right)} and set(results["failures"]) == {"greedy"} and results["n_samples"] == 0
    assert results["subsets"]["odd"]["pass@1"] == np.mean(right[1::2])


def on_validation(context):
    """Greedy completions of the validation rows, four at a time."""
    config = dataclasses.replace(CONFIG, evaluate=dataclasses.replace(CONFIG.evaluate, batch_size=4))
    return dataclasses.replace(
        context, config=config, run=dataclasses.replace(context.run, fields={"split": "validation", "n_samples": 0, "max_new_tokens": 5})
    )


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_killed_evaluation_goes_on_to_the_same_bytes(context, monkeypatch, tmp_path, split):
    """After the first batch it is cut off; the second time it generates the rest alone."""
    context = on_validation(context) if split == "validation" else context
    whole = _evaluated(context, tmp_path / "whole")
    generated = []

    def counting(model, prompts, **options):
        for indices, found in completions(model, prompts, **options):
            generated.append(indices)
            yield indices, found
            if options.get("skip") == frozenset() and cut:
                raise KeyboardInterrupt

    completions = evaluate.completions
    monkeypatch.setattr(evaluate, "completions", counting)
    cut = True
    with pytest.raises(KeyboardInterrupt):
        _evaluated(context, tmp_path / "again")
    assert (tmp_path / "again" / "generated.jsonl").is_file() and not (tmp_path / "again" / "completions.jsonl").exists()
    first, cut = list(generated), False
    assert _evaluated(context, tmp_path / "again") == whole
    assert len(first) == 1 and sorted(i for batch in generated for i in batch) == list(range(9))


@pytest.mark.parametrize(
    "line", [b"[]", b"{}", b"\xff", b'{"problem": 1e9}', b'{"problem": 99, "texts": [], "ended": []}', b'{"problem": true, "texts": 3}']
)
def test_a_damaged_line_of_what_was_generated_is_generated_again_with_all_after_it(context, monkeypatch, tmp_path, line):
    whole, graded = _evaluated(context, tmp_path / "whole"), evaluate.graded

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "graded", killed)
    with pytest.raises(KeyboardInterrupt):
        _evaluated(context, tmp_path / "harmed")
    log = tmp_path / "harmed" / "generated.jsonl"
    rows = log.read_bytes().splitlines()
    log.write_bytes(b"\n".join([*rows[:2], line, *rows[3:]]) + b"\n")
    monkeypatch.setattr(evaluate, "graded", graded)
    said, real = [], evaluate.log.info
    monkeypatch.setattr(evaluate.log, "info", lambda text, *values: said.append(text % values) or real(text, *values))
    assert _evaluated(context, tmp_path / "harmed") == whole
    assert "resumes after 2 of 9 problems" in said


def test_members_together_write_what_each_writes_alone_also_after_kills(context, monkeypatch, tmp_path):
    """Killed once in the middle, and once when one member has lost the last batch of its log."""
    other = tmp_path / "other"
    shutil.copytree(context.parents["model"], other)
    shutil.rmtree(other / "checkpoints")
    with Checkpoints(other / "checkpoints") as checkpoints:
        checkpoints.save(0, init_params(CONFIG.model, 1))
    RunDirectory(other).finish({})
    both = [context, dataclasses.replace(context, parents=context.parents | {"model": other})]
    alone = [_evaluated(one, tmp_path / f"alone{number}") for number, one in enumerate(both)]
    assert alone[0] != alone[1]
    generated, real = [], evaluate.completions_of_members

    def counting(config, params, members, prompts, **options):
        for indices, found in real(config, params, members, prompts, **options):
            yield indices, found
            generated.append(indices)
            if cut and len(generated) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "completions_of_members", counting)
    folders, cut = [tmp_path / "a", tmp_path / "b"], True
    with pytest.raises(KeyboardInterrupt):
        _evaluated_together(both, folders)
    kept = (folders[1] / "generated.jsonl").read_text().splitlines(keepends=True)
    assert len(kept) == 8
    (folders[1] / "generated.jsonl").write_text("".join(kept[:4]))
    cut = False
    assert _evaluated_together(both, folders) == alone
    assert [sorted(indices) for indices in generated] == [[0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7], [8]]
    assert not any((folder / "generated.jsonl").exists() for folder in folders)


def _evaluated_together(contexts, folders):
    with contextlib.ExitStack() as stack:
        directories = [stack.enter_context(RunDirectory(path).work(one.run, one.config)) for one, path in zip(contexts, folders)]
        runs = [dataclasses.replace(one.run, name=f"{one.run.name}-{i}") for i, one in enumerate(contexts)]
        stage.run_batch([Context(one.config, run, directory, one.parents) for one, run, directory in zip(contexts, runs, directories)])
    return [[(path / name).read_bytes() for name in ("problems.jsonl", "completions.jsonl")] for path in folders]


def _evaluated(context, path):
    with RunDirectory(path).work(context.run, context.config) as directory:
        stage.run(Context(context.config, context.run, directory, context.parents))
    return [(path / name).read_bytes() for name in ("problems.jsonl", "completions.jsonl")]


@pytest.mark.parametrize("bos", [None, "<|pad|>"])
@pytest.mark.parametrize("faithful", [False, True])
def test_prompts_begin_with_the_beginning_of_text_in_faithful_studies_only(context, monkeypatch, faithful, bos):
    """And only where the tokenizer has such a token."""
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"} | ({"bos_token": bos} if bos else {})
    (context.parents["model"] / "tokenizer_config.json").write_text(json.dumps(special))
    read = []
    one = Completion([2], True)
    monkeypatch.setattr(
        evaluate, "completions", lambda model, prompts, **options: read.extend(prompts) or [(range(len(prompts)), [[one] * 5 for _ in prompts])]
    )
    (context.directory.path / DONE).unlink(missing_ok=True)
    with context.directory.work(context.run, context.config) as directory:
        stage.run(Context(dataclasses.replace(CONFIG, faithful=faithful), context.run, directory, context.parents))
    (context.parents["model"] / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.load(context.parents["model"])
    plain = [tokenizer.encode(f"Human: Text {i}?\nAssistant:") for i in range(9)]
    assert read == [[1, *tokens] if faithful and bos else tokens for tokens in plain]


@pytest.mark.parametrize("faithful", [False, True])
def test_prompts_begin_as_the_tokenizer_begins_a_text_outside_faithful_studies(context, monkeypatch, faithful):
    path, read = context.parents["model"] / "tokenizer.json", []
    plain = path.read_text()
    ruled = tokenizers.Tokenizer.from_str(plain)
    ruled.post_processor = processors.TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", 1)])
    monkeypatch.setattr(
        evaluate, "completions", lambda model, prompts, **options: read.extend(prompts) or [(range(len(prompts)), [[Completion([2], True)] * 5] * 9)]
    )
    model = RunDirectory(context.parents["model"])
    path.write_text(ruled.to_str())
    model.finish(model.results())
    (context.directory.path / DONE).unlink(missing_ok=True)
    with context.directory.work(context.run, context.config) as directory:
        stage.run(Context(dataclasses.replace(CONFIG, faithful=faithful), context.run, directory, context.parents))
    path.write_text(plain)
    model.finish(model.results())
    assert read == [ruled.encode(f"Human: Text {i}?\nAssistant:", add_special_tokens=not faithful).ids for i in range(9)]
    assert read[0][0] == 1 or faithful


def test_a_model_without_tokenizer_is_refused(context):
    (context.parents["model"] / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json"):
        stage.run(context)
