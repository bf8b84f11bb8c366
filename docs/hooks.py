"""Hooks of the documentation site (mkdocs.yml): what its pages take from the code.

- The line `<!-- commands -->` becomes what every command prints for --help, and `<!-- config -->` the fields of every section of the config.
- A link to a file of the repository outside of docs/ leads to a page that shows the file. A file that is not there is a warning, so it ends a strict build.
"""

import argparse
import dataclasses
import html
import logging
import os
import posixpath
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parents[1]
DOCS = "docs/"
LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=(#[^)]*)?\))")
HUGE = 10_000  # a bound above it only refuses slips, and is not worth a reader's time

log = logging.getLogger("mkdocs.plugins.hooks")


def on_files(files, config):
    """Adds a page for every file of the repository that the docs, or such a page, link to."""
    waiting = [(DOCS + page.src_uri, page.content_string) for page in files.documentation_pages()]
    while waiting:
        source, text = waiting.pop()
        for target in {resolved(source, link) for link, _ in LINK.findall(text)}:
            uri = page_of(target)
            if target.startswith((DOCS, "..")) or files.get_file_from_path(uri):
                continue
            path = ROOT / target
            if not path.is_file():
                log.warning("%s links to %s, which is not there.", source, target)
                continue
            text = path.read_text(encoding="utf-8")
            files.append(File.generated(config, uri, content=shown(target, text), inclusion=InclusionLevel.NOT_IN_NAV))
            if path.suffix == ".md":
                waiting.append((target, text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Fills in what is made from the code, and leads links to the pages of `on_files`."""
    for line, made in {"<!-- commands -->": commands, "<!-- config -->": sections}.items():
        if line in markdown:
            markdown = markdown.replace(line, made())
    uri = page.file.src_uri
    source = uri.removeprefix("source/").removesuffix(".md") if uri.startswith("source/") else DOCS + uri
    if not source.endswith(".md"):
        return markdown  # code

    def lead(match: re.Match) -> str:
        target = resolved(source, match[1])
        to = target.removeprefix(DOCS) if target.startswith(DOCS) else page_of(target)
        return posixpath.relpath(to, posixpath.dirname(uri) or ".")

    return LINK.sub(lead, markdown)


def resolved(source: str, link: str) -> str:
    """A link's target from the top of the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def page_of(target: str) -> str:
    return f"source/{target}.md"


def shown(target: str, text: str) -> str:
    """The page of a file: a document as it is, anything else as code."""
    if target.endswith(".md"):
        return text
    return f"# {posixpath.basename(target)}\n\n`{target}`\n\n~~~~~~{Path(target).suffix[1:]}\n{text}\n~~~~~~\n"


def commands() -> str:
    """Every command with its --help."""
    os.environ["COLUMNS"] = "110"
    from plasticity_jax.cli import parser

    program = parser()
    [subparsers] = (action for action in program._actions if isinstance(action, argparse._SubParsersAction))
    parts = [f"```text\n{program.format_help()}```"]
    parts += [f"## plasticity {name}\n\n```text\n{one.format_help()}```" for name, one in subparsers.choices.items()]
    return "\n\n".join(parts)


def sections() -> str:
    """A table for every section of the config."""
    from plasticity_jax.config import StudyConfig, TaskConfig

    config = StudyConfig()
    top = [field for field in dataclasses.fields(config) if not dataclasses.is_dataclass(getattr(config, field.name))]
    parts = ["## The study itself\n\n" + table(type(config), top, "")]
    found = {f.name: type(getattr(config, f.name)) for f in dataclasses.fields(config) if f not in top} | {"tasks.<name>": TaskConfig}
    for name, section in list(found.items()):
        found |= {f"{name}.{field}": inner for field, inner in nested(section).items()}
    for name, section in sorted(found.items()):
        about = html.escape((section.__doc__ or "").strip().replace("\n    ", "\n"))
        parts.append(f"## {html.escape(name)}\n\n{about}\n\n{table(section, dataclasses.fields(section), f'{name}.')}")
    return "\n\n".join(parts)


def nested(section: type) -> dict[str, type]:
    """Field → dataclass of the sections within a section; one of a dict of sections is `field.<name>`."""
    found = {}
    for name, kind in typing.get_type_hints(section).items():
        inner = typing.get_args(kind)
        key = f"{name}.<name>" if typing.get_origin(kind) is dict else name
        found |= {key: one for one in (kind, *inner) if isinstance(one, type) and dataclasses.is_dataclass(one)}
    return found


def table(section: type, fields: Any, prefix: str) -> str:
    hints = typing.get_type_hints(section, include_extras=True)
    lines = ["| field | values | default | meaning |", "| --- | --- | --- | --- |"]
    for field in fields:
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        cells = (f"{prefix}{field.name}", kind_text(hints[field.name]), "must be given" if default is dataclasses.MISSING else repr(default))
        code = (f"<code>{cell(text)}</code>" for text in cells)
        execution = " *(execution)*" if field.metadata.get("execution") else ""
        lines.append(f"| {' | '.join(code)} | {cell(field.metadata.get('doc', ''))}{execution} |")
    return "\n".join(lines)


def cell(text: str) -> str:
    return html.escape(text.replace("\n", "\\n"), quote=False).replace("|", "&#124;").replace("*", "&#42;").replace("_", "&#95;")


def kind_text(kind: Any) -> str:
    """A type with its bounds in words."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        signs = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}
        bounds = [(signs[type(one)][1], getattr(one, signs[type(one)][0])) for one in inner[1:] if type(one) in signs]
        return " ".join([kind_text(inner[0]), ", ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound <= HUGE)]).strip()
    if origin is Literal:
        return " | ".join(map(repr, inner))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(kind_text, inner))
    if origin is tuple:
        return f"tuple of {kind_text(inner[0])}" if inner[-1] is Ellipsis else f"({', '.join(map(kind_text, inner))})"
    if origin is dict:
        return f"dict of {kind_text(inner[0])} to {kind_text(inner[1])}"
    return {type(None): "None", Any: "anything"}.get(kind) or getattr(kind, "__name__", str(kind))
