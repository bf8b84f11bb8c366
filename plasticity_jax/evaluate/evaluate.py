"""Evaluation: one model, one task, its rows answered and graded."""

import functools
import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from plasticity_jax.config import EvaluateConfig
from plasticity_jax.data.tasks import Example, Task, format_prompt
from plasticity_jax.evaluate.answers import answer_of, grader_for
from plasticity_jax.evaluate.generate import (
    Completion,
    Sampling,
    completions,
    completions_of_members,
    count_cut,
    cut_at_stop,
    layout_for,
    placed,
    stacked,
    stop_check,
)
from plasticity_jax.evaluate.grading import Grading
from plasticity_jax.evaluate.metrics import failures, macro_average, metrics
from plasticity_jax.evaluate.options import Choice, choose
from plasticity_jax.model.forward import Forward
from plasticity_jax.model.load import LoadedModel
from plasticity_jax.parallel import processes
from plasticity_jax.runs.directory import COMPLETIONS, OPTIONS, PROBLEMS
from plasticity_jax.runs.jsonfiles import damaged, iter_jsonl, to_json, write_jsonl
from plasticity_jax.runs.logs import AppendLog, read_whole_rows, remove_log
from plasticity_jax.runs.storage import AnyPath

log = logging.getLogger("plasticity_jax")

GENERATED = "generated.jsonl"  # what has been generated so far; gone once it is graded


@dataclass(frozen=True)
class Protocol:
    """How completions are generated, besides what `EvaluateConfig` says.

    Attributes:
      n_samples: sampled completions per problem, besides the greedy one; may be 0.
      max_new_tokens: most tokens of a completion; None: as many as `evaluate.max_length` leaves after the prompt.
      faithful: the original's quirks, see docs/decisions.md.
    """

    n_samples: int
    max_new_tokens: int | None
    faithful: bool


@dataclass(frozen=True)
class Scored:
    """A model to score.

    Attributes:
      model: with a tokenizer.
      folder: the run's directory.
      name: of the run, for the progress.
    """

    model: LoadedModel
    folder: AnyPath
    name: str


def evaluate(
    models: Sequence[Scored], task: Task, problems: Sequence[Example], settings: EvaluateConfig, protocol: Protocol, *, forward: Forward
) -> list[dict[str, Any]]:
    """Scores models on problems; base and fine-tuned models in exactly the same way.

    Several models generate as one program, over a member axis; each gets the completions that it gets by itself, to rounding. Where options are
    compared, they are scored one by one.

    Writes problems.jsonl, one line per problem: id, prompt (as the model read it), problem (without the template), gold, subset, source_split; and
    completions.jsonl, one line per completion, problem by problem: id, sample (0 is greedy, then 1 to n), text, answer (None where none was found),
    verdict ("right", "wrong", "no answer", "timed out"), correct, ended (by itself, not by the token limit), majority (whether the majority chose
    it). Where options are compared, options.jsonl takes the place of completions: id, options, log_likelihoods (nats), right and chosen (places),
    correct. A killed run resumes after the last batch that it generated.

    Args:
      models: of one network and tokenizer.
      problems: rows of the task.
      forward: how to run the models.
    Returns:
      For each model, on the first process (empty on the others): metrics (see `metrics.metrics`; "accuracy", "acc_norm" and "acc_bytes" where options
      are compared), problems, n_samples, failures (fractions of wrong, unanswered and timed-out completions: greedy, samples), per_problem (greedy 0/1,
      samples number right, majority 0/1; the last two where there are samples), subsets (test set → its metrics), macro (their mean), majority_class
      (accuracy of always giving the most common gold answer), cut_prompts (how many lost their beginning), unended (fraction of completions at a
      token limit), source_splits (of the rows).
    """
    if task.grader == "likelihood":
        found = [_compare_options(scored, task, problems, settings.batch_size, protocol.faithful, forward) for scored in models]
    else:
        found = _answer(models, task, problems, settings, protocol, forward)
    if not processes.primary():  # the first process grades and writes
        return [{} for _ in models]
    splits = {"source_splits": sorted({problem.source_split for problem in problems})}
    for scored, results in zip(models, found, strict=True):
        log.info("%s: %s", scored.name, ", ".join(f"{name} {value:.3f}" for name, value in results["metrics"].items()))
    return [results | splits for results in found]


# -------------------------------------------------------------------------------------------------------------------------- completions


