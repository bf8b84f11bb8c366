"""The grid of a study: its members, the config of each, and the rules for what may differ between them."""

import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from plasticity_jax.config.schema import GridConfig, StudyConfig, execution_fields
from plasticity_jax.errors import UserError

MOST_MEMBERS = 10_000
_LEAST = 2.0**-126  # of the normal numbers of float32
SWEPT_SECTIONS = ("model", "train", "decay", "data", "finetune")


@dataclass(frozen=True)
class Member:
    """One point of the grid.

    Attributes:
      name: `wd0.1`; with swept fields `wd0.1-peak_lr0.0004`, of the fine-tuning `wd0.1-sft_peak_lr1e-05`; with a seed other than 0 `wd0.1-s1`.
      base: the name without the fine-tuning's fields: members that share it share their pretraining.
      weight_decay: the decay coefficient λ; None of a model that exists and is labeled by something else.
      timescale: AdamW's timescale at the peak learning rate as a share of the run; None for λ = 0, and of a model that exists.
      seed: seed of the initial parameters and of the order of the batches; of models that exist, their number among those with one label.
      overrides: (dotted field, value) of every swept field, in the order of the config.
      changes: (dotted field, value) of what `grid.changes` sets for this member, in order.
      model: place of the model, where it exists already (`grid.models`); None for one that is pretrained here.
      label: (`models.<grid.axis>`, its label) of a model that exists, unless the label is its λ; otherwise empty.
    """

    name: str
    base: str
    weight_decay: float | None
    timescale: float | None
    seed: int
    overrides: tuple[tuple[str, Any], ...] = ()
    changes: tuple[tuple[str, Any], ...] = ()
    model: str | None = None
    label: tuple[tuple[str, Any], ...] = ()

    @property
    def values(self) -> dict[str, Any]:
        """What says which member it is: λ, its label, every swept field."""
        return {"weight_decay": self.weight_decay, **dict(self.label), **dict(self.overrides)}


def grid_members(config: StudyConfig) -> tuple[Member, ...]:
    """The members of the grid but those of `grid.leave_out`, seed by seed, then by swept fields, then by weight decay, in the order of the config.

    The timescale is 1/(lr λ) steps at the peak learning rate (1/λ steps with independent decay), of the member's own run;
    Wang & Aitchison, arXiv 2405.13698. A timescale is turned into λ before `grid.changes` apply.
    """
    grid = config.grid
    if grid.models:
        return _left(grid, _existing(grid))
    members = []
    for seed in grid.seeds:
        for values in itertools.product(*(values for _, values in grid.fields)):
            overrides = tuple(zip((name for name, _ in grid.fields), values))
            own = _with(config, overrides)
            parts = [(name.startswith("finetune."), f"-{name.rpartition('.')[2]}{name_text(value)}") for name, value in overrides]
            of_seed = f"-s{seed}" if seed else ""
            for decay, timescale in _decays(own):
                base = f"wd{decay:.4g}" + "".join(part for tuned, part in parts if not tuned)
                name = base + "".join(f"-sft_{part[1:]}" for tuned, part in parts if tuned) + of_seed
                base += of_seed
                changes = tuple(pair for pattern, changed in grid.changes if re.search(pattern, name) for pair in changed.items())
                if changes and decay:
                    timescale = _inverse(decay, _decay_per_run(_with(own, changes)), "weight_decay")
                members.append(Member(name, base, decay, timescale, seed, overrides, changes))
    return _left(grid, members)


def _left(grid: GridConfig, members: Iterable[Member]) -> tuple[Member, ...]:
    return tuple(member for member in members if not any(re.search(pattern, member.name) for pattern in grid.leave_out))


def grid_seeds(config: StudyConfig) -> tuple[int, ...]:
    """The pretraining seeds of the members; of models that exist, the numbers of those with one label."""
    return tuple(sorted({seed for _, _, seed in labeled_models(config.grid)})) if config.grid.models else config.grid.seeds


