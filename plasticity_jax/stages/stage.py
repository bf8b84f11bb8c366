"""What a stage is: one declaration from which the graph, the executor, the program, the launchers, the status and the page are derived.

A stage is one kind of node in the graph of a study. Declare it as a module-level `Stage` in a file of this folder, or in a module of your own package
behind an entry point of the group `plasticity_jax.stages`; docs/extending.md walks through an example.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from plasticity_jax.config import Member, StudyConfig, grid_members, member_config, result_fields
from plasticity_jax.errors import UserError
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.runs.run import Run
from plasticity_jax.runs.storage import AnyPath
from plasticity_jax.stages.work import Ahead, Work

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from matplotlib.figure import Figure as Drawing

    from plasticity_jax.model.forward import Forward
    from plasticity_jax.model.load import LoadedModel
    from plasticity_jax.report.effects import Measure
    from plasticity_jax.report.results import MemberResults, StudyResults
    from plasticity_jax.report.verdicts import Verdict

PRETRAINED, IMPORTED = "pretrain", "import"
BASES = (PRETRAINED, IMPORTED)  # the stages of base models: those that are pretrained here, and those that exist (`grid.models`)

Rows = list[dict[str, Any]]
Planned = tuple[StudyConfig, Run]  # a run, and the config of the member that it is for


def _always(config: StudyConfig) -> bool:
    return True


@dataclass
class Context:
    """What the run function of a stage receives.

    Attributes:
      config: the study's config, with `train.compute_dtype` resolved and hardware rules applied.
      run: the run to carry out.
      directory: its directory, locked. A stage writes its files there and may add to `directory.provenance`.
      parents: role → path of the finished parent's directory.
    """

    config: StudyConfig
    run: Run
    directory: RunDirectory
    parents: dict[str, AnyPath]

    @property
    def section(self) -> Any:
        """The stage's own section of the config, such as `config.gap` for the stage "gap"."""
        return getattr(self.config, self.run.stage)

    @property
    def mesh(self) -> "Mesh | None":
        """The devices that the stage works on, as the config lays them out; None for one device."""
        from plasticity_jax.parallel import processes
        from plasticity_jax.parallel.mesh import make_mesh
        from plasticity_jax.stages import stages

        if stages()[self.run.stage].devices != "all" and processes.count() > 1:
            return None
        mesh = make_mesh(self.config.mesh)
        return mesh if mesh.size > 1 else None

    def model(self, role: str = "model", *, with_tokenizer: bool = False, dtype: str = "float32") -> "LoadedModel":
        """The model of a parent run, on `mesh`.

        Args:
          dtype: of its matrices.
        Raises:
          UserError: the checkpoint is damaged, or `with_tokenizer` is set and the model has none.
        """
        from plasticity_jax.model.load import load_model

        model = load_model(self.parents[role], mesh=self.mesh, dtype=dtype)
        if with_tokenizer:
            _ = model.text_tokenizer
        return model

    def forward(self, model: "LoadedModel") -> "Forward":
        """How the study runs a model, in the model's dtype."""
        from plasticity_jax.model.forward import Forward

        return Forward.of(self.config, model.config, model.mesh, model.dtype)

    @property
    def compute_dtype(self) -> str:
        """The dtype of the study's matmuls: "float32" or "bfloat16"."""
        from plasticity_jax.train.precision import resolve_compute_dtype

        return resolve_compute_dtype(self.config.train.compute_dtype)

    @property
    def task(self) -> str:
        """The task that the run is for."""
        return self.run.task_name

    @property
    def seed(self) -> int:
        """The run's seed; 0 where it has none."""
        return self.run.seed or 0


@dataclass(frozen=True)
class Table:
    """A table of numbers: a CSV file beside the page, and a table on it.

    Attributes:
      rows: one dict per row. Start a row about a member of the grid with `member_row(member)`, so that tables can be joined.
      title: heading on the page; by default the table's name.
      caption: one or two sentences below the heading: what a row is, units.
      on_page: False for a table that is a CSV file only.
      optional: leave it out of the page while it has no rows, because not every study has any.
    """

    rows: "Callable[[StudyResults], Rows]"
    title: str = ""
    caption: str = ""
    on_page: bool = True
    optional: bool = False


def _no_notes(results: "StudyResults") -> list[str]:
    return []


