"""What a study has found so far, read from its runs' directories into typed records. What is missing stays missing, and is never a number."""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from plasticity_jax.analysis.statistics import wilson_interval
from plasticity_jax.config import Member, StudyConfig, grid_members, grid_seeds, restore_config
from plasticity_jax.data.tasks import get_task
from plasticity_jax.errors import UserError, reason
from plasticity_jax.evaluate.metrics import pass_at_k
from plasticity_jax.report.selection import selected_members
from plasticity_jax.runs.directory import PROVENANCE, STUDY, RunDirectory, warnings_of
from plasticity_jax.runs.jsonfiles import read_json
from plasticity_jax.runs.logs import METRICS, read_whole_rows
from plasticity_jax.runs.run import Run
from plasticity_jax.runs.storage import AnyPath, location
from plasticity_jax.stages import guarded, number, stages
from plasticity_jax.stages.evaluate import is_regraded
from plasticity_jax.stages.stage import BASES, IMPORTED, PRETRAINED
from plasticity_jax.study.graph import runs_beside
from plasticity_jax.study.sweep import SELECTED, Axis, facet_axes, study_axis, swept_values

if TYPE_CHECKING:
    from plasticity_jax.stages.evaluate import Evaluated
    from plasticity_jax.stages.imported import Imported
    from plasticity_jax.stages.pretrain import Pretrained
    from plasticity_jax.stages.reward import Rewarded

T = TypeVar("T")


def once(compute: "Callable[[StudyResults], T]") -> "Callable[[StudyResults], T]":
    """Keeps what a function makes of results beside them: tables, figures and their words ask for the same numbers."""
    key = f"{compute.__module__}.{compute.__qualname__}"

    @functools.wraps(compute)
    def kept(results: "StudyResults") -> T:
        held = results.__dict__.setdefault("_kept", {})
        if key not in held:
            held[key] = compute(results)
        return held[key]

    return kept


