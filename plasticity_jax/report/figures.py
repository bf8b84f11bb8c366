"""Drawing a figure of the page by its name."""

import difflib
from dataclasses import replace

import matplotlib
from matplotlib.figure import Figure as Drawing
from matplotlib.layout_engine import ConstrainedLayoutEngine

from plasticity_jax.errors import UserError
from plasticity_jax.report import across
from plasticity_jax.report.drawing import STYLE, Picture
from plasticity_jax.report.results import StudyResults
from plasticity_jax.stages import Figure, guarded, stages


def figures() -> dict[str, Figure]:
    """Name → figure, of all stages in their order, then those that rest on several."""
    of_stages = {
        name: replace(
            figure,
            available=guarded(stage, f"figure {name!r}", figure.available, False),
            draw=guarded(stage, f"figure {name!r}", figure.draw, Picture(figsize=(4.5, 1.0))),
            notes=guarded(stage, f"notes of figure {name!r}", figure.notes, []),
            numbers=None if figure.numbers is None else guarded(stage, f"numbers of figure {name!r}", figure.numbers, ""),
        )
        for stage in stages().values()
        for name, figure in stage.figures.items()
    }
    return of_stages | across.FIGURES


def draw_figure(results: StudyResults, name: str) -> Drawing:
    """Draws a figure.

    Raises:
      UserError: an unknown name, a figure whose stage has not finished for any member, one of the parts for a study of several, or one of the
        whole study for a part.
    """
    known = figures()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        raise UserError(f"figure {name!r} is unknown; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}."))
    if known[name].of_study and results.facet:
        raise UserError(f"figure {name!r} is drawn for a whole study, not for its part {results.title}; leave the part out.")
    if not known[name].of_study and len(results.slices) > 1:
        raise UserError(f"figure {name!r} is drawn for one part of this study at a time; name one of {', '.join(s.title for s in results.slices)}.")
    if not known[name].available(results):
        notes = known[name].notes(results)
        raise UserError(
            f"figure {name!r} has nothing to show" + (f". {' '.join(notes)}" if notes else f" yet: {known[name].needs}; run plasticity study first.")
        )
    with matplotlib.rc_context(STYLE):
        drawn = known[name].draw(results)
        if isinstance(drawn.get_layout_engine(), ConstrainedLayoutEngine):
            # Laid out once, not again for every file format.
            drawn.draw_without_rendering()
            drawn.set_layout_engine("none")
        for axes in drawn.axes:  # ticks take the style of the moment they are made in
            _ = axes.get_xticklabels(), axes.get_yticklabels()
    return drawn
