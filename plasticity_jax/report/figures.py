"""Drawing a figure of the page by its name."""

import difflib
from dataclasses import replace

import matplotlib
from matplotlib.figure import Figure as Drawing

from plasticity_jax.errors import UserError
from plasticity_jax.report.drawing import STYLE
from plasticity_jax.report.results import StudyResults
from plasticity_jax.stages import Figure, guarded, stages


def figures() -> dict[str, Figure]:
    """Name → figure, of all stages in their order."""
    return {
        name: replace(
            figure,
            available=guarded(stage, f"figure {name!r}", figure.available, False),
            draw=guarded(stage, f"figure {name!r}", figure.draw, Drawing(figsize=(4.5, 1.0))),
        )
        for stage in stages().values()
        for name, figure in stage.figures.items()
    }


def draw_figure(results: StudyResults, name: str) -> Drawing:
    """Draws a figure.

    Raises:
      UserError: an unknown name, a figure whose stage has not finished for any member, or a study of several slices, which have their own figures.
    """
    if len(results.slices) > 1:
        raise UserError(f"figure {name!r} is drawn for one part of this study at a time; name one of {', '.join(s.title for s in results.slices)}.")
    known = figures()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        raise UserError(f"figure {name!r} is unknown; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}."))
    if not known[name].available(results):
        raise UserError(f"figure {name!r} has nothing to show yet; run plasticity study until a member has finished the stage it reads.")
    with matplotlib.rc_context(STYLE):
        drawn = known[name].draw(results)
        # Laid out once, not again for every file format.
        drawn.draw_without_rendering()
        drawn.set_layout_engine("none")
    return drawn