@dataclass(frozen=True)
class RunState:
    """A run of the study and how far it has come: done, diverged, running, failed, damaged or missing; `warnings` says what was passed over for it."""

    run: Run
    state: str
    reason: str
    path: AnyPath
    warnings: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcomes:
    """What one evaluate run says of every problem.

    Attributes:
      greedy, majority: [P] whether that answer is right; `majority` is None where options were compared.
      right: [P] number of right samples, of `n_samples`.
      chosen: [P] whether the completion of the highest reward is right, `rewards`: [P] mean reward; None without rewards.
      counts: the metric whose verdicts `greedy` holds: "pass@1", or the one of those of compared options that the task is scored by.
    """

    greedy: np.ndarray
    right: np.ndarray | None
    majority: np.ndarray | None
    n_samples: int
    chosen: np.ndarray | None
    rewards: np.ndarray | None
    counts: str = "pass@1"

    def metric(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """[P] numerator and [P] weight of a metric that is a mean over problems: sum of the one over sum of the other. None for any other metric."""
        ones = np.ones(len(self.greedy))
        kind = name.partition("@")[0]
        if name == self.counts:
            return self.greedy, ones
        if self.right is None:
            return None
        share, draws = self.right / self.n_samples, name.rpartition("@")[2]
        found = {
            "maj": (self.majority, ones),
            "pass": (self.right > 0, ones),
            "mean": (share, ones),
            "unbiased_pass": (
                np.array([pass_at_k(self.n_samples, int(c), int(draws)) for c in self.right]) if kind == "unbiased_pass" else None,
                ones,
            ),
            "correct_ratio": (share, self.right > 0),
            "rm": (self.chosen, ones),
            "orm_score": (self.rewards, ones),
        }.get(kind)
        return None if found is None or found[0] is None else found


@dataclass(frozen=True)
class Score:
    """One member on one task, before or after fine-tuning; averaged over the fine-tuning seeds.

    Attributes:
      metrics: name ("pass@1", "maj@8") → value; all but "orm_score" lie in [0, 1].
      greedy: [P] share of the seeds whose greedy answer is right, per problem; problems in the order of the task's test rows.
      failures: shares of the greedy completions that are "wrong", have "no answer", or "timed out" in grading.
      majority_class: score of always giving the most frequent answer.
      runs: directories of the evaluate runs, one per fine-tuning seed.
      outcomes: what each of them says of every problem, for intervals.
      subsets: test set → its metrics and number of problems, where a task has several.
      scorer: what the rewards come from; None where there are none.
      unended: share of the completions that the limit on tokens ended; None where nothing is generated or it was not recorded.
    """

    metrics: dict[str, float]
    greedy: np.ndarray
    failures: dict[str, float]
    majority_class: float
    runs: tuple[AnyPath, ...]
    outcomes: tuple[Outcomes, ...] = ()
    subsets: dict[str, dict[str, float]] = field(default_factory=dict)
    scorer: str | None = None
    unended: float | None = None


@dataclass(frozen=True)
class MemberResults:
    """Everything known of one member of the grid.

    Attributes:
      point: its value of the swept field, its place on the axis.
      state, reason: of its base model's run, which pretrains or imports it.
      pretrain: record of a finished pretraining that has not diverged; None otherwise.
      imported: record of a finished import, of a model that exists.
      curve: rows of its metrics.jsonl, however far it has come.
      before, after: task → score on the test rows.
      validation: task → score on the validation rows, after fine-tuning.
      found: stage → task → record of the stage's run on this member's models that is done: "" for the base model, else the task it was fine-tuned on.
      provenance: of the base model's run.
      one_tokenizer: whether all members' losses are over the same tokens; otherwise they do not compare, and `loss` is None.
    """

    member: Member
    point: Any
    state: str
    reason: str
    pretrain: "Pretrained | None"
    curve: tuple[dict[str, Any], ...]
    before: dict[str, Score]
    after: dict[str, Score]
    found: dict[str, dict[str, Any]]
    provenance: dict[str, Any]
    validation: dict[str, Score] = field(default_factory=dict)
    imported: "Imported | None" = None
    one_tokenizer: bool = True

    @property
    def name(self) -> str:
        return self.member.name

    @property
    def parameters(self) -> int | None:
        """Of the base model; None until it is there."""
        found = self.pretrain or self.imported
        return None if found is None else found.parameters

    @property
    def held_out(self) -> dict[str, Any] | None:
        """What `train.held_out.held_out_loss` found for the base model, over all domains and by domain, by the model's own tokenizer."""
        if self.pretrain is not None:
            return self.pretrain.held_out
        found = self.record("held_out")
        return None if found is None else found.held_out

    @property
    def loss(self) -> float | None:
        """Held-out loss of the base model, nats per token over all domains."""
        return number(self.held_out["loss"]) if self.held_out and self.one_tokenizer else None

    def record(self, stage: str, task: str = "") -> Any:
        """What a stage found out about the base model, or about the model fine-tuned on a task; None where it has not finished."""
        return self.found.get(stage, {}).get(task)

    def records(self, stage: str) -> dict[str, Any]:
        """Task → what a stage found out; "" for the base model."""
        return self.found.get(stage, {})

    def gain(self, task: str) -> np.ndarray | None:
        """[P] after − before per problem, greedy."""
        if task not in self.before or task not in self.after:
            return None
        return self.after[task].greedy - self.before[task].greedy

    def after_task(self, task: str) -> np.ndarray | None:
        """[P] greedy score after fine-tuning, per problem."""
        return self.after[task].greedy if task in self.after else None


@dataclass(frozen=True)
class StudyResults:
    """A study as read from disk, or a slice of it. Points of the axis are compared within pretraining seeds and averaged over them.

    Attributes:
      members: in the order of the grid.
      prepared: id of a finished prepare run → its summary.
      axis: the field that is compared along.
      facet: (axis, value) of the other swept fields, in a slice that holds the members with these values; empty for a whole study.
      others: models that are not in the grid, and members of it, with what commands were asked for by themselves.
    """

    path: AnyPath
    config: StudyConfig
    resolved: dict[str, Any]
    members: tuple[MemberResults, ...]
    tasks: tuple[str, ...]
    prepared: dict[str, dict[str, Any]]
    runs: tuple[RunState, ...]
    axis: Axis
    facet: tuple[tuple[Axis, Any], ...] = ()
    others: tuple[MemberResults, ...] = ()

    @cached_property
    def slices(self) -> tuple["StudyResults", ...]:
        """The study by the values of the swept fields that are not on the axis; itself where there are none, or where it is a slice.

        What `finetune.select` chose comes last, as slices of their own.
        """
        axes = () if self.facet else facet_axes(self.config)
        if not axes:
            return (self,)
        by_facet: dict[tuple, list[MemberResults]] = {}
        for m in self.members:
            by_facet.setdefault(tuple((axis, axis.value(m.member)) for axis in axes), []).append(m)
        for m in selected_members(self):
            facet = tuple((axis, axis.value(m.member)) for axis in (*(axis for axis in axes if not axis.of_tuning), SELECTED))
            by_facet.setdefault(facet, []).append(m)
        return tuple(replace(self, members=tuple(members), facet=facet) for facet, members in by_facet.items())

    @property
    def title(self) -> str:
        """What is particular to a slice, such as "peak lr = 0.0004"."""
        return ", ".join(axis.equation(value) for axis, value in self.facet)

    def label(self, member: MemberResults) -> str:
        """A member by its value on the axis, and by the others that are swept where this is a whole study."""
        others = () if self.facet else facet_axes(self.config)
        return ", ".join([self.axis.equation(member.point), *(axis.equation(axis.value(member.member)) for axis in others)])

    @property
    def seeds(self) -> tuple[int, ...]:
        """The pretraining seeds; of models that exist, the numbers of those with one label."""
        return grid_seeds(self.config)

    @property
    def existing(self) -> bool:
        """Whether its base models were pretrained elsewhere (`grid.models`)."""
        return bool(self.config.grid.models)

    @property
    def no_loss(self) -> str:
        """Why models that exist have no held-out losses that compare, as a sentence; empty where they have."""
        if not self.existing or any(m.loss is not None for m in self.members):
            return ""
        if not self.config.data.has_text:
            return "There is no held-out loss, because the config names no text to read (data.files)."
        if all(m.one_tokenizer for m in self.members):
            return ""  # not yet
        return "Held-out losses in nats per token do not compare, because the models have different tokenizers; held_out.csv has bits per byte."

    @cached_property
    def same_start(self) -> bool:
        """Whether the members of a seed start from the same parameters."""
        return self._shared(lambda run: run.parents["init"])

    @cached_property
    def same_batches(self) -> bool:
        """Whether the members of a seed see the same batches in the same order."""
        return self._shared(lambda run: (run.parents["corpus"], run.fields["train"]["batch_size"]))

    def _shared(self, key: Callable[[Run], Any]) -> bool:
        names = {m.member.base for m in self.members}
        pretrained = [s.run for s in self.runs if s.run.stage == PRETRAINED and s.run.member in names]
        return bool(pretrained) and len({(run.seed, key(run)) for run in pretrained}) == len({run.seed for run in pretrained})

    @cached_property
    def points(self) -> tuple[Any, ...]:
        """The values of the swept field: numbers ascending, others in the order of the config."""
        found = tuple(dict.fromkeys(m.point for m in self.members))
        return found if self.axis.scale == "categories" else tuple(sorted(found))

    def swept(self, point: Any) -> dict[str, Any]:
        """Columns of a row about a point: λ and every swept field."""
        return swept_values(self.at(point)[0].member)

    def timescale(self, point: Any) -> float | None:
        """AdamW's timescale at this point as a share of the run; None without decay."""
        return self.at(point)[0].member.timescale

    def at(self, point: Any) -> list[MemberResults]:
        """Members with this value, one per pretraining seed."""
        return [m for m in self.members if m.point == point]

    def mean(self, point: Any, value: Callable[[MemberResults], Any]) -> Any:
        """Mean of a member's number or array over the seeds that have it; None if none has."""
        found = [v for m in self.at(point) if (v := value(m)) is not None]
        return np.mean(found, axis=0) if found else None

    @cached_property
    def losses(self) -> dict[Any, float]:
        """Point → held-out loss, for the points that have one, in their order."""
        found = {point: self.mean(point, lambda m: m.loss) for point in self.points}
        return {point: float(loss) for point, loss in found.items() if loss is not None}

    @cached_property
    def learned(self) -> tuple[str, ...]:
        """Tasks whose best fine-tuned member has a 95% (Wilson) lower bound above the majority class, on the rows of `learned_on`."""
        return tuple(task for task in self.tasks if (bound := self.lower_bound(task)) is not None and bound[0] > bound[1])

    def learned_on(self, task: str) -> str:
        """The rows that say whether a task was learned: "validation" where the models were scored on them, otherwise "test"."""
        return "validation" if any(task in m.validation for m in self.members) else "test"

    def lower_bound(self, task: str) -> tuple[float, float] | None:
        """(95% lower bound of the best member's greedy score after fine-tuning, majority class); None if no member has one."""
        on = self.learned_on(task)
        found = [score for m in self.members if (score := (m.validation if on == "validation" else m.after).get(task)) is not None]
        scores = [score for score in found if np.all(np.isfinite(score.greedy)) and len(score.greedy)]
        if not scores:
            return None
        best = max(scores, key=lambda score: score.greedy.mean())
        return wilson_interval(round(float(best.greedy.sum())), len(best.greedy))[0], best.majority_class

    def task_mean(self, point: Any, value: Callable[[MemberResults, str], Any]) -> float | None:
        """Mean over the learned tasks of the mean over problems; None unless every learned task has a value."""
        means = [None if (v := self.mean(point, lambda m, t=task: value(m, t))) is None else float(np.mean(v)) for task in self.learned]
        found = [mean for mean in means if mean is not None]
        return float(np.mean(found)) if means and len(found) == len(means) else None


def collect(study_dir: AnyPath) -> StudyResults:
    """Reads a study directory, finished or not.

    Args:
      study_dir: `<workdir>/<study>`, with its study.json.
    Raises:
      UserError: no study.json there, or one of another version.
    """
    study_dir = location(study_dir)
    file = study_dir / STUDY
    if not file.is_file():
        raise UserError(f"{study_dir} holds no study.json; run plasticity study first, or give the folder of a study.")
    tree = read_json(file)
    try:
        runs = [Run.from_dict(row) for row in tree["runs"]]
        config, resolved = restore_config(tree["config"]), dict(tree["resolved"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is not a study of this version ({error!r} is missing); run plasticity study again.") from error
    states, axis = tuple(_state(study_dir, run) for run in runs), study_axis(config)
    prepared = {s.run.id: RunDirectory(s.path).results() for s in states if s.run.stage == "prepare" and s.state == "done"}
    members = tuple(
        _member(member, axis.value(member), [s for s in states if s.run.member in (member.name, member.base)]) for member in grid_members(config)
    )
    if len({s.run.parents["corpus"] for s in states if s.run.stage == "held_out"}) > 1:
        members = tuple(replace(m, one_tokenizer=False) for m in members)
    trained = tuple(name for name in config.tasks if _is_trained(config, name))
    return StudyResults(study_dir, config, resolved, members, trained, prepared, states, axis, others=_others(file))


def _others(file: AnyPath) -> tuple[MemberResults, ...]:
    """What the runs beside a study.json say, by the model that they are about."""
    by_model: dict[str, list[RunState]] = {}
    for other in runs_beside(file):
        run = other.run
        if not other.stale and not is_regraded(run) and run.stage != "prepare":
            by_model.setdefault(run.member or run.name, []).append(_state(file.parent, run))
    return tuple(_member(Member(name, name, None, None, 0), None, states) for name, states in by_model.items())


def _is_trained(config: StudyConfig, task: str) -> bool:
    """Whether models are fine-tuned on a task; the others have a table of their own. A study may be read where its tasks are not."""
    try:
        return get_task(task, config.tasks).trained
    except UserError:
        return True


def _state(study_dir: AnyPath, run: Run) -> RunState:
    path = study_dir / run.id
    directory = RunDirectory(path)
    state, reason = directory.state()
    if directory.done and (damage := directory.damage()):
        state, reason = "damaged", damage
    try:
        warned = tuple(warnings_of(path))
    except UserError as error:
        warned = (str(error),)
    provenance = {}
    if state == "done" and (path / PROVENANCE).is_file():
        with contextlib.suppress(UserError):
            provenance = read_json(path / PROVENANCE)
    return RunState(run, state, reason, path, warned, provenance)


def _member(member: Member, point: Any, states: list[RunState]) -> MemberResults:
    base = next((s for s in states if s.run.stage in BASES), None)
    finished = base if base is not None and base.state == "done" else None
    records = {} if finished is None else {finished.run.stage: _record(finished)}

    return MemberResults(
        member=member,
        point=point,
        state="missing" if base is None else base.state,
        reason="" if base is None else base.reason,
        pretrain=records.get(PRETRAINED),
        curve=tuple(row for row in read_whole_rows(base.path / METRICS) if isinstance(row.get("step"), int)) if base is not None else (),
        before=_scores(states, "evaluate", "before"),
        after=_scores(states, "evaluate", "after"),
        validation=_scores(states, "validation", None),
        found=_found(states),
        provenance=read_json(finished.path / PROVENANCE) if finished is not None and (finished.path / PROVENANCE).is_file() else {},
        imported=records.get(IMPORTED),
    )


def read_record(path: AnyPath, stage: str) -> Any:
    """What a finished run wrote, as the record of its stage. Raises UserError if it is not one."""
    try:
        return stages()[stage].read(RunDirectory(path).results())
    except ValueError as error:
        raise UserError(f"{path} holds results of another version of stage {stage} ({reason(error)}); delete it and run again.") from error


def _record(state: RunState) -> Any:
    return read_record(state.path, state.run.stage)


def _found(states: list[RunState]) -> dict[str, dict[str, Any]]:
    """Records of the stages that examine models, by stage and task. Of several fine-tuning seeds the first counts."""
    found: dict[str, dict[str, Any]] = {}
    for s in states:
        stage = stages().get(s.run.stage)
        if stage is not None and stage.plan is None and s.state == "done":
            record = guarded(stage, f"results of {s.run.id}", _record, None)(s)
            if record is not None:
                found.setdefault(s.run.stage, {}).setdefault(s.run.task or "", record)
    return found


def _scores(states: list[RunState], stage: str, when: str | None) -> dict[str, Score]:
    by_task: dict[str, list[RunState]] = {}
    for s in states:
        if s.run.stage == stage and s.state == "done" and s.run.fields.get("when") == when:
            by_task.setdefault(s.run.task_name, []).append(s)
    rewards = {s.run.parents["completions"]: _record(s) for s in states if s.run.stage == "reward" and s.state == "done"}
    return {task: _score(found, [rewards.get(s.run.id) for s in found]) for task, found in by_task.items()}


def _score(states: list[RunState], rewards: "list[Rewarded | None]") -> Score:
    results: list[Evaluated] = [_record(s) for s in states]
    outcomes = [_outcomes(r, reward) for r, reward in zip(results, rewards, strict=True)]
    rewarded, unended = [reward for reward in rewards if reward is not None], [r.unended for r in results if r.unended is not None]
    metrics = _means([r.metrics for r in results])
    if len(rewarded) == len(results):
        metrics |= _means([reward.metrics for reward in rewarded])
    return Score(
        metrics=metrics,
        greedy=np.mean([found.greedy for found in outcomes], axis=0),
        failures=_means([r.failures["greedy"] for r in results]),
        majority_class=results[0].majority_class,
        runs=tuple(s.path for s in states),
        outcomes=tuple(outcomes),
        subsets={name: _means([r.subsets[name] for r in results]) for name in results[0].subsets},
        scorer=rewarded[0].scorer if rewarded else None,
        unended=float(np.mean(unended)) if unended else None,
    )


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _outcomes(results: "Evaluated", reward: "Rewarded | None") -> Outcomes:
    def column(tree: dict[str, list[float]], name: str) -> np.ndarray | None:
        return np.asarray(tree[name], dtype=np.float64) if name in tree else None

    found, rewarded = results.per_problem, {} if reward is None else reward.per_problem
    greedy = np.asarray(found["greedy"], dtype=np.float64)
    by_length = "pass@1" not in results.metrics and not np.isclose(results.metrics.get("accuracy", np.nan), greedy.mean(), atol=1e-9)
    return Outcomes(
        greedy,
        column(found, "samples"),
        column(found, "majority"),
        results.n_samples,
        column(rewarded, "rm"),
        column(rewarded, "orm"),
        "pass@1" if "pass@1" in results.metrics else "acc_norm" if by_length else "accuracy",
    )