def _answer(
    models: Sequence[Scored], task: Task, problems: Sequence[Example], settings: EvaluateConfig, protocol: Protocol, forward: Forward
) -> list[dict[str, Any]]:
    prompts = [format_prompt(problem.prompt) for problem in problems]
    tokenizer = models[0].model.text_tokenizer
    begin = tokenizer.before_prompts(faithful=protocol.faithful)
    tokens = [[*begin, *prompt] for prompt in tokenizer.encode_batch(prompts)]
    of_models = _generate(models, tokens, settings, protocol, forward)
    if not processes.primary():
        return [{} for _ in models]
    cut = count_cut(tokens, settings.paddings[-1])
    if cut:
        names = ", ".join(scored.name for scored in models)
        log.warning("%s: %d prompts leave no room within evaluate.max_length=%d and lost their beginning", names, cut, settings.max_length)
    results = []
    for scored, generated in zip(models, of_models, strict=True):
        texts = [[cut_at_stop(text, settings.stop) for text in generated[i]["texts"]] for i in range(len(problems))]
        rows = graded(problems, texts, [generated[i]["ended"] for i in range(len(problems))], task, protocol.faithful, settings.grade_workers)
        _write_problems(scored.folder, problems, prompts)
        write_jsonl(scored.folder / COMPLETIONS, rows)
        results.append(summarized(problems, rows) | {"n_samples": protocol.n_samples, "cut_prompts": cut})
    for scored in models:  # only now, so that a kill in between loses none
        remove_log(scored.folder / GENERATED)
    return results


Generated = dict[int, dict[str, Any]]  # position of a problem → its completions, the greedy one first: texts, and which of them ended by themselves


def _generate(
    models: Sequence[Scored], tokens: Sequence[Sequence[int]], settings: EvaluateConfig, protocol: Protocol, forward: Forward
) -> list[Generated]:
    """The completions of each model. Resumes an interrupted run: what every model has is not generated again, and what one has is kept."""
    whole = functools.partial(_is_whole, problems=len(tokens), completions=protocol.n_samples + 1)
    logs = processes.broadcast(lambda: [list(itertools.takewhile(whole, read_whole_rows(one.folder / GENERATED))) for one in models])
    found: list[Generated] = [{row["problem"]: row for row in of_model} for of_model in logs]
    skip = frozenset.intersection(*(frozenset(of_model) for of_model in found))
    if any(found):
        log.info("resumes after %d of %d problems", len(skip), len(tokens))
    stores = [AppendLog(one.folder / GENERATED, keep=whole) for one in models] if processes.primary() else []
    tokenizer = models[0].model.text_tokenizer
    for indices, of_models in _completed(models, tokens, settings, protocol, forward, skip):
        if not stores:  # the first process keeps them
            continue
        for store, of_model, completed in zip(stores, found, of_models, strict=True):
            for index, of_problem in zip(indices, completed, strict=True):
                if index not in of_model:
                    texts = [tokenizer.decode(completion.tokens) for completion in of_problem]
                    of_model[index] = {"problem": index, "texts": texts, "ended": [completion.ended for completion in of_problem]}
                    store.append(to_json(of_model[index]))
            store.close_part()
    for store in stores:
        store.close()
    return found


def _is_whole(row: dict[str, Any], *, problems: int, completions: int) -> bool:
    """Whether a row of a log, which may have been damaged since, holds all completions of a problem."""
    problem, texts, ended = row.get("problem"), row.get("texts"), row.get("ended")
    return (
        type(problem) is int
        and 0 <= problem < problems
        and isinstance(texts, list)
        and isinstance(ended, list)
        and [type(text) for text in texts] == [str] * completions
        and [type(one) for one in ended] == [bool] * completions
    )


def _completed(
    models: Sequence[Scored],
    tokens: Sequence[Sequence[int]],
    settings: EvaluateConfig,
    protocol: Protocol,
    forward: Forward,
    skip: frozenset[int],
) -> Iterator[tuple[list[int], list[list[list[Completion]]]]]:
    """Indices of the prompts in a batch, and for each model the completions of each prompt."""
    model = models[0].model
    layout = layout_for(settings.weights, model.config, forward)
    how: dict[str, Any] = {
        "sampling": Sampling.of(settings, protocol.n_samples),
        "max_new_tokens": protocol.max_new_tokens,
        "max_length": settings.max_length,
        "buckets": settings.paddings,
        "batch_size": settings.batch_size,
        "eos_id": model.text_tokenizer.eos_ids,
        "pad_id": model.text_tokenizer.pad_id,
        "compute_dtype": forward.compute_dtype,
        "what": ", ".join(scored.name for scored in models),
        "layout": layout,
        "skip": skip,
        "is_end": stop_check(model.text_tokenizer, settings.stop),
    }
    if len(models) > 1:
        yield from completions_of_members(model.config, stacked([one.model.params for one in models], layout), len(models), tokens, **how)
        return
    for indices, completed in completions((model.config, placed(model.params, layout)), tokens, **how):
        yield indices, [completed]


