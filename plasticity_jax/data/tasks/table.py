"""Tasks from the user's own tables, without code: rows of CSV, TSV, JSON lines or Parquet, with templates over their columns for prompt and answer."""

import functools
import string
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from plasticity_jax.config.schema import TaskConfig, nearest
from plasticity_jax.data.tasks.base import AUTO, Example, Rows, RowSettings, Task, answer_sentence, shuffled, without_leaks
from plasticity_jax.data.tasks.holdout import Question, disjoint_rows, split_by_hash
from plasticity_jax.data.tasks.originals import Cell, read_rows
from plasticity_jax.data.tasks.overlap import drop_overlaps
from plasticity_jax.errors import UserError

if TYPE_CHECKING:
    from plasticity_jax.data.wheels import Wheels

ROWS = "rows"  # the set of a table that holds all splits
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Template:
    """A text with the names of columns in braces, as `str.format` has it. Two braces stand for one."""

    parts: tuple[tuple[str, str | None], ...]  # text, and the column whose value follows it

    @classmethod
    def parse(cls, text: str, where: str) -> "Template":
        """Raises UserError for anything but plain names in the braces; `where` is the field in messages."""
        try:
            found = list(string.Formatter().parse(text))
        except ValueError as error:
            raise UserError(f"{where}={text[:80]!r}: {error}; write {{column}} for a column's value, and {{{{ for a brace.") from None
        for _, name, spec, conversion in found:
            if name is not None and (not name or spec or conversion or any(c in name for c in ".[]{}")):
                given = f"{{{name}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}}}"
                raise UserError(f"{where} holds {given}; braces take the name of a column and nothing else, such as {{text}}.")
        if all(name is None for _, name, _, _ in found):
            raise UserError(f"{where}={text[:80]!r} names no column, so that all rows would be alike; write {{column}} for a column's value.")
        return cls(tuple((literal, name) for literal, name, _, _ in found))

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for _, name in self.parts if name is not None))

    def fill(self, row: dict[str, str]) -> str:
        return "".join(literal + ("" if name is None else row[name]) for literal, name in self.parts)


@dataclass(frozen=True)
class Templates:
    """How a row of a table becomes a row of the task."""

    prompt: Template
    answer: Template
    response: Template | None
    split: str | None

    @classmethod
    def of(cls, name: str, settings: TaskConfig) -> "Templates":
        fields = {"prompt": settings.prompt, "answer": settings.answer, "response": settings.response}
        parsed = {key: text if text is None else Template.parse(text, f"tasks.{name}.{key}") for key, text in fields.items()}
        return cls(**parsed, split=settings.split)  # pyright: ignore[reportArgumentType]

    @property
    def columns(self) -> tuple[str, ...]:
        used = [column for template in (self.prompt, self.answer, self.response) if template is not None for column in template.columns]
        return tuple(dict.fromkeys([*used, *([] if self.split is None else [self.split])]))


def check(name: str, settings: TaskConfig) -> None:
    """Refuses fields of a table's task that do not fit together. Reads no file. Raises UserError."""
    for field in ("prompt", "answer"):
        if getattr(settings, field) is None:
            raise UserError(f"tasks.{name} has no {field}; a task from a table needs one, such as {field}='{{{field}}}' for the column {field!r}.")
    if (settings.rows is None) == (not settings.files):
        both = f"tasks.{name}.rows={settings.rows!r} and tasks.{name}.files={settings.files}"
        raise UserError(f"{both}: give the table as rows, or one file for each split as files={{'train': FILE, 'test': FILE}}.")
    for split in settings.files:
        if split not in SPLITS:
            raise UserError(f"tasks.{name}.files has {split!r}; the files of a table are those of {', '.join(SPLITS)}{nearest(split, SPLITS) or '.'}")
    if settings.files and settings.split is not None:
        raise UserError(f"tasks.{name}.split={settings.split!r} has no effect beside files, which are splits already; leave it out.")
    if settings.files and not {"train", "test"} <= settings.files.keys():
        missing = next(split for split in ("train", "test") if split not in settings.files)
        raise UserError(f"tasks.{name}.files has no {missing!r}; give it, or one table as rows, of which a part is held out.")
    if twice := sorted({label for label in settings.labels if settings.labels.count(label) > 1}):
        raise UserError(f"tasks.{name}.labels lists {twice[0]!r} twice; list every label once.")
    if len(settings.labels) == 1:
        raise UserError(f"tasks.{name}.labels has the single label {settings.labels[0]!r}; give all of them, or leave labels out for open answers.")
    Templates.of(name, settings)


