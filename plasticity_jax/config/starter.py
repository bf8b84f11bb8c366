"""The config file that `plasticity init` writes: short, commented, and complete."""

import re
from pathlib import Path

from plasticity_jax.errors import UserError
from plasticity_jax.text import local_path

_HEAD = '''"""{name}: say here what this study asks.

plasticity study --config {file} --dry-run     what it will do
plasticity study --config {file}               do it; run again, it goes on where it was
plasticity config --config {file} --explain    every key with its meaning
"""

from plasticity_jax.config import base_config, task


def get_config():
    config = base_config()
    config.name = "{name}"  # the study's folder in the workdir
'''

_SOURCES = """
    # The text to pretrain on: small corpora that the study downloads (140 MB). Your own text: plasticity init --for text
    config.data.sources = ("sotu", "wikipedia", "bbc", "news", "commons")
"""

# What --for takes → (the part of the file, the file or folder that the user puts beside it).
_TEXT = """
    # The text to pretrain on: a folder beside this file, with .txt (one document each), .jsonl, .csv or .parquet files, or the address of one.
    config.data.files = "texts"
    config.data.text_field = "text"  # the column that holds the text, in all files but .txt
"""

_MODEL = """
    # One model, small enough for a laptop; plasticity_jax.config.preset("llama-0.5b") and others are as large as the paper's.
    config.model.d_model = 48
    config.model.n_layers = 2
    config.model.d_ff = 128
    config.train.steps = 400  # of train.batch_size sequences of train.seq_len tokens

    # What the models differ in: weight decay, as AdamW's timescale in shares of the run. None is no decay, and a smaller share is more.
    # Or the coefficients themselves: config.grid.weight_decay, config.grid.timescales = (0.0, 0.1, 1.0), None
    config.grid.timescales = (None, 0.8, 0.2)
    config.grid.seeds = (0,)  # the report judges with three seeds or more: (0, 1, 2)
"""

_MODELS = """
    # Finished models in place of pretraining, each with its label: Hugging Face folders, or runs of this program, seen from where you start it.
    # Models with one label count as its seeds; the report judges with three or more.
    config.grid.axis = "weight_decay"  # what the labels are: any name, such as "tokens"
    config.grid.models = (
        (0.1, "checkpoints/wd0.1"),
        (1.0, "checkpoints/wd1.0"),
    )
"""

_NO_TEXT = """
    # No text: held-out loss and its claims are left out. Your own text: plasticity init --for checkpoints,text
    config.data.sources = ()
"""

_TUNING = """
    # What every model is fine-tuned on and scored at, before and after.
    config.finetune.peak_lr = 3e-3
    config.finetune.batch_size = 16
    config.tasks = {{{tasks}
    }}
    config.evaluate.n_samples = 4  # sampled answers per question, beside the greedy one
    config.evaluate.max_length = 168  # tokens of a question and its answer
    config.launch.parallel_runs = 0  # on a CPU: as many runs at once as cores and memory allow
    return config
"""

_TOPIC = """
        "topic": task(train_rows=1600, test_rows=400, validation_rows=200, epochs=2, max_new_tokens=12),"""
_ADDITION = """
        "addition2": task(train_rows=1600, test_rows=200, validation_rows=200, epochs=2, max_new_tokens=64),"""
_TABLE = """
        # Your own table beside this file, with the columns text and team; plasticity data --config {file} shows its rows.
        "tickets": task(
            rows="tickets.csv",
            prompt="{{text}}\\nWhich team?",
            answer="{{team}}",
            labels=("billing", "support", "sales"),  # every answer that there is; () where answers are open
            epochs=2,
            max_new_tokens=32,
        ),"""

SHOWS = {
    "text": 'the folder "texts" with your text',
    "task": 'the table "tickets.csv" with the columns text and team',
    "checkpoints": 'the folder "checkpoints" with the models that grid.models names',
}


def write_starter(place: str, shows: tuple[str, ...] = ()) -> list[str]:
    """Writes a config file.

    Args:
      place: the file, whose name without .py becomes the study's; a folder that is missing is not made.
      shows: names of SHOWS: what of the user's own the study reads.
    Returns:
      What has to be put beside the file, in words.
    Raises:
      UserError: the name is not that of a config, the file exists, or it cannot be written.
    """
    path = local_path(place)
    if path.suffix != ".py" or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", path.stem):
        raise UserError(f"{place} is not a name for a config; give one such as my_study.py: letters, digits, dot, dash and underscore, and .py.")
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(starter(path, shows))
    except FileExistsError:
        raise UserError(f"{path} exists, and is not replaced; give another name, or delete it first.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); give a name in a folder that is there and may be written to.") from None
    return [SHOWS[name] for name in SHOWS if name in shows]


def starter(path: Path, shows: tuple[str, ...]) -> str:
    """The text of the config file."""
    about = {"name": path.stem, "file": path.name}
    given = "text" in shows or "checkpoints" in shows
    task = _TABLE.format(**about) if "task" in shows else _ADDITION if given else _TOPIC  # addition needs no download
    text = _TEXT if "text" in shows else _NO_TEXT if "checkpoints" in shows else _SOURCES
    models = _MODELS if "checkpoints" in shows else _MODEL
    return _HEAD.format(**about) + text + models + _TUNING.format(tasks=task)
