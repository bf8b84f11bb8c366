"""The evaluate stage: one model, one task, greedy and sampled completions of its test rows, graded."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from plasticity_jax.data.tasks import Example, format_prompt, get_task, read_task
from plasticity_jax.errors import UserError
from plasticity_jax.evaluate.answers import extract_answer, judge, majority_index
from plasticity_jax.evaluate.generate import count_cut, cut_at_stop, generate
from plasticity_jax.evaluate.metrics import metrics
from plasticity_jax.model.load import load_model
from plasticity_jax.parallel import arrays, processes
from plasticity_jax.parallel.mesh import make_mesh
from plasticity_jax.parallel.sharding import inference_shardings
from plasticity_jax.records import Context, write_jsonl

log = logging.getLogger("plasticity_jax")

COMPLETIONS = "completions.jsonl"


def run(context: Context) -> dict[str, Any]:
    """Scores the model of the parent "model" on the test rows of the parent "task"; base and fine-tuned models in exactly the same way.

    Writes completions.jsonl, one row per problem: id, prompt (as the model read it), gold, greedy {text, answer, correct}, samples (a list of the
    same), majority (index of the sample that the majority chose).

    Returns:
      metrics (see `metrics.metrics`), problems, n_samples, no_answer (share of completions without an answer: greedy, samples), per_problem
      (greedy 0/1, samples number right, majority 0/1), majority_class (accuracy of always giving the most common gold answer), cut_prompts (how
      many lost their beginning), seconds (generation and grading), diverged (None), source_splits (of the test rows, where they were published).
    Raises:
      UserError: a parent that is damaged, or a model without a tokenizer.
    """
    start = time.monotonic()
    settings, task = context.config.evaluate, get_task(context.run.task)
    model = load_model(context.parents["model"])
    if model.tokenizer is None:
        raise UserError(f"{context.parents['model']} has no tokenizer.json, so no text can be generated; put the model's tokenizer there.")
    _, problems = read_task(context.parents["task"])
    prompts = [format_prompt(problem.prompt) for problem in problems]
    prompt_tokens = model.tokenizer.encode_batch(prompts)
    if context.config.faithful and model.tokenizer.bos_id is not None:
        # The original's tokenizer put it before prompts here, though not before the rows of fine-tuning. Source: paper section 4.1.
        prompt_tokens = [[model.tokenizer.bos_id, *tokens] for tokens in prompt_tokens]
    mesh = make_mesh(context.config.mesh)
    mesh = mesh if mesh.size > 1 else None
    params = model.params if mesh is None else arrays.put(model.params, inference_shardings(mesh, model.params))
    completions = generate(
        (model.config, params),
        prompt_tokens,
        max_new_tokens=context.config.tasks[task.name].max_new_tokens,
        n_samples=settings.n_samples,
        temperature=settings.temperature,
        seed=settings.seed,
        buckets=settings.prompt_buckets,
        batch_size=settings.batch_size,
        eos_id=model.tokenizer.eos_id,
        pad_id=model.tokenizer.pad_id,
        compute_dtype=context.config.train.compute_dtype,
        greedy_first=True,
        what=f"evaluate {context.run.name}",
        mesh=mesh,
    )
    if not processes.primary():  # the first process grades and writes
        return {}
    texts = [[cut_at_stop(model.tokenizer.decode(tokens)) for tokens in of_problem] for of_problem in completions]
    rows = [graded(problem, prompt, of_problem, task.grader) for problem, prompt, of_problem in zip(problems, prompts, texts)]
    write_jsonl(context.directory.path / COMPLETIONS, rows)
    context.directory.provenance["device"] = jax.devices()[0].device_kind
    results = summarised(rows) | {
        "n_samples": settings.n_samples,
        "cut_prompts": count_cut(prompt_tokens, settings.prompt_buckets),
        "seconds": time.monotonic() - start,
        "diverged": None,
        "source_splits": sorted({problem.source_split for problem in problems}),
    }
    log.info("evaluate %s: %s", context.run.name, ", ".join(f"{name} {value:.3f}" for name, value in results["metrics"].items()))
    return results


def graded(problem: Example, prompt: str, texts: Sequence[str], grader: str) -> dict[str, Any]:
    """A row of completions.jsonl from a problem's completions, the greedy one first."""
    verdicts = []
    for text in texts:
        answer = extract_answer(text)
        verdicts.append({"text": text, "answer": answer, "correct": judge(answer, problem.answer, grader)})
    greedy, *samples = verdicts
    return {"id": problem.id, "prompt": prompt, "gold": problem.answer, "greedy": greedy, "samples": samples,
            "majority": majority_index(texts[1:], grader)}


def summarised(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What follows from the rows of completions.jsonl alone."""
    greedy = np.array([row["greedy"]["correct"] for row in rows])
    sampled = np.array([[sample["correct"] for sample in row["samples"]] for row in rows])
    majority = np.array([row["samples"][row["majority"]]["correct"] for row in rows])
    return {
        "metrics": metrics(greedy, sampled, majority),
        "problems": len(rows),
        "no_answer": {
            "greedy": float(np.mean([row["greedy"]["answer"] is None for row in rows])),
            "samples": float(np.mean([sample["answer"] is None for row in rows for sample in row["samples"]])),
        },
        "per_problem": {"greedy": greedy.astype(int), "samples": sampled.sum(axis=1), "majority": majority.astype(int)},
        "majority_class": Counter(row["gold"] for row in rows).most_common(1)[0][1] / len(rows),
    }
