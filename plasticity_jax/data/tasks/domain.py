"""The source of a passage, four classes: which part of the pretraining text it was taken from."""

from typing import TYPE_CHECKING

from plasticity_jax.data.sources import SOURCES, split_of
from plasticity_jax.data.tasks.base import Example, Rows, RowSettings, Task, answer_only, shuffled, truncate_at_word, without_leaks
from plasticity_jax.data.tasks.classify import MAX_CHARACTERS

if TYPE_CHECKING:
    from plasticity_jax.data.wheels import Wheels

ANSWER_OF_SOURCE = {"wikipedia": "encyclopedia", "bbc": "british", "news": "press", "commons": "parliament"}

# Of each source, so that no source is much more common than the others: BBC has about 1,900 documents to train on.
MAX_TRAIN_DOCUMENTS = 900


def build(wheels: "Wheels", settings: RowSettings) -> Rows:
    """Rows from as many documents of each source, test rows from documents that are held out of pretraining."""
    fraction = settings.held_out_fraction
    most = {"train": MAX_TRAIN_DOCUMENTS, "held_out": round(MAX_TRAIN_DOCUMENTS * fraction / (1 - fraction))}
    sides: dict[str, list[Example]] = {"train": [], "held_out": []}
    texts = {}
    for name, answer in ANSWER_OF_SOURCE.items():
        documents = shuffled(SOURCES[name].read(wheels), settings.seed)
        for split, rows in sides.items():
            for document in [document for document in documents if split_of(document.text, fraction) == split][: most[split]]:
                texts[document.id] = text = middle_of(document.text, MAX_CHARACTERS)
                rows.append(answer_only(document.id, f"{text}\nWhere is it from?", answer, source=document.source, source_split=split))
    train, _ = without_leaks(sides["train"], [texts[row.id] for row in sides["held_out"]], lambda row: texts[row.id])
    return Rows(shuffled(train, settings.seed)[: settings.train_rows], shuffled(sides["held_out"], settings.seed)[: settings.test_rows])


def middle_of(text: str, max_characters: int) -> str:
    """Whole words from the middle of `text`, at most `max_characters`, white space collapsed; its beginning often names the source."""
    text = " ".join(text.split())
    start = (len(text) - max_characters) // 2
    if start <= 0:
        return truncate_at_word(text, max_characters)
    before = text[:start].rpartition(" ")[0]
    return truncate_at_word(text[len(before) :], max_characters)


DOMAIN = Task(
    name="domain",
    grader="exact",
    labels=tuple(ANSWER_OF_SOURCE.values()),
    packages=tuple(dict.fromkeys(package for name in ANSWER_OF_SOURCE for package in SOURCES[name].packages)),
    chance_note="the four sources are about equally common",
    build=build,
)
