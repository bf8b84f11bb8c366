"""The documents lead somewhere: every link between them, and every page of the site's navigation, is there."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "launch").rglob("*.md")]


def prose(document: Path) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> set[str]:
    """Of its headings, by the rule of Python-Markdown's toc, which GitHub shares for our headings."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_and_a_heading(document):
    for place, anchor in re.findall(r"\]\(([^)#\s:]*)(?:#([^)\s]*))?\)", prose(document)):
        target = (document.parent / place).resolve() if place else document
        assert target.exists(), f"{document.name}: {place}"
        assert not anchor or anchor in anchors(target), f"{document.name}: {place}#{anchor}"


def test_the_navigation_lists_every_page_once():
    def pages(entry) -> list[str]:
        return [entry] if isinstance(entry, str) else [page for one in (entry.values() if isinstance(entry, dict) else entry) for page in pages(one)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(listed) == sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