@dataclass(frozen=True)
class Figure:
    """A figure of the page, also written as PNG and SVG.

    Attributes:
      title: heading on the page.
      caption: what the figure shows. `{symbol}` and `{first}` stand for the symbol of the swept field and for "smallest" or "first", `{batches}` for
        what the members share, `{seeds}` for how single pretraining seeds are drawn.
      available: whether the study has results to draw.
      draw: draws the figure; called only when `available` says so. The helpers of `plasticity_jax.report.drawing` give it the page's style.
      section: where on the page it stands: "pretraining", "finetuning" or "inside" (Look inside).
      of_base: whether it shows base models only, so that it is drawn once where the fine-tuning is swept.
      of_study: whether it is drawn once for a whole study over several fields, and not for each of its parts.
      wide: whether it takes both columns of the page.
      applies: whether a study may ever have it; otherwise the page leaves it out.
      needs: what is missing where it applies and is not available, in words.
      notes: what could not be drawn or computed and why, as sentences below the caption.
      numbers: its numbers in words, for readers who do not see it; by default those of its markers.
    """

    title: str
    caption: str
    available: "Callable[[StudyResults], bool]"
    draw: "Callable[[StudyResults], Drawing]"
    section: str = "inside"
    of_base: bool = True
    of_study: bool = False
    wide: bool = False
    applies: Callable[[StudyConfig], bool] = _always
    needs: str = "no member has finished this stage"
    notes: "Callable[[StudyResults], list[str]]" = _no_notes
    numbers: "Callable[[StudyResults], str] | None" = None

    def text(self, results: "StudyResults") -> str:
        """The caption for this study."""
        batches = " All members see the same batches in the same order." if results.same_batches else ""
        seeds = "Faint: each pretraining seed." if len(results.seeds) > 1 else "One pretraining seed, so no spread between seeds."
        return self.caption.format(symbol=results.axis.symbol, first=results.axis.first, batches=batches, seeds=seeds)


@dataclass(frozen=True)
class Column:
    """A number per member in the summary: on the terminal, in summary.csv, and on the page of a study over several fields.

    Attributes:
      value: the number; None where it is missing.
      heading: short, for the terminal.
      unit: shown below the name on the page.
      digits: decimal places.
    """

    value: "Callable[[MemberResults], float | None]"
    heading: str
    unit: str = ""
    digits: int = 3


@dataclass(frozen=True)
class Knob:
    """A config field that makes a program smaller.

    Attributes:
      field: dotted, such as "finetune.grad_accum_steps".
      values: what to set it to instead, each of which makes the program smaller than the one before.
    """

    field: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Program:
    """A program of a stage, for `plasticity check`.

    Attributes:
      what: which one, in a few words, with its largest shapes.
      lower: lowers it for the mesh's devices, which need not be here; it is called with the config, and with others that differ in its knobs.
      knobs: what can be changed if it does not fit. The second is tried where no value of the first is enough.
      held: bytes per device that no knob makes smaller: parameters, and moments of the optimizer.
      axis: mesh axis that splits them.
      way_out: what is left to change if no knob is enough, and no larger mesh.
    """

    what: str
    lower: Callable[[StudyConfig], Any]
    knobs: tuple[Knob, ...] = ()
    held: int = 0
    axis: str = "fsdp"
    way_out: str = "take devices with more memory"


@dataclass(frozen=True)
class Batched:
    """How a stage carries out several runs as one program.

    Attributes:
      key: runs with an equal key may be carried out together.
      run: carries out such runs and returns the record of each.
      bytes: (config, mesh) → about how many bytes one of the runs takes on each device.
    """

    key: Callable[[Run], str]
    run: Callable[[Sequence[Context]], list[Any]]
    bytes: "Callable[[StudyConfig, Mesh], int]"


def _no_programs(config: StudyConfig, mesh: "Mesh", members: int) -> "Iterable[Program]":
    return ()


def _no_inputs(config: StudyConfig, model: Run) -> dict[str, str]:
    return {}


def _no_fields(config: StudyConfig, model: Run) -> dict[str, Any]:
    return {}


def _no_measures(results: "StudyResults") -> "Sequence[Measure]":
    return ()


def _no_check(config: StudyConfig, runs: Sequence[Run]) -> None:
    return None


