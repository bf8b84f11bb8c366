"""The prepare stage: one run each for the corpus, every task and every probe set."""

from pathlib import Path
from typing import Any

from plasticity_jax.config import StudyConfig
from plasticity_jax.data.wheels import Wheels
from plasticity_jax.runs.records import Context
from plasticity_jax.runs.storage import staging

SEED = 0  # of the choice of rows; fixed, so that a task's rows depend on its settings alone


def wheels_dir(folder: str) -> Path:
    """The folder of the pinned wheels: a relative path is looked for below the current folder, then in the project's checkout."""
    path = Path(folder).expanduser()
    checkout = Path(__file__).resolve().parents[2] / path
    return checkout if not path.is_dir() and checkout.is_dir() else path


def run(context: Context) -> dict[str, Any]:
    """Carries out one prepare run; its summary, with a content fingerprint, is the result."""
    # Record files and data sets are written by libraries that know local files alone.
    with staging(context.directory.path) as out:
        return _prepare(context, out)


def _prepare(context: Context, out: Path) -> dict[str, Any]:
    from plasticity_jax.data import probe_sets, tasks

    config, fields = context.config, context.run.fields
    folder = wheels_dir(config.data.wheels)
    if fields["kind"] == "corpus":
        summary = _corpus(config, out, Wheels(folder))
        context.directory.provenance["data_fingerprint"] = summary["fingerprint"]
        return summary
    rows = {name: fields[name] for name in ("train_rows", "test_rows", "held_out_fraction")}
    if fields["kind"] == "task":
        settings = config.tasks[context.run.task]
        task = tasks.build_task(context.run.task, Wheels(folder), **rows, seed=SEED, verifier_rows=settings.verifier_rows, files=settings.files)
        return tasks.write_task(out, task)
    return probe_sets.write_probe_set(out, probe_sets.build_probe_set(fields["set"], Wheels(folder), **rows, seed=SEED))


def _corpus(config: StudyConfig, out: Path, wheels: Wheels) -> dict[str, Any]:
    from plasticity_jax.data.named_tokenizers import open_tokenizer
    from plasticity_jax.data.prepare import prepare_corpus
    from plasticity_jax.data.streaming import open_corpus, prepare_stream

    data, vocab_size, seq_len = config.data, config.model.vocab_size, config.train.seq_len
    tokenizer = open_tokenizer(data.tokenizer, wheels, vocab_size=vocab_size)
    if data.files is None and data.tfds is None:
        return prepare_corpus(
            out,
            sources=data.sources,
            wheels_dir=wheels.directory,
            held_out_fraction=data.held_out_fraction,
            max_documents=data.max_documents,
            vocab_size=vocab_size,
            seq_len=seq_len,
            tokenizer=tokenizer,
        )
    return prepare_stream(
        out,
        open_corpus(files=data.files, tfds=data.tfds, tfds_split=data.tfds_split, text_field=data.text_field),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        seq_len=seq_len,
        text_field=data.text_field,
        held_out_fraction=data.held_out_fraction,
        max_tokens=data.max_tokens,
        workers=data.workers,
    )
