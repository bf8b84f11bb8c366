"""Import: a model that exists as the base model of a member of the grid, in place of a pretraining. And what the base model of a member is."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from plasticity_jax.config import Member, StudyConfig, grid_members
from plasticity_jax.data.named_tokenizers import TRAINED
from plasticity_jax.errors import UserError
from plasticity_jax.runs.run import Run
from plasticity_jax.stages.pretrain import pretrain_run
from plasticity_jax.stages.stage import IMPORTED, Context, Plan, Planned, Stage


@dataclass(frozen=True)
class Imported:
    """What `model.hf_import.read_folder` returns; see there."""

    parameters: int
    architecture: str
    dtype: str
    other_dtypes: dict[str, str]
    carried: dict[str, Any]


def base_run(config: StudyConfig, member: Member) -> Run:
    """The base model of a member of the grid: the run that pretrains it, or that imports it."""
    if member.model is None:
        return pretrain_run(config, member)
    from plasticity_jax.model.existing import open_existing

    existing = open_existing(member.model)
    return STAGE.new_run(config, existing.name, existing.fields, member=member.base, seed=member.seed)


def _plan(plan: Plan) -> Iterable[Planned]:
    """Refuses one model in two places: its runs would stand for both."""
    owners: dict[str, Member] = {}
    for own, member in plan.members:
        if member.model is not None:
            run = base_run(own, member)
            first = owners.setdefault(run.hash, member)
            if first.base != member.base:
                raise UserError(
                    f"grid.models: {first.model} ({first.base}) and {member.model} ({member.base}) hold the same model; leave one of the two out."
                )
            yield own, run


def _check(config: StudyConfig, runs: Sequence[Run]) -> None:
    """Refuses a model without a tokenizer, and a tokenizer for all."""
    from plasticity_jax.config import member_config

    if config.data.tokenizer != TRAINED:
        raise UserError(f"data.tokenizer={config.data.tokenizer!r} has no use, because each of grid.models has its own tokenizer; leave it out.")
    for member in grid_members(config):
        if member_config(config, member).data.tokenizer == TRAINED:
            raise UserError(f"grid.models: {member.model} holds no tokenizer.json or tokenizer.model; put the tokenizer of its training there.")


def run(context: Context) -> Imported:
    """Copies the member's model into the study."""
    from plasticity_jax.model.existing import copy_existing, open_existing

    (place,) = {member.model for member in grid_members(context.config) if member.base == context.run.member}
    existing = open_existing(place or "")
    if existing.fields != context.run.fields:
        raise UserError(f"grid.models: {place} has changed since the study began; run it again.")
    return Imported(**copy_existing(existing, context.directory))


STAGE = Stage(name=IMPORTED, title="models that exist", run=run, checkpoints=True, record=Imported, plan=_plan, check=_check, job="prepare")