@dataclass(frozen=True)
class Stage:
    """One kind of node in the graph of a study.

    The simplest stage examines models: it names the stages whose models it reads as the parent "model", and everything else follows. There is one run
    per model; its result fields are those of the stage's config section.

    Attributes:
      name: of the stage, of its folder, and of its config section. Lower case, digits and underscores.
      run: carries out one run and returns its record. Import heavy packages inside of it: declarations are read by `plasticity --help`.
      parents: role → stage of the parent, or stages it may be of. A run has one parent per role. For a stage that examines models, the role "model" is
        each model in turn, and other roles are taken from the model's own parents, such as "corpus". "pretrain" stands for base models, also for those
        that exist (`grid.models`); of these, models without such a parent are left out.
      title: what it does, in a few words: for `plasticity analyze --help` and the page.
      version: raise it when the code changes the results: earlier runs of the stage, and all that follows from them, become stale.
      config: the frozen dataclass of its section, where it has one of its own. Fields made with `execution_field` do not define the result.
      record: the type of what `run` returns, a dataclass of JSON values; results.json is read back into it. A field `diverged`, a reason or None,
        marks a run without a usable result.
      fields: result fields besides those of the section.
      inputs: parents besides those of `parents`, by role, as ids of runs.
      data: prepare runs that it needs.
      applies: whether a study has runs of it.
      plan: all runs of a study, for a stage that is not one run per model.
      check: refuses, with a UserError, what cannot work, before a study starts; receives the runs of the stage that are to be carried out.
      devices: "all" if every process takes part with its devices, "first" if the first process works while the others wait, "none" if that one needs
        no accelerator either.
      batched: where several runs can be carried out as one program (`grid.mode`).
      may_diverge: beginning of the roles of which some parents may have diverged, so long as one is left.
      programs: (config, mesh, members) → its largest programs, which `plasticity check` compiles; `members` runs are carried out by one call.
      work: what one of its runs computes, from which `plasticity check` estimates hours; None for a stage whose hours are not estimated.
      checkpoints: whether it writes checkpoints of a model.
      job: the cluster job that carries out all runs of the stage; "" for a stage that has a command of its own or is part of `plasticity analyze`.
      tables, figures, columns: what it adds to the report, by name.
      claims: the claims about weight decay that it holds against a study.
      measures: the numbers per model that the page compares between every two points.
      warnings: what a reader must know before believing its numbers, one sentence each.
    """

    name: str
    run: Callable[[Context], Any]
    parents: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    title: str = ""
    version: int = 1
    config: type | None = None
    record: Any = dict
    fields: Callable[[StudyConfig, Run], dict[str, Any]] = _no_fields
    inputs: Callable[[StudyConfig, Run], dict[str, str]] = _no_inputs
    data: Callable[[StudyConfig], list[Run]] | None = None
    applies: Callable[[StudyConfig], bool] = _always
    plan: "Callable[[Plan], Iterable[Planned]] | None" = None
    check: Callable[[StudyConfig, Sequence[Run]], None] = _no_check
    devices: str = "first"
    batched: "Batched | None" = None
    may_diverge: str | None = None
    programs: "Callable[[StudyConfig, Mesh, int], Iterable[Program]]" = _no_programs
    work: Callable[[Ahead], Iterable[Work]] | None = None
    checkpoints: bool = False
    job: str = ""
    tables: Mapping[str, Table] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)
    columns: Mapping[str, Column] = field(default_factory=dict)
    claims: "tuple[Callable[[StudyResults], Verdict], ...]" = ()
    measures: "Callable[[StudyResults], Sequence[Measure]]" = _no_measures
    warnings: "Callable[[StudyResults], list[str]] | None" = None

    def __post_init__(self):
        if not (self.name.isidentifier() and self.name == self.name.lower()):
            raise ValueError(f"stage name {self.name!r} must consist of lower-case letters, digits and underscores")
        if not callable(self.run):
            raise ValueError(f"stage {self.name!r} has run={self.run!r}; give the function that carries out one run")
        if self.plan is None and "model" not in self.parents:
            raise ValueError(f"stage {self.name!r} has neither a parent 'model' nor a plan; name the stages whose models it examines")
        if self.config is not None and not dataclasses.is_dataclass(self.config):
            raise ValueError(f"stage {self.name!r} has config={self.config!r}; give a frozen dataclass")
        for kind, given in ((Table, self.tables), (Figure, self.figures), (Column, self.columns)):
            for name, value in given.items():
                if not isinstance(value, kind):
                    raise ValueError(f"stage {self.name!r} gives {value!r} as {name!r}; give a {kind.__name__}")
        if self.devices not in ("all", "first", "none"):
            raise ValueError(f"stage {self.name!r} has devices={self.devices!r}; use 'all', 'first' or 'none'")

    @property
    def analysis(self) -> bool:
        """Whether `plasticity analyze` carries it out: it examines models, and is not a cluster job of its own."""
        return self.plan is None and not self.job

    def parent_stages(self, role: str) -> tuple[str, ...]:
        """The stages that a parent may be of. Base models need not be pretrained here: "pretrain" stands for all BASES."""
        found = self.parents.get(role, ())
        named = (found,) if isinstance(found, str) else tuple(found)
        return tuple(dict.fromkeys(stage for name in named for stage in (BASES if name == PRETRAINED else (name,))))

    def lacks(self, config: StudyConfig, model: Run) -> str | None:
        """The role of a parent that this stage takes from a model's own parents, and which the model has not."""
        given = {"model", *model.parents, *self.inputs(config, model)}
        return next((role for role in self.parents if role not in given), None)

    def new_run(self, config: StudyConfig, name: str, fields: dict[str, Any], parents: Mapping[str, str] = {}, **about: Any) -> Run:
        """A run of this stage. `about` holds the member, task and seed that it is for."""
        return Run(config.name, self.name, name, fields, dict(parents), version=self.version, **about)

    def on_model(self, config: StudyConfig, model: Run) -> Run:
        """The run that examines a model.

        Raises:
          UserError: the model lacks a parent that this stage needs.
        """
        if (role := self.lacks(config, model)) is not None:
            raise UserError(
                f"stage {self.name} needs the {role} that a model was made from, and {model.id} has none; use --only to leave {self.name} out."
            )
        parents = {role: model.parents[role] for role in self.parents if role in model.parents} | {"model": model.id}
        section = result_fields(getattr(config, self.name)) if self.config is not None else {}
        parents |= self.inputs(config, model)
        about = {"member": model.member or model.name, "task": model.task, "seed": model.seed}
        return self.new_run(config, model.name, section | self.fields(config, model), parents, **about)

    def read(self, results: dict[str, Any]) -> Any:
        """results.json as this stage's record; the strings "nan", "inf" and "-inf" become numbers. Raises ValueError if it is not one."""
        return _adapter(self.record).validate_python(results)


