"""Forgetting: the loss of fine-tuned models on the held-out text of the pretraining corpus, which is the base model's before."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plasticity_jax.config import StudyConfig
from plasticity_jax.config.schema import PositiveInt, execution, result
from plasticity_jax.errors import UserError
from plasticity_jax.runs.run import Run
from plasticity_jax.stages.prepare import corpus_run
from plasticity_jax.stages.stage import Context, Knob, Program, Rows, Stage, Table, batch_fields, member_row, number
from plasticity_jax.stages.work import Ahead, Work

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from plasticity_jax.report.results import StudyResults


@dataclass(frozen=True)
class ForgettingConfig:
    """Held-out loss after fine-tuning, on the blocks of `train.held_out_tokens` that give the base model's."""

    held_out_loss: bool = result(False, "score every fine-tuned model on the corpus's held-out text")
    batch_size: PositiveInt = execution(32, "sequences scored at once; rounded up for the mesh")

    def check(self, config: StudyConfig) -> None:
        if self.held_out_loss and not config.data.has_text:
            raise UserError("forgetting.held_out_loss=True needs text, and data names none; give some in data.files or data.sources.")


@dataclass(frozen=True)
class HeldOut:
    """What `train.held_out.held_out_loss` returns for a model; and seconds of wall time."""

    held_out: dict[str, Any]
    seconds: float


def fields(config: StudyConfig, model: Run) -> dict[str, Any]:
    train = config.train
    found = {"held_out_tokens": train.held_out_tokens, "isolate_documents": config.data.isolate_documents, "compute_dtype": train.compute_dtype}
    return found | batch_fields(train.compute_dtype, config.forgetting.batch_size)


def run(context: Context) -> HeldOut:
    """Scores the parent "model" on the held-out blocks of the parent "corpus"."""
    from plasticity_jax.data.loader import TokenRecords
    from plasticity_jax.data.tokenizer import Tokenizer
    from plasticity_jax.train.held_out import first_blocks, held_out_loss

    start, config, corpus = time.monotonic(), context.config, context.parents["corpus"]
    model, tokenizer = context.model(dtype=context.compute_dtype), Tokenizer.load(corpus)
    found = held_out_loss(
        context.forward(model),
        model.config,
        model.params,
        first_blocks(TokenRecords(corpus / "tokens", "held_out"), tokens_per_domain=config.train.held_out_tokens),
        token_bytes=tokenizer.token_bytes,
        batch_size=config.forgetting.batch_size,
        isolate=tokenizer.eos_id if config.data.isolate_documents else None,
        loss_chunks=config.train.loss_chunks,
    )
    return HeldOut(found, time.monotonic() - start)


def programs(config: StudyConfig, mesh: "Mesh", members: int) -> Iterable[Program]:
    from plasticity_jax.model.forward import Forward, lower_record_nats
    from plasticity_jax.model.load import abstract_loaded
    from plasticity_jax.parallel.batches import smaller_batches
    from plasticity_jax.parallel.sharding import device_bytes

    train, params = config.train, abstract_loaded(config.model, mesh, config.train.compute_dtype)
    options = {"seq_len": train.seq_len, "isolate": config.data.isolate_documents, "loss_chunks": train.loss_chunks}
    forward, size = Forward.of(config, config.model, mesh), config.forgetting.batch_size
    yield Program(
        f"loss, {forward.batch_size(size)} x {train.seq_len}",
        lambda own: lower_record_nats(forward, config.model, params, batch_size=own.forgetting.batch_size, **options),
        (Knob("forgetting.batch_size", smaller_batches(mesh, size)),),
        device_bytes(params),
        way_out="raise train.loss_chunks",
    )


def work(ahead: Ahead) -> Iterable[Work]:
    """Reading the held-out blocks of every domain."""
    from plasticity_jax.model.flops import forward_flops

    config, train = ahead.config, ahead.config.train
    data = config.data
    domains = 1 if data.streamed else len(data.sources)
    blocks = domains * max(1, train.held_out_tokens // train.seq_len)
    yield Work(flops=forward_flops(config.model, blocks, train.seq_len), tokens=blocks * train.seq_len)


def held_out_rise_rows(results: "StudyResults") -> Rows:
    """Held-out loss of the base model and after fine-tuning on each task, over all domains ("all") and per domain; the rise is after − before."""
    rows = []
    for m in results.members:
        base = m.held_out or {}
        for task, found in m.records("forgetting").items():
            for domain, after in [("all", found.held_out), *sorted(found.held_out["domains"].items())]:
                before = base if domain == "all" else base.get("domains", {}).get(domain, {})
                low, high = number(before.get("loss")), number(after.get("loss"))
                row = member_row(m, task=task, domain=domain, loss_before=low, loss_after=high)
                rows.append(row | {"loss_rise": None if low is None or high is None else high - low})
    return rows


STAGE = Stage(
    name="forgetting",
    title="held-out loss after fine-tuning",
    run=run,
    record=HeldOut,
    config=ForgettingConfig,
    parents={"model": "finetune"},
    fields=fields,
    inputs=lambda config, model: {"corpus": corpus_run(config).id},
    applies=lambda config: config.forgetting.held_out_loss,
    devices="all",
    programs=lambda config, mesh, members: programs(config, mesh, members) if config.forgetting.held_out_loss else (),
    work=work,
    tables={
        "held_out_rise": Table(
            held_out_rise_rows,
            title="Held-out loss after fine-tuning",
            caption="Loss on the pretraining corpus's held-out text, in nats per token: of the base model, after fine-tuning, and the rise.",
            optional=True,
        ),
    },
)
