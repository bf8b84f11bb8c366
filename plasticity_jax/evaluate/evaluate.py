"""Evaluation: one model, one task, its rows answered and graded."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from plasticity_jax.config import EvaluateConfig
from plasticity_jax.data.tasks import Example, Task, format_prompt
from plasticity_jax.evaluate.answers import extract_answer
from plasticity_jax.evaluate.generate import Sampling, completions, count_cut, cut_at_stop, decoding_params, stop_check
from plasticity_jax.evaluate.grading import Grading
from plasticity_jax.evaluate.metrics import failures, macro_average, metrics
from plasticity_jax.evaluate.options import Choice, choose
from plasticity_jax.model.forward import Forward
from plasticity_jax.model.load import LoadedModel
from plasticity_jax.parallel import processes
from plasticity_jax.runs.directory import COMPLETIONS, OPTIONS, PROBLEMS
from plasticity_jax.runs.jsonfiles import to_json, write_jsonl
from plasticity_jax.runs.logs import AppendLog, read_log, remove_log
from plasticity_jax.runs.storage import AnyPath

log = logging.getLogger("plasticity_jax")

GENERATED = "generated.jsonl"  # what has been generated so far; gone once it is graded


@dataclass(frozen=True)
class Protocol:
    """How completions are generated, besides what `EvaluateConfig` says.

    Attributes:
      n_samples: sampled completions per problem, besides the greedy one.
      max_new_tokens: token limit of a completion.
      faithful: the original's quirks, see docs/decisions.md.
    """

    n_samples: int
    max_new_tokens: int
    faithful: bool


def evaluate(
    model: LoadedModel,
    task: Task,
    problems: Sequence[Example],
    settings: EvaluateConfig,
    protocol: Protocol,
    *,
    forward: Forward,
    folder: AnyPath,
    what: str,
) -> dict[str, Any]:
    """Scores a model on problems; base and fine-tuned models in exactly the same way.

    Writes problems.jsonl, one line per problem: id, prompt (as the model read it), problem (without the template), gold, subset, source_split; and
    completions.jsonl, one line per completion, problem by problem: id, sample (0 is greedy, then 1 to n), text, answer (None where none was found),
    verdict ("right", "wrong", "no answer", "timed out"), correct, ended (by itself, not by the token limit), majority (whether the majority chose
    it). Where options are compared, options.jsonl takes the place of completions: id, options, log_likelihoods (nats), right and chosen (places),
    correct. A killed run resumes after the last batch that it generated.

    Args:
      model: with a tokenizer.
      problems: rows of the task.
      forward: how to run the model.
      folder: the run's directory.
      what: is being done, for the progress.
    Returns:
      On the first process (empty on the others): metrics (see `metrics.metrics`; "accuracy" and "accuracy_by_length" where options are compared),
      problems, n_samples, failures (fractions of wrong, unanswered and timed-out completions: greedy, samples), per_problem (greedy 0/1, samples
      number right, majority 0/1), subsets (test set → its metrics), macro (their mean), majority_class (accuracy of always giving the most common
      gold answer), cut_prompts (how many lost their beginning), unended (fraction of completions at the token limit), source_splits (of the rows).
    """
    if task.grader == "likelihood":
        results = _compare_options(model, task, problems, settings.batch_size, protocol.faithful, forward, folder, what)
    else:
        results = _answer(model, task, problems, settings, protocol, forward, folder, what)
    if not processes.primary():  # the first process grades and writes
        return {}
    log.info("%s: %s", what, ", ".join(f"{name} {value:.3f}" for name, value in results["metrics"].items()))
    return results | {"source_splits": sorted({problem.source_split for problem in problems})}


# -------------------------------------------------------------------------------------------------------------------------- completions


def _answer(
    model: LoadedModel,
    task: Task,
    problems: Sequence[Example],
    settings: EvaluateConfig,
    protocol: Protocol,
    forward: Forward,
    folder: AnyPath,
    what: str,
) -> dict[str, Any]:
    prompts = [format_prompt(problem.prompt) for problem in problems]
    begin = model.text_tokenizer.before_prompts(faithful=protocol.faithful)
    tokens = [[*begin, *prompt] for prompt in model.text_tokenizer.encode_batch(prompts)]
    generated = _generate(model, tokens, settings, protocol, forward, folder / GENERATED, what)
    if not processes.primary():
        return {}
    texts = [[cut_at_stop(text, settings.stop) for text in generated[i]["texts"]] for i in range(len(problems))]
    rows = graded(problems, texts, [generated[i]["ended"] for i in range(len(problems))], task, protocol.faithful, settings.grade_workers)
    _write_problems(folder, problems, prompts)
    write_jsonl(folder / COMPLETIONS, rows)
    remove_log(folder / GENERATED)
    cut = count_cut(tokens, settings.prompt_buckets)
    if cut:
        longest = settings.prompt_buckets[-1]
        log.warning("%s: %d prompts are longer than %d tokens (evaluate.prompt_buckets) and lost their beginning", what, cut, longest)
    return summarized(problems, rows) | {"n_samples": protocol.n_samples, "cut_prompts": cut}


def _generate(
    model: LoadedModel,
    tokens: Sequence[Sequence[int]],
    settings: EvaluateConfig,
    protocol: Protocol,
    forward: Forward,
    path: AnyPath,
    what: str,
) -> dict[int, dict[str, Any]]:
    """Position of a problem → its completions, the greedy one first: texts, and which of them ended by themselves. Resumes an interrupted run."""
    done = {row["problem"]: row for row in processes.broadcast(lambda: read_log(path))}
    if done:
        log.info("resumes after %d of %d problems", len(done), len(tokens))
    store = AppendLog(path, keep=lambda row: True) if processes.primary() else None

    batches = completions(
        (model.config, decoding_params(model.params, forward.mesh)),
        tokens,
        sampling=Sampling.of(settings, protocol.n_samples),
        max_new_tokens=protocol.max_new_tokens,
        buckets=settings.prompt_buckets,
        batch_size=settings.batch_size,
        eos_id=model.text_tokenizer.eos_ids,
        pad_id=model.text_tokenizer.pad_id,
        compute_dtype=forward.compute_dtype,
        what=what,
        mesh=forward.mesh,
        skip=frozenset(done),
        is_end=stop_check(model.text_tokenizer, settings.stop),
    )
    for indices, of_batch in batches:
        if store is None:
            continue
        for index, of_problem in zip(indices, of_batch, strict=True):
            done[index] = {
                "problem": index,
                "texts": [model.text_tokenizer.decode(completion.tokens) for completion in of_problem],
                "ended": [completion.ended for completion in of_problem],
            }
            store.append(to_json(done[index]))
        store.close_part()
    if store is not None:
        store.close()
    return done


def graded(
    problems: Sequence[Example], texts: Sequence[Sequence[str]], ended: Sequence[Sequence[bool]], task: Task, faithful: bool, workers: int
) -> list[dict[str, Any]]:
    """Grades each problem's completions, the greedy one first; returns the rows of completions.jsonl."""
    flat = [(extract_answer(text), problem.answer) for problem, of_problem in zip(problems, texts) for text in of_problem]
    with Grading(task.grader, faithful=faithful, workers=workers) as grading:
        verdicts = iter(grading.judge(flat))
        chosen = grading.majority([of_problem[1:] for of_problem in texts])
    answers, rows = iter(flat), []
    for problem, of_problem, ends, majority in zip(problems, texts, ended, chosen, strict=True):
        for sample, (text, end) in enumerate(zip(of_problem, ends, strict=True)):
            verdict = next(verdicts)
            rows.append(
                {
                    "id": problem.id,
                    "sample": sample,
                    "text": text,
                    "answer": next(answers)[0],
                    "verdict": verdict,
                    "correct": verdict == "right",
                    "ended": end,
                    "majority": sample == majority + 1,
                }
            )
    return rows