def labeled_models(grid: GridConfig) -> list[tuple[Any, str, int]]:
    """(label, place, seed) of `grid.models`, seed by seed. Labels are numbers if all of them are; a model without a seed gets the first free one."""
    numbers = [_number(entry[0]) for entry in grid.models]
    labels = [str(entry[0]) for entry in grid.models] if None in numbers else numbers
    given = {(label, entry[2]) for label, entry in zip(labels, grid.models) if len(entry) == 3}
    found = []
    for label, entry in zip(labels, grid.models):
        seed = entry[2] if len(entry) == 3 else next(s for s in itertools.count() if (label, s) not in given)
        given.add((label, seed))
        found.append((label, entry[1], seed))
    return sorted(found, key=lambda one: one[2])


def _number(label: Any) -> float | int | None:
    """A label as a number; None if it is none."""
    for kind in (int, float):
        try:
            found = kind(label) if isinstance(label, str) else label
        except ValueError:
            continue
        return found if math.isfinite(found) else None
    return None


def _existing(grid: GridConfig) -> Iterator[Member]:
    """The members that `grid.models` names, with every combination of the swept fields of the fine-tuning."""
    for label, place, seed in labeled_models(grid):
        of_seed, number = f"-s{seed}" if seed else "", not isinstance(label, str)
        text = f"{label:.4g}" if isinstance(label, float) else str(label)
        short = "wd" if grid.of_decay else re.sub(r"[^A-Za-z0-9]+", "_", grid.axis)
        name = f"{short}{text}" if number else re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("-._")[-40:] or "model"
        decay = float(label) if grid.of_decay and number else None
        about = () if grid.of_decay else ((f"models.{grid.axis}", label),)
        for values in itertools.product(*(values for _, values in grid.fields)):
            overrides = tuple(zip((name for name, _ in grid.fields), values))
            tuned = name + "".join(f"-sft_{field.rpartition('.')[2]}{name_text(value)}" for field, value in overrides) + of_seed
            changes = tuple(pair for pattern, changed in grid.changes if re.search(pattern, tuned) for pair in changed.items())
            yield Member(tuned, name + of_seed, decay, None, seed, overrides, changes, place, about)


def member_config(config: StudyConfig, member: Member) -> StudyConfig:
    """The config of one member: its swept fields and changes are set, and its grid sweeps weight decay and seeds only.

    Raises:
      UserError: the member is a model that exists, and no such model is at its place.
    """
    own = _with(config, (*member.overrides, *member.changes))
    if member.model is not None:
        from plasticity_jax.model.existing import with_existing

        own = with_existing(own, member.model)
    return replace(own, grid=replace(own.grid, fields=(), changes=(), leave_out=()))


def name_text(value: Any) -> str:
    """A value as part of a member's name, and so of a folder's: numbers as they are, `_` before words, nothing that could leave the folder."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    text = "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return "_" + re.sub(r"[^A-Za-z0-9.+]+", "_", text)[-40:]


def _decays(config: StudyConfig) -> Iterator[tuple[float, float | None]]:
    """(λ, timescale) for each of the grid's weight decays or timescales."""
    per_run = _decay_per_run(config)
    if config.grid.timescales is not None:
        yield from ((0.0 if t is None else _inverse(t, per_run, "timescales"), t) for t in config.grid.timescales)
    else:
        yield from ((float(w), None if w == 0 else _inverse(w, per_run, "weight_decay")) for w in config.grid.weight_decay or ())


def _inverse(value: float, per_run: float, field: str) -> float:
    """The timescale of a λ, or the λ of a timescale. Raises UserError where one of them, or their product, is no number of float32."""
    product = value * per_run
    if not all(_LEAST <= found <= 1 / _LEAST for found in (value, product)):
        raise UserError(
            f"grid.{field}={value:.4g} at a learning rate that would decay by {per_run:.4g} with λ = 1 is beyond what float32 holds; change it."
        )
    return 1.0 / product


def _decay_per_run(config: StudyConfig) -> float:
    """What λ = 1 would decay over a run at the peak learning rate."""
    return (config.train.peak_lr if config.decay.kind == "coupled" else 1.0) * config.train.steps


def _with(config: StudyConfig, values: Iterable[tuple[str, Any]]) -> StudyConfig:
    for name, value in values:
        section, _, last = name.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{last: value})})
    return config