@functools.cache
def _adapter(record: Any):
    from pydantic import TypeAdapter

    return TypeAdapter(record)


class Plan:
    """The runs of a study, planned stage by stage, parents first.

    Attributes:
      config: the study's.
      members: the members of the grid, each with its own config.
    """

    def __init__(self, config: StudyConfig, stages: Iterable[Stage]):
        self.config = config
        self.members: list[tuple[StudyConfig, Member]] = [(member_config(config, member), member) for member in grid_members(config)]
        self._planned: dict[str, dict[str, Planned]] = {}
        for stage in stages:
            found = stage.plan(self) if stage.plan is not None else self._on_models(stage)
            for own, run in found:  # members share the runs that nothing swept defines
                self._planned.setdefault(stage.name, {}).setdefault(run.id, (own, run))

    def _on_models(self, stage: Stage) -> Iterable[Planned]:
        if stage.applies(self.config):
            for kind in stage.parent_stages("model"):
                for own, model in self.of(kind):
                    if kind != IMPORTED or stage.lacks(own, model) is None:  # how it was made is not known
                        yield own, stage.on_model(own, model)

    def of(self, stage: str) -> list[Planned]:
        """The runs of a stage that was planned before, each with the config of the first member that needs it."""
        return list(self._planned.get(stage, {}).values())

    @property
    def bases(self) -> list[Planned]:
        """The base models."""
        return [planned for stage in BASES for planned in self.of(stage)]

    @property
    def runs(self) -> list[Run]:
        """Every run, parents before children."""
        return [run for planned in self._planned.values() for _, run in planned.values()]

    @property
    def configs(self) -> dict[str, StudyConfig]:
        """Id → the config to carry a run out with."""
        return {run.id: own for planned in self._planned.values() for own, run in planned.values()}


def batch_fields(compute_dtype: str, batch_size: int) -> dict[str, int]:
    """The batch size, where it belongs to the result of a forward pass.

    In bfloat16 the shape of a batch decides how its products are rounded, and a greedy completion in four can change with it; in float32 none did.
    """
    return {"batch_size": batch_size} if compute_dtype == "bfloat16" else {}


def number(value: Any) -> float | None:
    """The value as a finite float; None for what is absent, not finite, or no number."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def member_row(member: "MemberResults", **values: Any) -> dict[str, Any]:
    """A row of a table: the member's name, λ and every swept field, the seed, then `values`."""
    from plasticity_jax.study.sweep import swept_values

    return {"member": member.name, **swept_values(member.member), "seed": member.member.seed, **values}
