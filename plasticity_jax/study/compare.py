"""Claims across studies: finished studies as settings of one comparison, what of them can be compared, and why the rest cannot."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from plasticity_jax.config import member_config, to_dict
from plasticity_jax.config.schema import result_fields
from plasticity_jax.errors import UserError
from plasticity_jax.progress import Progress
from plasticity_jax.report.optima import Best, Budget, Larger, Respect, by_loss, by_score, larger, optima_move
from plasticity_jax.report.results import StudyResults, collect, read_record
from plasticity_jax.report.selection import CHOSEN
from plasticity_jax.report.sentences import ended_or_waiting
from plasticity_jax.report.verdicts import Verdict, with_holm
from plasticity_jax.runs.directory import STUDY, open_run
from plasticity_jax.runs.run import Run
from plasticity_jax.runs.storage import AnyPath, is_local, location
from plasticity_jax.stages.stage import Rows
from plasticity_jax.study.sweep import DECAY, SELECTED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from plasticity_jax.stages.spectra import Spectra

FAMILIES = {("pre", False): "Llama", ("post", True): "OLMo-2"}  # by position of the norms, and norms of queries and keys
# What may differ between two settings of which one has the larger token budget: its length, the schedule that goes with it, and how much text was prepared.
OF_BUDGET = {
    "train.steps",
    "train.schedule",
    "train.warmup_fraction",
    "train.decay_fraction",
    "train.final_lr_fraction",
    "train.held_out_tokens",
    "data.max_tokens",
    "data.max_documents",
}
NOT_GREEDY = {"when", "split", "compute_dtype", "batch_size", "n_samples", "temperature", "top_k", "top_p", "seed"}  # of an evaluation


@dataclass(frozen=True)
class Setting:
    """A slice of a study in the comparison.

    Attributes:
      name: of the study, and what is particular to the slice; unique.
      tasks: those whose mean is its score.
    """

    name: str
    results: StudyResults
    tasks: tuple[str, ...] = ()

    @cached_property
    def fields(self) -> dict[str, Any]:
        """Dotted fields that define its models, without λ and the seed; the corpus as its prepare run identifies it."""
        member = self.results.members[0].member
        own = member_config(self.results.config, member)
        tree = {name: result_fields(getattr(own, name)) for name in ("model", "train", "decay", "finetune")}
        if any(axis == SELECTED for axis, _ in self.results.facet):
            swept = {name.partition(".")[2] for name, _ in self.results.config.grid.fields if name.startswith("finetune.")}
            tree["finetune"] |= dict.fromkeys(swept, CHOSEN)
        tree["data"] = {name: value for name, value in self._corpus.fields.items() if name != "kind"} if self._corpus else {}
        return {f"{section}.{name}": value for section, of_section in tree.items() for name, value in of_section.items()}

    @property
    def family(self) -> str:
        model = member_config(self.results.config, self.results.members[0].member).model
        return FAMILIES.get((model.norm_position, model.qk_norm), "other")

    @property
    def parameters(self) -> int | None:
        return max((m.pretrain.parameters for m in self.results.members if m.pretrain), default=None)

    @property
    def tokens_per_parameter(self) -> float | None:
        """Of the finished models, the median."""
        found = [m.pretrain.tokens / m.pretrain.parameters for m in self.results.members if m.pretrain]
        return float(np.median(found)) if found else None

    @property
    def about(self) -> dict[str, Any]:
        """Columns of a row that say which setting it is about."""
        return {"setting": self.name, "family": self.family, "parameters": self.parameters, "tokens_per_parameter": self.tokens_per_parameter}

    @cached_property
    def by_loss(self) -> Best | None:
        return by_loss().best(self.results)

    @cached_property
    def by_score(self) -> Best | None:
        return self.best_on(self.tasks)

    def best_on(self, tasks: Sequence[str]) -> Best | None:
        """By the mean score on tasks; None without one, or where every model has the same."""
        best = by_score(tasks).best(self.results) if tasks else None
        return None if best is None or (best.equals and len(best.equals) == len(self.scores(tasks)) - 1) else best

    def larger(self, tasks: Sequence[str]) -> Larger:
        """Whether the downstream-best λ is larger than the loss-best."""
        return larger(self.results, tasks)

    @property
    def losses(self) -> dict[float, float]:
        return _over(self.results, by_loss())

    def scores(self, tasks: Sequence[str]) -> dict[float, float]:
        """λ → mean score on tasks."""
        return _over(self.results, by_score(tasks)) if tasks else {}

    # ------------------------------------------------------------------------------------------------ what decides whether numbers compare

    @cached_property
    def _corpus(self) -> Run | None:
        return next((s.run for s in self.results.runs if s.run.id in {run.parents["corpus"] for run in self._pretrained}), None)

    @property
    def _pretrained(self) -> list[Run]:
        bases = {m.member.base for m in self.results.members}
        return [s.run for s in self.results.runs if s.run.stage == "pretrain" and s.run.member in bases]

    def summary(self, run: Run | None) -> dict[str, Any]:
        """What a prepare run says of its data; empty until it has finished."""
        return {} if run is None else self.results.prepared.get(run.id, {})

    @property
    def tokenizer(self) -> str | None:
        found = self.summary(self._corpus).get("tokenizer", {})
        return found.get("fingerprint") if isinstance(found, dict) else None

    @property
    def held_out(self) -> tuple[str, ...]:
        """Identifies the held-out records of its losses: equal only for equal tokenizer, records, and number of tokens read."""
        data = self.summary(self._corpus).get("fingerprint") or (self._corpus.hash if self._corpus else self.name)
        return data, str(self.fields["train.held_out_tokens"])

    @property
    def documents(self) -> tuple[str, ...] | None:
        """Identifies the held-out text, whatever its tokenizer; None where that is not recorded."""
        found = self.summary(self._corpus).get("documents", {}).get("fingerprint")
        return None if found is None else (found, str(self.fields["train.held_out_tokens"]))

    def rows(self, task: str) -> str | None:
        """Identifies the test rows of a task; None where the study does not have it."""
        run = next((s.run for s in self.results.runs if s.run.stage == "prepare" and s.run.task == task), None)
        summary = self.summary(run)
        return None if run is None else summary.get("sha256", {}).get("test") or summary.get("fingerprint") or run.hash

    def asked(self, task: str) -> str:
        """Identifies how the greedy answers to a task are generated and graded."""
        run = next((s.run for s in self.results.runs if s.run.stage == "evaluate" and s.run.task == task and s.run.fields["when"] == "after"), None)
        return "" if run is None else str(sorted((name, str(value)) for name, value in run.fields.items() if name not in NOT_GREEDY))

    def tuned(self, task: str) -> str:
        """Identifies the training rows and epochs of a task."""
        run = next((s.run for s in self.results.runs if s.run.stage == "prepare" and s.run.task == task), None)
        return str((self.summary(run).get("fingerprint") or (run and run.hash), getattr(self.results.config.tasks.get(task), "epochs", None)))


def _over(results: StudyResults, respect: Respect) -> dict[float, float]:
    from plasticity_jax.report.effects import measured

    return measured(results, respect.measure, list(results.points))


@dataclass(frozen=True)
class OtherModel:
    """A model beside the settings, such as a public one, by the spectra of it."""

    name: str
    path: AnyPath
    spectra: "Spectra"


@dataclass(frozen=True)
class Comparison:
    """Studies side by side, for notebooks: `tables()`, `figure(name)`, `verdicts`, `notes`; `write(out)` makes the page.

    Attributes:
      studies: as read.
      settings: their slices that compare weight decays, in their order.
      models: compared by their spectra alone.
      tasks: those that every setting learned, on the same test rows, asked in the same way; their mean is the score. Empty where there is none, and
        then the score of each setting is of the tasks that it learned itself.
      notes: what could not be computed or compared, and why, one sentence each.
    """

    studies: tuple[StudyResults, ...]
    settings: tuple[Setting, ...]
    models: tuple[OtherModel, ...]
    tasks: tuple[str, ...]
    notes: tuple[str, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the studies, unique."""
        return tuple(study_names(self.studies))

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """Whether the optima move down with tokens, for every pair of settings that differ in their budget; Holm's correction is over the pairs."""
        return with_holm([_move(fewer, more) for fewer, more in self.pairs])

    @cached_property
    def pairs(self) -> list[tuple[Setting, Setting]]:
        """Settings of one network and recipe of which the second had more tokens per parameter."""
        found = []
        for i, one in enumerate(self.settings):
            for other in self.settings[i + 1 :]:
                if _same_model(one, other) and not set(differing(one, other)) - OF_BUDGET:
                    fewer, more = sorted((one, other), key=_tokens)
                    found.append((fewer, more))
        return found

    @property
    def same_losses(self) -> bool:
        """Whether the losses of all settings stand beside each other: one tokenizer, one held-out set."""
        return len({setting.held_out for setting in self.settings}) <= 1

    @property
    def same_text(self) -> bool:
        """Whether all settings were measured on the same held-out text, so that bits per byte compare."""
        documents = {setting.documents for setting in self.settings}
        return self.same_losses or len(documents) == 1 and None not in documents

    def tables(self) -> dict[str, Rows]:
        """Name → rows: the best λ of every setting, over tasks and by task, what settings differ in, every λ, ranks, and the claim about tokens."""
        from plasticity_jax.report.comparison import tables

        return tables(self)

    def figure(self, name: str) -> "Figure":
        """A figure of the page: "best", "over_decay" or "ranks". Raises UserError for another name, or one that has nothing to show."""
        from plasticity_jax.report.comparison import draw

        return draw(self, name)

    def write(self, out: str | AnyPath) -> AnyPath:
        """Writes index.html with figures and tables into a folder and returns the page's path; see `report.comparison.write_comparison`."""
        from plasticity_jax.report.comparison import write_comparison

        return write_comparison(self, location(out))