def check_swept(config: StudyConfig, where: str, name: str) -> None:
    """Refuses a dotted field in which members cannot differ, whether `where`, grid.fields or grid.changes, sets it. Raises UserError."""
    if name.partition(".")[0] not in SWEPT_SECTIONS:
        raise UserError(
            f"{where} sets {name}, but members may differ only in their training and are all examined alike; "
            f"set a field of {', '.join(SWEPT_SECTIONS)}, or λ in grid.weight_decay."
        )
    if name == "finetune.seeds":
        raise UserError(f"{where} sets finetune.seeds, but every member is fine-tuned with all of them; list the seeds in finetune.seeds only.")
    if name in execution_fields(config):
        raise UserError(f"{where} sets {name}, which changes speed, cadence or place and not the result; set {name} once, for all members.")


def check_members(config: StudyConfig) -> None:
    """Refuses a grid unless each of its members has a name of its own and a config that fits together. Raises UserError."""
    grid = config.grid
    swept = [name for name, _ in grid.fields]
    for name, values in grid.fields:
        if swept.count(name) > 1:
            raise UserError(f"grid.fields lists {name} twice; list its values together.")
        if not values:
            raise UserError(f"grid.fields: {name} has no values; give it at least one, or leave it out.")
    for pattern, changed in grid.changes:
        for name in changed:
            if name in swept:
                raise UserError(f"grid.changes: {pattern!r} sets {name}, which grid.fields sweeps; do one of the two.")
    points = len(grid.models) if grid.models else len(grid.seeds) * len(grid.weight_decay or grid.timescales or ())
    size = math.prod([points, *(len(values) for _, values in grid.fields)])
    if size > MOST_MEMBERS:
        raise UserError(f"the grid has {size:,} members, and {MOST_MEMBERS:,} are the most; sweep fewer values or fields at once.")
    if config.finetune.select != "none" and not any(name.startswith("finetune.") and len(values) > 1 for name, values in grid.fields):
        raise UserError(
            f"finetune.select={config.finetune.select!r} has nothing to choose from; sweep a field of finetune in grid.fields, or set it to 'none'."
        )
    if "auto" in (*dict(grid.fields).get("train.compute_dtype", ()), *(changed.get("train.compute_dtype") for _, changed in grid.changes)):
        raise UserError("the grid sets train.compute_dtype to 'auto', which differs by machine; name float32 or bfloat16.")
    for values in itertools.product(*(values for _, values in grid.fields)):
        pairs = tuple(zip(swept, values))
        _check_alone(_with(config, pairs), "the members with " + ", ".join(f"{name}={value}" for name, value in pairs))
    if grid.models:
        _check_labels(grid)
    members = grid_members(config)
    whole = [member.name for member in grid_members(replace(config, grid=replace(grid, leave_out=())))]
    for pattern in grid.leave_out:
        if not any(re.search(pattern, name) for name in whole):
            raise UserError(f"grid.leave_out: {pattern!r} matches no member; the members are {', '.join(whole)}.")
    if not members:
        raise UserError(f"grid.leave_out={grid.leave_out} leaves no member; the grid's are {', '.join(whole)}.")
    names = [member.name for member in members]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"the grid names {', '.join(twice)} twice; values that agree in four digits, or equal seeds, are one member.")
    for pattern, _ in grid.changes:
        if not any(re.search(pattern, name) for name in names):
            raise UserError(f"grid.changes: {pattern!r} matches no member; the members are {', '.join(names)}.")
    for member in members:
        if member.changes:
            _check_alone(_with(config, (*member.overrides, *member.changes)), f"member {member.name}")


def _check_labels(grid: GridConfig) -> None:
    """Refuses labels that are no λ where they must be, and two models that would be one member. Raises UserError."""
    names: dict[str, str] = {}
    for label, place, *_ in grid.models if grid.of_decay else ():
        if (number := _number(label)) is None or number < 0:
            raise UserError(
                f"grid.models labels {place} with {label!r}, no weight decay; give a number from 0 on, or name grid.axis after the labels."
            )
    for member in _existing(replace(grid, fields=(), changes=())):
        if member.name in names:
            raise UserError(
                f"grid.models gives {names[member.name]} and {member.model} one name and one seed, {member.name}; give them different labels or seeds."
            )
        names[member.name] = member.model or ""


def _check_alone(own: StudyConfig, who: str) -> None:
    try:
        own.check()
    except UserError as error:
        raise UserError(f"for {who}: {error}") from error
