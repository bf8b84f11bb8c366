"""What every page is made of: the frame around its contents, figures as bytes and inline, tables of numbers, and files that are replaced as a whole."""

import base64
import hashlib
import re
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from plasticity_jax.runs.storage import AnyPath, make_folder, write_bytes
from plasticity_jax.stages import number
from plasticity_jax.stages.stage import Rows

ROWS_SHOWN = 200  # of a table of numbers on the page; its CSV file holds all


def render_template(name: str, filters: dict[str, Any] = {}, **values: Any) -> str:
    """A page's HTML: a template of this folder inside the frame `base.html`, with its style and its one script."""
    environment = Environment(loader=FunctionLoader(_read), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "digits": digits,
        "count": lambda value: "–" if value is None else f"{value:,.0f}",
        "plain": lambda value: ", ".join(map(str, value)) if isinstance(value, tuple) else str(value),
        "p_value": lambda value: "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}",
        "general": lambda value: "–" if value is None else f"{value:.3g}",
        "general_or_text": _cell,
    } | filters
    script = "\n" + _read("sort.js")
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(name).render(css=Markup(_read("page.css")), script=Markup(script), script_hash=script_hash, **values)


def _read(name: str) -> str:
    return (files("plasticity_jax.report") / name).read_text(encoding="utf-8")


def shown_table(title: str, caption: str, rows: Rows, *, empty: str = "Nothing to show yet: no member has finished this stage.") -> dict[str, Any]:
    """A table of numbers as the macro `numbers` of parts.html shows it; rows beyond ROWS_SHOWN are in the CSV file only. `empty` stands for no rows."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    return {"title": title, "caption": caption, "columns": names, "rows": rows[:ROWS_SHOWN], "count": len(rows), "empty": empty}


def inline_svg(svg: str, name: str, description: str, values: dict[str, list[str]] | None = None) -> Markup:
    """An SVG to stand inside a page: its ids prefixed by `name`, so that figures do not mix up each other's, its size left to the page.

    Args:
      values: id of a line → what a pointer over each of its markers shows, as `marked_values` gives it.
    """
    svg = svg[svg.index("<svg") :]
    for gid, texts in (values or {}).items():
        svg = _with_titles(svg, gid, texts)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # A hundredth of a point is finer than any screen; six digits would be a third of the page.
    svg = re.sub(r'\s(?:d|x|y|x1|x2|y1|y2)="[^"]*"', lambda found: re.sub(r"\d+\.\d{3,}", _rounded, found[0]), svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    head, body = svg.split(">", 1)
    head = re.sub(r'\s(?:width|height)="[^"]*"', "", head)
    label = Markup.escape(description)
    return Markup(f'{head} role="img" aria-label="{label}">{body}')


def _rounded(found: re.Match[str]) -> str:
    return f"{float(found[0]):.2f}".rstrip("0").rstrip(".")


def _with_titles(svg: str, gid: str, texts: list[str]) -> str:
    """Titles for the markers of a line, which browsers show on hover; none where some markers lie outside the figure."""
    start = svg.find(f'<g id="{gid}">')
    line = re.compile(r"<g id=.*?</g>\n? *</g>", re.DOTALL).match(svg, start) if start >= 0 else None
    if line is None or line[0].count("<use ") != len(texts):
        return svg
    left = iter(texts)
    titled = re.sub(r"<use ([^>]*)/>", lambda use: f"<use {use[1]}><title>{Markup.escape(next(left))}</title></use>", line[0])
    return svg[:start] + titled + svg[line.end() :]


def digits(value: Any, digits: int) -> str:
    found = number(value)
    return "–" if found is None else f"{round(found, digits) + 0.0:.{digits}f}"  # no -0.000


def _cell(value: Any) -> str:
    return (
        "–"
        if value is None
        else f"{value:.4g}"
        if isinstance(value, float)
        else ", ".join(map(str, value))
        if isinstance(value, tuple)
        else str(value)
    )


def replace_file(path: AnyPath, content: bytes) -> AnyPath:
    """Writes a file, with the folders above it, that a reader sees as it was or as it is now. Returns its path."""
    make_folder(path.parent)
    write_bytes(path, content)
    return path