def compare_studies(studies: Sequence[str | AnyPath], models: Sequence[str | AnyPath] = ()) -> Comparison:
    """Reads studies and what can be compared of them.

    Args:
      studies: folders with a study.json, or workdirs that hold one study; local or on a store.
      models: directories of finished spectra runs, as `plasticity analyze --only spectra` prints them.
    Raises:
      UserError: fewer than two studies, one twice, a path that is no study, or a model without spectra.
    """
    folders = [study_folder(place) for place in studies]
    if len(folders) < 2:
        raise UserError(f"--study is given {len(folders)} times; give it two or more, each the folder of a study or a workdir with one study.")
    _refuse_twice("--study", folders)
    others = [other_model(location(place)) for place in models]
    _refuse_twice("--model", [other.path for other in others])
    read = []
    with Progress("read studies", total=len(folders), unit="studies") as progress:
        for folder in folders:
            read.append(collect(folder))
            progress.update(1, note=folder.name)
    return comparison(read, others)


def comparison(studies: Sequence[StudyResults], models: Sequence[OtherModel] = ()) -> Comparison:
    """Compares studies already read."""
    notes: list[str] = []
    settings = _settings(studies, notes)
    tasks = _common_tasks(settings, notes)
    settings = [replace(setting, tasks=tasks or setting.results.learned) for setting in settings]
    kept = _same_spectra(settings, models, notes)
    _note_losses(settings, notes)
    _note_settings(settings, notes)
    _note_pairs(settings, notes)
    for results, name in zip(studies, study_names(studies)):
        notes += [f"{name}: {said}" for said in ended_or_waiting(results)]
        broken = [s.run.id for s in results.runs if s.state == "damaged"]
        notes += [f"{name}: files of {', '.join(broken)} have changed since, so their numbers are left out."] if broken else []
    return Comparison(tuple(studies), tuple(settings), tuple(kept), tasks, tuple(notes))


