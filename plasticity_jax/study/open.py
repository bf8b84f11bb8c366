"""A study on disk, for notebooks."""

from typing import Any

from plasticity_jax.errors import UserError
from plasticity_jax.report.figures import draw_figure
from plasticity_jax.report.page import table_rows
from plasticity_jax.report.results import collect
from plasticity_jax.runs.storage import AnyPath, location
from plasticity_jax.study.graph import study_files
from plasticity_jax.study.status import study_status


class Study:
    """A study to read: its runs, its summary and its figures.

    Attributes:
      path: the study's folder.
      runs: one dict per run, as `plasticity status --json` gives them.
    """

    def __init__(self, path: AnyPath):
        self.path = path
        self.runs: list[dict[str, Any]] = [row for row in study_status(path.parent) if row["study"] == path.name]

    def table(self, name: str = "summary") -> list[dict[str, Any]]:
        """The rows of a table of the report, as in its CSV file.

        Args:
          name: of the file, such as "gains" or "correlation". The summary has one row per member of the grid: λ, further swept fields, timescale,
            held-out loss, scores before and after, gain, pseudo-rank, gap, state.
        Raises:
          UserError: an unknown name.
        """
        return table_rows(collect(self.path), name)

    def figure(self, name: str, part: str | None = None):
        """A figure of the report as a matplotlib Figure.

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
