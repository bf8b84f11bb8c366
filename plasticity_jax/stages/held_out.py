"""Held-out: the loss of models that exist on the held-out text of the study's corpus, by their own tokenizers."""

from plasticity_jax.stages import forgetting
from plasticity_jax.stages.prepare import corpus_run
from plasticity_jax.stages.stage import IMPORTED, Stage

STAGE = Stage(
    name="held_out",
    title="held-out loss of models that exist",
    run=forgetting.run,
    record=forgetting.HeldOut,
    parents={"model": IMPORTED, "corpus": "prepare"},
    fields=forgetting.fields,
    inputs=lambda config, model: {"corpus": corpus_run(config).id},
    applies=lambda config: bool(config.grid.models) and config.data.has_text,
    devices="all",
    programs=lambda config, mesh, members: forgetting.programs(config, mesh, members) if config.grid.models and config.data.has_text else (),
    work=forgetting.work,
)
