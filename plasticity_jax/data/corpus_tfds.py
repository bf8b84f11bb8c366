"""Reads a prepared TFDS data set as a corpus, by random access and without TensorFlow."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plasticity_jax.data.corpus_files import PART_BYTES
from plasticity_jax.errors import UserError, reason
from plasticity_jax.text import local_path

EXAMPLES_AT_ONCE = 256


def data_set_folder(setting: str) -> Path | None:
    """The folder of a data set given as a folder, "name", "name/config" or "name:version". None if it is not prepared.

    Looks for names where TFDS keeps data: $TFDS_DATA_DIR, or ~/tensorflow_datasets.
    """
    from tensorflow_datasets.core import read_only_builder, registered

    from plasticity_jax.data.documents import quiet_tfds

    folder = local_path(setting).expanduser()
    if folder.is_dir():
        return folder if (folder / "dataset_info.json").is_file() else None
    try:
        with quiet_tfds():
            return Path(read_only_builder.builder_from_files(setting).data_dir)
    except (registered.DatasetNotFoundError, ValueError, OSError):  # a path that does not exist is not a name either
        return None


def check_data_set(setting: str) -> Path:
    """The folder of a data set. Raises UserError if it is not prepared."""
    folder = data_set_folder(setting)
    if folder is None:
        raise UserError(
            f"data.tfds={setting}: no prepared data set of this name or in this folder; prepare it with TFDS (file_format='array_record') or set "
            "$TFDS_DATA_DIR"
        )
    return folder


def data_set_name(setting: str) -> str:
    """The data set's own name, which is the name of its single domain. Raises UserError if it is not prepared."""
    folder = check_data_set(setting)
    try:
        return json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))["name"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"data.tfds: {folder} holds no TFDS data set that can be read ({reason(error)}); prepare it again") from error


def data_set_listing(setting: str) -> list[tuple[str, int]] | None:
    """(name, bytes) of the data set's files, sorted. None if it is not prepared."""
    folder = data_set_folder(setting)
    return None if folder is None else sorted((path.name, path.stat().st_size) for path in folder.iterdir() if path.is_file())


@dataclass(frozen=True)
class ExamplePart:
    """A range of examples of a data set: the unit of work of one process.

    Attributes:
      folder: of the data set.
      name: of the data set with its version.
      split: such as "train" or "train[:10%]".
      start, end: of the range.
    """

    folder: str
    name: str
    split: str
    start: int
    end: int

    def source(self) -> dict[str, Any]:
        """The origin of the part's records, for their manifest. Leaves out the folder, which may move."""
        return {"data_set": self.name, "split": self.split, "examples": [self.start, self.end]}

    def texts(self, text_field: str) -> Iterator[str]:
        """Yields the texts of the part's examples in order, with at most a few hundred in memory.

        Raises:
          UserError: an example cannot be read, or its text is not UTF-8.
        """
        info, source = open_split(self.folder, self.split)
        _check_text(info, text_field)
        for first in range(self.start, self.end, EXAMPLES_AT_ONCE):
            numbers = range(first, min(first + EXAMPLES_AT_ONCE, self.end))
            try:
                for number, example in zip(numbers, source.__getitems__(numbers), strict=True):
                    yield example[text_field].decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"example {number} of {self.name} ({self.split}): {text_field!r} is not UTF-8; repair the data set") from error
            except (OSError, RuntimeError, IndexError) as error:
                raise UserError(f"{self.name} ({self.split}) in {self.folder} is damaged ({reason(error)}); prepare it again") from error


def example_parts(setting: str, split: str, text_field: str) -> Iterator[ExamplePart]:
    """Yields the parts of a data set's split, in order.

    Raises:
      UserError: the data set or split does not exist, is not stored as array_record, or the field is not text.
    """
    folder = check_data_set(setting)
    info, source = open_split(str(folder), split)
    _check_text(info, text_field)
    bytes_per_example = max(info.splits[split].num_bytes // max(len(source), 1), 1)
    step = max(PART_BYTES // bytes_per_example, 1)
    for start in range(0, len(source), step):
        yield ExamplePart(str(folder), info.full_name, split, start, min(start + step, len(source)))


def open_split(folder: str, split: str, *, setting: str = "data.tfds", split_setting: str = "data.tfds_split") -> tuple[Any, Any]:
    """Opens a split. Returns (DatasetInfo, random-access data source).

    Args:
      setting, split_setting: names of the folder and the split in messages.
    Raises:
      UserError: the data set cannot be read, is not stored as array_record, or has no such split.
    """
    import tensorflow_datasets as tfds

    from plasticity_jax.data.documents import FinishedDocuments, quiet_tfds

    with quiet_tfds():
        try:
            builder = FinishedDocuments(folder)
        except Exception as error:  # TFDS raises many kinds of exceptions
            raise UserError(f"{setting}: {folder} holds no TFDS data set that can be read ({reason(error)}); prepare it again") from error
        info = builder.info
        if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            raise UserError(
                f"data set {info.full_name} is stored as {getattr(info.file_format, 'value', None)}, which cannot be read by position; prepare it with "
                "file_format='array_record'"
            )
        try:
            return info, builder.as_data_source(split)  # pyright: ignore[reportCallIssue]
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{split_setting}={split!r}: data set {info.full_name} has {', '.join(info.splits)} ({reason(error)}); set one of them"
            ) from error


def _check_text(info: Any, text_field: str) -> None:
    import tensorflow_datasets as tfds

    if not isinstance(info.features, tfds.features.FeaturesDict) or text_field not in info.features:
        raise UserError(
            f"data set {info.full_name} has no feature {text_field!r}; it has {', '.join(info.features)}: set data.text_field to one of them"
        )
    if not isinstance(info.features[text_field], tfds.features.Text):
        raise UserError(
            f"feature {text_field!r} of data set {info.full_name} is {type(info.features[text_field]).__name__}, not Text; set data.text_field"
        )
