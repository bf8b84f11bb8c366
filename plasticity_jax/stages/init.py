"""Init: the step-0 parameters that every member of a seed and an architecture starts from."""

from collections.abc import Iterable
from dataclasses import dataclass

from plasticity_jax.config import StudyConfig, to_dict
from plasticity_jax.runs.run import Run
from plasticity_jax.stages.stage import Context, Plan, Planned, Stage


@dataclass(frozen=True)
class Initial:
    """Step-0 parameters.

    Attributes:
      parameters: their number.
      params_sha256: of their checksums, see `train.initial.params_sha256`.
    """

    parameters: int
    params_sha256: str


def init_run(config: StudyConfig, seed: int) -> Run:
    """The step-0 parameters that all members of a seed and an architecture start from."""
    return STAGE.new_run(config, f"s{seed}", {"model": to_dict(config.model), "seed": seed}, seed=seed)


def _plan(plan: Plan) -> Iterable[Planned]:
    return ((own, init_run(own, member.seed)) for own, member in plan.members)


def run(context: Context) -> Initial:
    """Draws the parameters from the run's seed and saves them as checkpoint 0."""
    from plasticity_jax.train.initial import save_initial

    parameters, sha256 = save_initial(context.config.model, context.seed, context.directory.path)
    context.directory.provenance["step_0_sha256"] = sha256
    return Initial(parameters, sha256)


STAGE = Stage(name="init", title="step-0 parameters", run=run, checkpoints=True, record=Initial, plan=_plan, job="prepare")