def table_task(name: str, settings: TaskConfig) -> Task:
    """The task that the fields `rows` (or `files`), `prompt` and `answer` declare."""
    return Task(
        name=name,
        grader=settings.grader or AUTO,
        labels=settings.labels,
        packages=(),
        chance_note=f"one of {len(settings.labels)} labels" if settings.labels else "answers are open",
        build=functools.partial(build, name, settings),
    )


def places(settings: TaskConfig) -> dict[str, str]:
    """Set of a table → its files."""
    return dict(settings.files) if settings.rows is None else {ROWS: settings.rows}


def build(name: str, settings: TaskConfig, wheels: "Wheels", wanted: RowSettings) -> Rows:
    """The rows of a table.

    Without a column or files of splits, a row is a test row by the hash of what its prompt has from the table, so that neither more rows nor another
    wording moves one. No training or validation row equals, contains, is contained in or resembles a test row.
    """
    splits: dict[str, list[Question]] = {split: [] for split in (ROWS, *SPLITS)}
    read = 0
    for split, question in questions(name, settings):
        splits[split].append(question)
        read += 1
    if splits[ROWS]:
        splits["train"], splits["test"] = split_by_hash(splits[ROWS], wanted)
    for split in ("train", "test"):
        if not splits[split] and settings.split is not None:
            raise UserError(f"task {name}: no row says {split!r} in column {settings.split!r}; mark some, or leave split out to divide rows by hash.")
    test = [question.texts[0] for question in splits["test"]]
    train, equal = without_leaks(splits["train"], test, _own_text)
    validation, _ = without_leaks(splits["validation"], test, _own_text)
    validation, _ = drop_overlaps(validation, test, _own_text)
    rows = disjoint_rows(train, splits["test"], wanted, {"read": read, "equal, hold or lie within a test row": equal})
    return replace(rows, validation=shuffled((question.row for question in validation), wanted.seed))


def _own_text(question: Question) -> str:
    return question.texts[0]


def questions(name: str, settings: TaskConfig) -> Iterator[tuple[str, Question]]:
    """Yields (split, row) of a table, in the order of its files; the split is ROWS for a table that says none. A row's text is what its prompt has from
    the table.

    Raises:
      UserError: a file is missing or damaged, a column is missing, or a row has no prompt, no answer, an answer that is not one of `labels`, or an
        unknown split. Names the row.
    """
    templates = Templates.of(name, settings)
    columns = dict.fromkeys(templates.columns, Cell)
    for files_of, files in places(settings).items():
        found = False
        for row_id, row in read_rows(files, columns, what=f"task {name}", way_out=f"name its columns in tasks.{name}.prompt and answer"):
            found, row = True, {column: value.strip() for column, value in row.items()}
            where = f"task {name}: row {row_id.rpartition(':')[2]} of {row_id.rpartition(':')[0]}"
            split = files_of if templates.split is None else _split(row[templates.split], where, templates.split)
            yield split, Question(_example(row_id, row, split, templates, settings.labels, where), (_text(row, templates.prompt, where),))
        if not found:
            raise UserError(f"task {name}: {files} has no rows; give the file that holds them")


def _split(value: str, where: str, column: str) -> str:
    if value not in SPLITS:
        raise UserError(f"{where}: column {column!r} says {value[:40]!r}; a row's split is one of {', '.join(SPLITS)}{nearest(value, SPLITS) or '.'}")
    return value


def _text(row: dict[str, str], prompt: Template, where: str) -> str:
    text = " ".join(row[column] for column in prompt.columns)
    if not text.strip():
        raise UserError(f"{where} is empty in column {' and '.join(map(repr, prompt.columns))}, so its prompt asks nothing; fill or drop the row")
    return text


def _example(row_id: str, row: dict[str, str], split: str, templates: Templates, labels: Iterable[str], where: str) -> Example:
    for column in (*templates.answer.columns, *(templates.response.columns if templates.response else ())):
        if not row[column]:
            raise UserError(f"{where} has no answer (column {column!r} is empty); fill or drop the row")
    answer = templates.answer.fill(row)
    if labels and answer not in labels:
        raise UserError(
            f"{where}: the answer {answer[:60]!r} is not one of labels ({', '.join(labels)}){nearest(answer, labels) or '; add it, or correct the row'}"
        )
    response = answer_sentence(answer) if templates.response is None else templates.response.fill(row)
    return Example(row_id, templates.prompt.fill(row), response, answer, source=f"files:{row_id}", source_split=split)
