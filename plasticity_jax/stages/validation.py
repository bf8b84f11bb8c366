"""Validation: fine-tuned models scored on the validation rows of their task, greedily. What is chosen is chosen on these scores, never on the test's."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from plasticity_jax.config import StudyConfig, result_fields
from plasticity_jax.runs.run import Run
from plasticity_jax.stages import evaluate
from plasticity_jax.stages.prepare import task_settings
from plasticity_jax.stages.stage import Figure, Plan, Planned, Rows, Stage, Table, batch_fields, member_row

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

    from plasticity_jax.report.results import StudyResults

# Fields of `config.evaluate` that only sampled completions depend on; here there are none.
OF_SAMPLES = ("n_samples", "temperature", "top_k", "top_p", "seed")


def validation_run(config: StudyConfig, tuned: Run) -> Run:
    """A fine-tuned model scored on the validation rows of its task."""
    fields = {"split": "validation", "faithful": config.faithful, "compute_dtype": config.train.compute_dtype}
    fields |= batch_fields(config.train.compute_dtype, config.evaluate.batch_size)
    if not evaluate.by_likelihood(config, tuned.task_name):
        fields |= {name: value for name, value in result_fields(config.evaluate).items() if name not in OF_SAMPLES}
        fields |= {"n_samples": 0, "max_new_tokens": task_settings(config, tuned.task_name).max_new_tokens}
        fields |= evaluate.of_grading(config, tuned.task_name)
    parents = {"model": tuned.id, "task": tuned.parents["task"]}
    return STAGE.new_run(config, tuned.name, fields, parents, member=tuned.member, task=tuned.task, seed=tuned.seed)


def _plan(plan: Plan) -> Iterable[Planned]:
    return ((own, validation_run(own, tuned)) for own, tuned in plan.of("finetune") if task_settings(own, tuned.task_name).validation_rows)


# ------------------------------------------------------------------------------------------------------------------------------ report


def _score_rows(results: "StudyResults") -> Rows:
    """The score of every member on the validation rows of every task, after fine-tuning."""
    return [
        member_row(
            m,
            task=task,
            problems=len(score.greedy),
            finetune_seeds=len(score.runs),
            score=float(score.greedy.mean()),
            majority_class=score.majority_class,
        )
        for m in results.members
        for task, score in m.validation.items()
    ]


def _choice_rows(results: "StudyResults") -> Rows:
    from plasticity_jax.report.selection import choice_rows

    return choice_rows(results)


def _win_rows(results: "StudyResults") -> Rows:
    from plasticity_jax.report.selection import win_rows

    return win_rows(results)


def _sweep_rows(results: "StudyResults") -> Rows:
    from plasticity_jax.report.selection import sweep_rows

    return sweep_rows(results)


def _draw_sweep(results: "StudyResults") -> "Drawing":
    from plasticity_jax.report.selection import draw_sweep

    return draw_sweep(results)


def _sweep_numbers(results: "StudyResults") -> str:
    from plasticity_jax.report.selection import sweep_numbers

    return sweep_numbers(results)


def _sweep_notes(results: "StudyResults") -> list[str]:
    rows = _sweep_rows(results)
    missing = bool(rows) and any(row["chosen"] is None for row in rows)
    return ["Where no choice is shown, the fine-tuned models have no score on validation rows yet, or their task has none."] if missing else []


def _sweeps_fine_tuning(config: StudyConfig) -> bool:
    from plasticity_jax.report.selection import sweeps_fine_tuning

    return sweeps_fine_tuning(config)


STAGE = Stage(
    name="validation",
    title="answers to the validation rows, graded",
    run=evaluate.run,
    batched=evaluate.STAGE.batched,
    record=evaluate.Evaluated,
    parents={"model": "finetune", "task": "prepare"},
    plan=_plan,
    devices="all",
    work=evaluate.work,
    job="validation",
    tables={
        "validation": Table(_score_rows, on_page=False),
        "selected": Table(
            _choice_rows,
            title="Chosen fine-tunings",
            caption="For every base model and task, the swept fine-tuning with the highest accuracy on validation rows (finetune.select), a mean over "
            "fine-tuning seeds; of equals the first in the config’s order. Its test accuracy stands beside it; no other was compared on test rows to choose it.",
            optional=True,
        ),
        "settings": Table(
            _win_rows,
            title="Every fine-tuning setting, two values compared",
            caption="In how many of the swept fine-tunings the later of two values has the better test accuracy, a mean over seeds.",
            optional=True,
        ),
        "sweep": Table(
            _sweep_rows,
            title="The fine-tuning sweep, value by value",
            caption="Test accuracy of the swept fine-tunings, each a mean over seeds: lowest, median and highest, which is picked on the test rows and so "
            "flatters, and of the fine-tuning that is best on validation rows for each base model.",
            optional=True,
        ),
    },
    figures={
        "sweep": Figure(
            "The fine-tuning sweep",
            "Test accuracy over {symbol} in every swept fine-tuning, a mean over seeds, and the best of the sweep.",
            lambda results: bool(_sweep_rows(results)),
            _draw_sweep,
            section="finetuning",
            of_base=False,
            of_study=True,
            wide=True,
            applies=_sweeps_fine_tuning,
            notes=_sweep_notes,
            numbers=_sweep_numbers,
        ),
    },
)
