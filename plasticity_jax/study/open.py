"""A study on disk, for notebooks."""

from collections import Counter
from typing import TYPE_CHECKING, Any

from plasticity_jax.config import Member
from plasticity_jax.errors import UserError
from plasticity_jax.report.browse import Filter, browse
from plasticity_jax.report.figures import draw_figure, figures
from plasticity_jax.report.page import table_rows
from plasticity_jax.report.results import collect
from plasticity_jax.runs.storage import AnyPath, location
from plasticity_jax.stages.stage import BASES
from plasticity_jax.study.graph import study_files
from plasticity_jax.study.status import study_status

if TYPE_CHECKING:
    import pandas as pd

    from plasticity_jax.model.load import LoadedModel


class Study:
    """A study to read: its runs, its summary and its figures.

    Attributes:
      path: the study's folder.
      runs: one dict per run, as `plasticity status --json` gives them.
    """

    def __init__(self, path: AnyPath):
        self.path = path
        self.runs: list[dict[str, Any]] = [row for row in study_status(path.parent) if row["study"] == path.name]

    def __repr__(self) -> str:
        models = sum(run["stage"] in (*BASES, "finetune") for run in self.runs)
        states = ", ".join(f"{count} {state}" for state, count in Counter(run["state"] for run in self.runs).items())
        return f"<study {self.path.name}: {models} models, {len(self.runs)} runs ({states})>"

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of the figures that have something to show, in any part of the study."""
        results = collect(self.path)
        return tuple(
            name
            for name, one in figures().items()
            if one.applies(results.config) and any(map(one.available, [results] if one.of_study else results.slices))
        )

    def table(self, name: str = "summary") -> list[dict[str, Any]]:
        """The rows of a table of the report, as in its CSV file.

        Args:
          name: of the file, such as "gains" or "correlation". The summary has one row per member of the grid: λ, further swept fields, timescale,
            held-out loss, scores before and after, gain, pseudo-rank, gap, state.
        Raises:
          UserError: an unknown name.
        """
        return table_rows(collect(self.path), name)

    def frame(self, name: str = "summary") -> "pd.DataFrame":
        """A table as a pandas DataFrame. Raises UserError where pandas is not installed."""
        try:
            import pandas as pd
        except ImportError as error:
            raise UserError("frame() needs pandas, which is not installed: pip install pandas, or use table().") from error
        return pd.DataFrame(self.table(name))

    def model(self, weight_decay: Any, *, task: str | None = None, seed: int | None = None) -> "LoadedModel":
        """The model pretrained with a weight decay, or that model fine-tuned on a task; of several the first.

        Args:
          weight_decay: to four digits; where models that exist are labeled by something else, their label.
          seed: of the pretraining.
        Raises:
          UserError: no such run, or it has not finished.
        """
        from plasticity_jax.model.load import load_model

        results = collect(self.path)
        members = [m.member for m in results.members if _text(_label(m.member)) == _text(weight_decay) and seed in (None, m.member.seed)]
        bases, names = {member.base for member in members}, {member.name for member in members}
        found = [s for s in results.runs if s.run.stage in BASES and s.run.member in bases]
        if task is not None:
            found = [s for s in results.runs if s.run.stage == "finetune" and s.run.member in names and s.run.task == task]
        if not found:
            asked = (
                f"{results.axis.equation(weight_decay) if results.existing else f'λ={_text(weight_decay)}'}"
                + (f", seed {seed}" if seed is not None else "")
                + (f", fine-tuned on {task!r}" if task is not None else "")
            )
            raise UserError(f"study {self.path.name} has no model with {asked}; its models are the rows of table() and its tasks {results.tasks}.")
        if found[0].state != "done":
            raise UserError(f"{found[0].path} is {found[0].state}; run plasticity study until it is done.")
        return load_model(found[0].path)

    def completions(self, task: str | None = None, **wanted: Any) -> list[dict[str, Any]]:
        """What the models wrote, one dict per completion, as `plasticity show` filters it.

        Args:
          wanted: further fields of `Filter`, such as `weight_decay=0.5`, `when="after"`, `verdict="wrong"`.
        """
        return [row for row in browse(self.path.parent, Filter(task=task, **wanted)) if row["study"] == self.path.name]

    def figure(self, name: str, part: str | None = None):
        """A figure of the report: a matplotlib Figure that a notebook shows by itself.

        Args:
          part: which part of a study over several fields, such as "peak lr = 0.0004"; None for a figure of all parts, such as "heat_map".
        Raises:
          UserError: an unknown name or part, no part for a study that has several, or a figure with nothing to show yet.
        """
        results = collect(self.path)
        parts = {one.title: one for one in results.slices}
        if part is None:
            return draw_figure(results, name)
        if part not in parts:
            raise UserError(
                f"part {part!r} is not in this study" + (f"; name one of {', '.join(parts)}." if len(parts) > 1 else ", which has one; leave it out.")
            )
        return draw_figure(parts[part], name)


def _label(member: Member) -> Any:
    return dict(member.label or (("", member.weight_decay),)).popitem()[1]


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def open_study(workdir: str | AnyPath, name: str | None = None) -> Study:
    """Opens the study in `workdir`, or the one called `name` where there are several.

    Raises:
      UserError: there is no study, or several and no name to choose by.
    """
    folders = {path.parent.name: path.parent for path in study_files(location(workdir))}
    if name is None and len(folders) == 1:
        return Study(next(iter(folders.values())))
    if name not in folders:
        raise UserError(f"{workdir} holds the studies {', '.join(folders)}; name one of them, as in open_study(workdir, {next(iter(folders))!r}).")
    return Study(folders[name])
