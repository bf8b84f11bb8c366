"""Init: the step-0 parameters that every member of a seed and an architecture starts from."""

from collections.abc import Iterable, Sequence
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
    fields = {"model": to_dict(config.model), "seed": seed}
    if config.train.initial is not None:
        from plasticity_jax.stages.reward import model_content

        fields["initial"] = model_content(config.train.initial)
    return STAGE.new_run(config, f"s{seed}", fields, seed=seed)


def _plan(plan: Plan) -> Iterable[Planned]:
    return ((own, init_run(own, member.seed)) for own, member in plan.members if member.model is None)


def run(context: Context) -> Initial:
    """Draws the parameters from the run's seed, or reads those of `train.initial`, and saves them as checkpoint 0."""
    from plasticity_jax.train.initial import save_initial

    config = context.config
    parameters, sha256 = save_initial(config.model, context.seed, context.directory.path, place=config.train.initial)
    context.directory.provenance["step_0_sha256"] = sha256
    return Initial(parameters, sha256)


def _check(config: StudyConfig, runs: Sequence[Run]) -> None:
    """Refuses a folder of step-0 weights that is not there, or whose network is another one."""
    if config.train.initial is not None:
        from plasticity_jax.train.initial import check_initial

        check_initial(config.model, config.train.initial)


STAGE = Stage(name="init", title="step-0 parameters", run=run, checkpoints=True, record=Initial, plan=_plan, check=_check, job="prepare")
