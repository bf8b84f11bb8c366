"""Rows that ask one closed question about a text: shared by `topic` and `news`."""

from typing import TYPE_CHECKING

from plasticity_jax.data.sources import SOURCES, split_of
from plasticity_jax.data.tasks.base import Example, Rows, RowSettings, answer_only, shuffled, truncate_at_word, without_leaks

if TYPE_CHECKING:
    from plasticity_jax.data.wheels import Wheels

# About 55 tokens with a vocabulary of 1,024: a lead's first sentence, enough to tell the topic.
MAX_CHARACTERS = 140


def labeled_document_rows(source_name: str, question: str, answer_of_label: dict[str, str], wheels: "Wheels", settings: RowSettings) -> Rows:
    """Rows from the labeled documents of a corpus source.

    Test rows come from documents that `split_of` holds out of pretraining, training rows from the others. `without_leaks` is applied to the
    truncated texts.

    Args:
      source_name: a key of `SOURCES`.
      question: follows the text in the prompt.
      answer_of_label: the source's label -> the word to answer; documents with another label are left out.
    """
    rows: dict[str, list[Example]] = {"train": [], "held_out": []}
    texts = {}
    for document in SOURCES[source_name].read(wheels):
        if document.label not in answer_of_label:
            continue
        split = split_of(document.text, settings.held_out_fraction)
        text = truncate_at_word(document.text, MAX_CHARACTERS)
        answer = answer_of_label[document.label]
        texts[document.id] = text
        rows[split].append(answer_only(document.id, f"{text}\n{question}", answer, source=document.source, source_split=split))
    train, _ = without_leaks(rows["train"], [texts[row.id] for row in rows["held_out"]], lambda row: texts[row.id])
    return Rows(shuffled(train, settings.seed)[: settings.train_rows], shuffled(rows["held_out"], settings.seed)[: settings.test_rows])