# ------------------------------------------------------------------------------------------------------------------------------ reading


def study_folder(place: str | AnyPath) -> AnyPath:
    """The folder of the study that a path names. Raises UserError if it names none, or a workdir with several."""
    path = location(place)
    if (path / STUDY).is_file():
        return path
    if not path.is_dir():
        raise UserError(f"--study={place}: no such directory; give the folder of a study, or a workdir that holds one study.")
    found = sorted(file.parent for file in path.glob(f"*/{STUDY}"))
    if not found:
        raise UserError(f"--study={place} holds no study (no study.json in it or in a folder below); give the folder of a study.")
    if len(found) > 1:
        raise UserError(
            f"--study={place} holds the studies {', '.join(folder.name for folder in found)}; name one of them, as in --study={found[0]}."
        )
    return found[0]


def other_model(path: AnyPath) -> OtherModel:
    """A model by its spectra run. Raises UserError if the path is another run or none."""
    directory = open_run(path)
    run = directory.run()
    if run.stage != "spectra":
        raise UserError(
            f"--model={path} is a run of stage {run.stage}; give the directory of the model's spectra run, which plasticity analyze --model {path} "
            "--only spectra makes and prints."
        )
    return OtherModel(run.name, path, read_record(path, "spectra"))


def _refuse_twice(flag: str, paths: Sequence[AnyPath]) -> None:
    names = [str(path.resolve()) if is_local(path) else str(path) for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{flag}={name} is given twice; name every one once.")


def _settings(studies: Sequence[StudyResults], notes: list[str]) -> list[Setting]:
    found = []
    for results, name in zip(studies, study_names(studies)):
        if results.existing:
            notes.append(f"{name} is about models that exist, whose pretraining is not known here, so it has no setting and is left out.")
            continue
        parts = [part for part in results.slices if part.members]
        if results.axis.field != DECAY:
            notes.append(f"{name} compares along {results.axis.name} and not along weight decay, so it has no best λ and is left out.")
            continue
        chosen = [part for part in parts if any(axis == SELECTED for axis, _ in part.facet)]
        if chosen and len(chosen) < len(parts):
            notes.append(
                f"{name} tries {len(parts) - len(chosen)} fine-tunings; the setting here is the one that was best for each model and task on "
                "validation rows. The others are on the study’s own page."
            )
        for part in chosen or parts:
            found.append(Setting(f"{name}, {part.title}" if part.facet else name, part))
    return found


def study_names(studies: Sequence[StudyResults]) -> list[str]:
    """A name for each study: that of its folder, with the workdir's before it where two have the same, and its whole path where that is not enough."""
    short = [results.path.name for results in studies]
    longer = [f"{results.path.parent.name}/{results.path.name}" for results in studies]
    names = [longer[i] if short.count(name) > 1 else name for i, name in enumerate(short)]
    return [str(studies[i].path) if names.count(name) > 1 else name for i, name in enumerate(names)]


# --------------------------------------------------------------------------------------------------------------- what can be compared


def _common_tasks(settings: Sequence[Setting], notes: list[str]) -> tuple[str, ...]:
    """Tasks that every setting learned on the same rows; says of every other one why not."""
    every = list(dict.fromkeys(task for setting in settings for task in setting.results.tasks))
    common = []
    for task in every:
        why = _not_common(task, settings)
        if why:
            notes.append(f"Task {task} is not part of the score: {why}.")
        else:
            common.append(task)
    if len(settings) > 1 and not common:
        notes.append(
            "No task was learned in every setting on the same test rows. Each score below is of the tasks that the setting learned itself: best λ stand "
            "beside each other, scores do not."
        )
    return tuple(common)


def _not_common(task: str, settings: Sequence[Setting]) -> str:
    absent = [s.name for s in settings if task not in s.results.tasks]
    if absent:
        return f"{'; '.join(absent)} {'does' if len(absent) == 1 else 'do'} not have it"
    if groups := _groups(settings, lambda s: s.rows(task)):
        return f"the test rows differ between {groups}"
    if groups := _groups(settings, lambda s: s.asked(task)):
        return f"its answers are generated or graded differently in {groups}"
    unlearned = [s.name for s in settings if task not in s.results.learned]
    scored = [s for s in settings if any(task in m.after for m in s.results.members)]
    return (
        f"no model learned it in {'; '.join(unlearned)}" + ("" if len(scored) == len(settings) else ", or none has been scored yet")
        if unlearned
        else ""
    )


def _groups(settings: Sequence[Setting], key: Callable[[Setting], Any]) -> str:
    """Names of the settings by their key, in words; empty where it is the same for all."""
    found: dict[Any, list[str]] = {}
    for setting in settings:
        found.setdefault(key(setting), []).append(setting.name)
    return " and ".join("; ".join(names) for names in found.values()) if len(found) > 1 else ""


def _note_losses(settings: Sequence[Setting], notes: list[str]) -> None:
    groups = _groups(settings, lambda s: s.held_out)
    if not groups:
        return
    whose = "tokenizers" if _groups(settings, lambda s: s.tokenizer) else "held-out rows"
    text = not _groups(settings, lambda s: s.documents) and settings[0].documents is not None
    instead = (
        "bits per byte do, because the text is the same, and stand in the table of every λ"
        if text
        else "the figure shows how far each is above the lowest of its own setting"
    )
    notes.append(f"Losses do not stand beside each other, because the {whose} of {groups} differ; {instead}.")


def _note_settings(settings: Sequence[Setting], notes: list[str]) -> None:
    for setting in settings:
        results, finished = setting.results, setting.losses
        if len(finished) < 2:
            said = "no model has a held-out loss yet" if not finished else f"only λ = {next(iter(finished)):.4g} has a held-out loss"
            notes.append(f"{setting.name}: {said}, so there is no best one among several.")
        diverged = sorted({m.point for m in results.members if m.state == "diverged"})
        if diverged:
            notes.append(f"{setting.name}: λ = {', '.join(f'{d:.4g}' for d in diverged)} diverged with a seed and cannot be the best.")
        if len(results.seeds) == 1:
            notes.append(f"{setting.name}: one pretraining seed, so its best λ may be the luck of one run.")
        if setting.tasks and setting.by_score is None:
            flat = len(setting.scores(setting.tasks)) > 0
            notes.append(f"{setting.name}: no best λ by score, because {'the score is the same for every λ' if flat else 'no λ has every score'}.")
        elif not setting.tasks:
            notes.append(f"{setting.name}: no task was learned, so there is no best λ after fine-tuning.")


def _note_pairs(settings: Sequence[Setting], notes: list[str]) -> None:
    """Why settings of one network with other numbers of tokens are not judged."""
    for i, one in enumerate(settings):
        for other in settings[i + 1 :]:
            if _same_model(one, other) and (more := sorted(set(differing(one, other)) - OF_BUDGET)):
                notes.append(
                    f"{one.name} and {other.name} have the same network and other numbers of tokens, but also differ in {', '.join(more)}: whether the optima "
                    "move with tokens cannot be told from them."
                )


def _same_spectra(settings: Sequence[Setting], models: Sequence[OtherModel], notes: list[str]) -> list[OtherModel]:
    """The models whose spectra are cut off as those of the settings are; says which are not."""
    of_settings = {s.name: spectra_settings(found) for s in settings if (found := first_spectra(s)) is not None}
    if len(set(of_settings.values())) > 1:
        notes.append(f"Ranks do not stand beside each other: {'; '.join(f'{name}: {_cut(cut)}' for name, cut in of_settings.items())}.")
    without = [s.name for s in settings if s.name not in of_settings]
    if without:
        notes.append(f"No spectra, and so no ranks: {'; '.join(without)}.")
    expected, kept = next(iter(of_settings.values()), None), []
    for model in models:
        if expected is not None and spectra_settings(model.spectra) != expected:
            notes.append(f"{model.name} is left out of the ranks: {_cut(spectra_settings(model.spectra))}, the settings {_cut(expected)}.")
        else:
            kept.append(model)
    return kept


def first_spectra(setting: Setting) -> "Spectra | None":
    return next((found for m in setting.results.members if (found := m.record("spectra")) is not None), None)


def spectra_settings(found: "Spectra") -> tuple[float, int, bool]:
    return found.mass, found.power, found.fold_norms


def _cut(cut: tuple[float, int, bool]) -> str:
    mass, power, folded = cut
    return f"{mass:g} of the sum of singular {'values' if power == 1 else 'values squared'}, norms {'' if folded else 'not '}folded in"


# ------------------------------------------------------------------------------------------------------------------------------- pairs


def _tokens(setting: Setting) -> float:
    return setting.tokens_per_parameter or 0.0


def _same_model(one: Setting, other: Setting) -> bool:
    """Whether both have finished models of one network, with other numbers of tokens."""
    both = [setting.fields for setting in (one, other)]
    network = [{name: value for name, value in fields.items() if name.startswith("model.")} for fields in both]
    return network[0] == network[1] and 0 < min(_tokens(one), _tokens(other)) and not np.isclose(_tokens(one), _tokens(other), rtol=0.02)


def differing(one: Setting, other: Setting) -> dict[str, tuple[Any, Any]]:
    """Dotted field → its values in both, where they differ; the training of a shared task as "tasks.<name>"."""
    names = dict.fromkeys([*one.fields, *other.fields])
    found = {name: (one.fields.get(name), other.fields.get(name)) for name in names if one.fields.get(name) != other.fields.get(name)}
    shared = [task for task in one.results.tasks if task in other.results.tasks]
    return found | {f"tasks.{task}": (a, b) for task in shared if (a := one.tuned(task)) != (b := other.tuned(task))}


def _move(fewer: Setting, more: Setting) -> Verdict:
    tasks = tuple(
        task
        for task in fewer.results.learned
        if task in more.results.learned and fewer.rows(task) == more.rows(task) and fewer.asked(task) == more.asked(task)
    )
    others = {name: values for name, values in differing(fewer, more).items() if name not in ("train.steps", "train.held_out_tokens")}
    shown = ", ".join(f"{name} ({_plain(a)} against {_plain(b)})" for name, (a, b) in others.items())
    budget, more_budget = (Budget(setting.name, setting.results, _tokens(setting)) for setting in (fewer, more))
    return optima_move(budget, more_budget, tasks, f"They also differ in {shown}." if shown else "")


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(to_dict(value))


def provenance(comparison: Comparison) -> Rows:
    """What every study rests on: its folder, the state of its runs, its data."""
    rows = []
    for results, name in zip(comparison.studies, comparison.names):
        states = [s.state for s in results.runs]
        counts = ", ".join(f"{state} {states.count(state)}" for state in dict.fromkeys(states))
        row = {"study": name, "path": str(results.path), "runs": counts, "compute_dtype": results.resolved.get("compute_dtype")}
        commits = {
            str(m.provenance["git"]["commit"])
            for m in results.members
            if isinstance(m.provenance.get("git"), dict) and "commit" in m.provenance["git"]
        }
        rows.append(row | {"seeds": results.seeds, "commits": tuple(sorted(commits))})
    return rows + [{"study": model.name, "path": str(model.path), "runs": "spectra of a model"} for model in comparison.models]