def summarized(problems: Sequence[Example], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The results that follow from the rows of completions.jsonl. All problems have the same number of samples."""
    width = len(rows) // len(problems)
    correct = np.array([row["correct"] for row in rows]).reshape(-1, width)
    chosen = np.array([row["majority"] for row in rows]).reshape(-1, width)
    greedy, sampled, majority = correct[:, 0], correct[:, 1:], np.asarray((correct & chosen).any(axis=1))
    subsets = _by_subset(problems, lambda held: metrics(greedy[held], sampled[held], majority[held]))
    return {
        "metrics": metrics(greedy, sampled, majority),
        "problems": len(problems),
        "failures": {
            "greedy": failures([row["verdict"] for row in rows if row["sample"] == 0]),
            "samples": failures([row["verdict"] for row in rows if row["sample"] > 0]),
        },
        "per_problem": {"greedy": greedy.astype(int), "samples": sampled.sum(axis=1), "majority": majority.astype(int)},
        "unended": float(np.mean([not row["ended"] for row in rows])),
        "majority_class": Counter(problem.answer for problem in problems).most_common(1)[0][1] / len(problems),
        **subsets,
    }


# ------------------------------------------------------------------------------------------------------------------------------ options


def _compare_options(
    model: LoadedModel, task: Task, problems: Sequence[Example], batch_size: int, faithful: bool, forward: Forward, folder: AnyPath, what: str
) -> dict[str, Any]:
    choices = choose(model, model.text_tokenizer, problems, forward=forward, batch_size=batch_size, faithful=faithful, what=what)
    if not processes.primary():
        return {}
    right = [problem.options.index(problem.response) for problem in problems]
    rows = [_option_row(problem, choice, place, task.by_length) for problem, choice, place in zip(problems, choices, right, strict=True)]
    _write_problems(folder, problems, [format_prompt(problem.prompt) for problem in problems])
    write_jsonl(folder / OPTIONS, rows)
    by = {
        "accuracy": np.array([choice.best for choice in choices]) == right,
        "accuracy_by_length": np.array([choice.best_by_length for choice in choices]) == right,
    }
    counted = by["accuracy_by_length" if task.by_length else "accuracy"]
    nothing = {"wrong": float(1 - counted.mean()), "no answer": 0.0, "timed out": 0.0}
    return {
        "metrics": {name: float(correct.mean()) for name, correct in by.items()},
        "problems": len(problems),
        "n_samples": 0,
        "failures": {"greedy": nothing},
        "per_problem": {"greedy": counted.astype(int)},
        "majority_class": Counter(right).most_common(1)[0][1] / len(right),
        **_by_subset(problems, lambda held: {name: float(correct[held].mean()) for name, correct in by.items()}),
    }


def _option_row(problem: Example, choice: Choice, right: int, by_length: bool) -> dict[str, Any]:
    chosen = choice.best_by_length if by_length else choice.best
    return {
        "id": problem.id,
        "options": problem.options,
        "log_likelihoods": choice.log_likelihoods,
        "right": right,
        "chosen": chosen,
        "correct": chosen == right,
    }


# -------------------------------------------------------------------------------------------------------------------------------- both


def _by_subset(problems: Sequence[Example], scores_of: Any) -> dict[str, Any]:
    """Metrics of each test set, and their mean over the sets; {} for a task with one test set."""
    names = np.array([problem.subset for problem in problems])
    found = {name: scores_of(names == name) for name in sorted(set(names.tolist())) if name}
    return (
        {"subsets": {name: scores | {"problems": int((names == name).sum())} for name, scores in found.items()}, "macro": macro_average(found)}
        if found
        else {}
    )


def _write_problems(folder: AnyPath, problems: Sequence[Example], prompts: Sequence[str]) -> None:
    write_jsonl(
        folder / PROBLEMS,
        [
            {
                "id": problem.id,
                "prompt": prompt,
                "problem": problem.prompt,
                "gold": problem.answer,
                "subset": problem.subset,
                "source_split": problem.source_split,
            }
            for problem, prompt in zip(problems, prompts, strict=True)
        ],
    )