def graded(
    problems: Sequence[Example], texts: Sequence[Sequence[str]], ended: Sequence[Sequence[bool]], task: Task, faithful: bool, workers: int
) -> list[dict[str, Any]]:
    """Grades each problem's completions, the greedy one first; returns the rows of completions.jsonl."""
    grader = grader_for(task, [problem.answer for problem in problems])
    flat = [(answer_of(text, grader, faithful=faithful), problem.answer) for problem, of_problem in zip(problems, texts) for text in of_problem]
    with Grading(grader, faithful=faithful, workers=workers) as grading:
        verdicts = iter(grading.judge(flat))
        samples = [of_problem[1:] for of_problem in texts]
        chosen = grading.majority(samples) if any(samples) else [None] * len(texts)
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
                    "majority": majority is not None and sample == majority + 1,
                }
            )
    return rows


def regraded(source: AnyPath, folder: AnyPath, task: Task, faithful: bool, workers: int) -> dict[str, Any]:
    """Grades the completions in one run's directory again, into another's: problems.jsonl, completions.jsonl, and the results that follow from them."""
    about, before = list(iter_jsonl(source / PROBLEMS)), list(iter_jsonl(source / COMPLETIONS))
    with damaged(source / COMPLETIONS):
        problems = [
            Example(row["id"], row["problem"], "", row["gold"], "", row["source_split"], row["subset"])  # graders read no more
            for row in about
        ]
        width = len(before) // len(problems)
        texts, ended = (
            [[row[name] for row in before[first : first + width]] for first in range(0, len(before), width)] for name in ("text", "ended")
        )
    rows = graded(problems, texts, ended, task, faithful, workers)
    write_jsonl(folder / PROBLEMS, about)
    write_jsonl(folder / COMPLETIONS, rows)
    return summarized(problems, rows)


def summarized(problems: Sequence[Example], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The results that follow from the rows of completions.jsonl. All problems have the same number of samples, or none."""
    width = len(rows) // len(problems)
    correct = np.array([row["correct"] for row in rows]).reshape(-1, width)
    chosen = np.array([row["majority"] for row in rows]).reshape(-1, width)
    greedy, sampled, majority = correct[:, 0], correct[:, 1:], np.asarray((correct & chosen).any(axis=1))

    def scores(held: Any) -> dict[str, float]:
        return metrics(greedy[held], sampled[held], majority[held]) if width > 1 else {"pass@1": float(greedy[held].mean())}

    return {
        "metrics": scores(slice(None)),
        "problems": len(problems),
        "failures": {"greedy": failures([row["verdict"] for row in rows if row["sample"] == 0])}
        | ({"samples": failures([row["verdict"] for row in rows if row["sample"] > 0])} if width > 1 else {}),
        "per_problem": {"greedy": greedy.astype(int)} | ({"samples": sampled.sum(axis=1), "majority": majority.astype(int)} if width > 1 else {}),
        "unended": float(np.mean([not row["ended"] for row in rows])),
        "majority_class": Counter(problem.answer for problem in problems).most_common(1)[0][1] / len(problems),
        **_by_subset(problems, scores),
    }


# ------------------------------------------------------------------------------------------------------------------------------ options


def _compare_options(scored: Scored, task: Task, problems: Sequence[Example], batch_size: int, faithful: bool, forward: Forward) -> dict[str, Any]:
    model, folder = scored.model, scored.folder
    choices = choose(model, model.text_tokenizer, problems, forward=forward, batch_size=batch_size, faithful=faithful, what=scored.name)
    if not processes.primary():
        return {}
    right = [problem.options.index(problem.response) for problem in problems]
    rows = [_option_row(problem, choice, place, task.by_length) for problem, choice, place in zip(problems, choices, right, strict=True)]
    _write_problems(folder, problems, [format_prompt(problem.prompt) for problem in problems])
    write_jsonl(folder / OPTIONS, rows)
    by = {
        "accuracy": np.array([choice.best for choice in choices]) == right,
        "acc_norm": np.array([choice.best_by_length for choice in choices]) == right,
        "acc_bytes": np.array([choice.best_by_bytes for choice in choices]) == right,
    }
    counted = by["acc_norm" if task.by_length else "accuracy"]
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
