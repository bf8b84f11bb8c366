"""Safety: instructions mixed with a few rows that refuse; tested on prompts that should be refused and on harmless ones that only sound alike.

Source: paper sections 4.3 and 12: about 20,000 Alpaca instructions and 300 safety rows, very likely those of Safety-Tuned LLaMAs (arXiv 2309.07875).
Their test is unknown. Ours counts refusals of the harmful prompts, and over-refusal of the harmless ones, as XSTest (arXiv 2308.01263) does.
"""

from collections.abc import Iterator

from plasticity_jax.data.tasks.base import Origin, Rows, RowSettings, Task, shuffled
from plasticity_jax.data.tasks.published import EMPTY, Candidate, Dropped, Published, Row, build_rows, example_of, is_empty, read_set
from plasticity_jax.errors import UserError

NAME = "Safety"
INSTRUCTIONS, SAFETY = 20_000, 300  # rows of the original
COLUMNS = {"instruction": str, "input": str, "output": str}
WITHOUT_INPUT = {"instruction": str, "output": str}
REFUSE, COMPLY = "refuse", "comply"
GOLD = {"unsafe": ("harmful", REFUSE), "safe": ("harmless", COMPLY)}  # mark of a test row → its subset and what a safe model does


def build(wheels, settings: RowSettings) -> Rows:
    """Sets "instructions" and "safety" (columns instruction, input or none, output) are for training, "test" has the columns prompt and label.

    Of the safety rows 300 are taken, and of the instructions 20,000, in the order of `settings.seed`. A test row's label is "unsafe" or "safe", as in XSTest; both must be there.
    """
    train = (row for name, n in (("safety", SAFETY), ("instructions", INSTRUCTIONS)) for row in _some(name, n, settings))
    rows = build_rows(NAME, settings, train, _test(settings), Published(read=-1, kept=-1))
    found = {row.subset for row in rows.test}
    for mark, (subset, _) in GOLD.items():
        if subset not in found:
            raise UserError(
                f"{NAME} test: {settings.files['test']} has no row with label {mark!r} among the {len(rows.test)} taken; it needs rows of both labels, "
                f"{' and '.join(map(repr, GOLD))}, to tell refusals from over-refusals."
            )
    return rows


def _some(name: str, n: int, settings: RowSettings) -> Iterator[Row]:
    rows = list(_train(name, settings))
    yield from (row for row in rows if isinstance(row, Dropped))
    yield from shuffled((row for row in rows if isinstance(row, Candidate)), settings.seed)[:n]


def _train(name: str, settings: RowSettings) -> Iterator[Row]:
    for row_id, row in read_set(NAME, settings, name, COLUMNS, otherwise=WITHOUT_INPUT):
        prompt, response = "\n".join(filter(None, (row["instruction"], row.get("input", "")))), row["output"]
        if is_empty(prompt, response):
            yield Dropped(EMPTY)
        else:
            yield Candidate(example_of(name, row_id, prompt, response, REFUSE if name == "safety" else COMPLY), (prompt,))


def _test(settings: RowSettings) -> Iterator[Row]:
    why = " (column label says which prompts are harmful: 'unsafe', and which are not: 'safe')"
    for row_id, row in read_set(NAME, settings, "test", {"prompt": str, "label": str}, why=why):
        if row["label"] not in GOLD:
            raise UserError(f"{NAME} test: {row_id}: label {row['label']!r} must be {' or '.join(map(repr, GOLD))}; mark every row with one of them.")
        subset, gold = GOLD[row["label"]]
        if is_empty(row["prompt"]):
            yield Dropped(EMPTY)
        else:
            yield Candidate(example_of("test", row_id, row["prompt"], gold, gold, subset=subset), (row["prompt"],))


TASK = Task(
    name=NAME,
    grader="refusal",
    labels=(REFUSE, COMPLY),
    packages=(),
    chance_note="a model that refuses everything, or nothing, is right in the rows of one label",
    build=build,
    sets={
        "instructions": Origin("tatsu-lab/alpaca"),
        "safety": Origin("https://github.com/vinid/safety-tuned-llamas (data/training/safety_only_data_Instructions.json)"),
        "test": Origin("walledai/XSTest"),
    },
    published=(INSTRUCTIONS + SAFETY, None),
)
