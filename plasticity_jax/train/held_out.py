"""Held-out loss per domain: the same blocks for every member, in nats per token and in bits per byte."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from plasticity_jax.data.loader import Batch, TokenRecords, as_batch
from plasticity_jax.train.optimizer import Params


@dataclass(frozen=True)
class HeldOutBlocks:
    """Blocks to score.

    Attributes:
      domains: names of the domains that have held-out blocks.
      records: packed records of T + 1 tokens, domain after domain.
      domain_of: index into `domains` of each record.
    """

    domains: tuple[str, ...]
    records: Int[np.ndarray, "n record_length"]
    domain_of: Int[np.ndarray, " n"]


def first_blocks(records: TokenRecords, *, tokens_per_domain: int) -> HeldOutBlocks:
    """The first blocks of every domain, with `tokens_per_domain` targets: at least one block and at most all.

    Args:
      records: the held-out split.
    """
    n_blocks = max(1, tokens_per_domain // records.seq_len)
    chosen = [(name, np.flatnonzero(records.domain_of == d)[:n_blocks]) for d, name in enumerate(records.domains)]
    chosen = [(name, indices) for name, indices in chosen if len(indices)]
    if not chosen:
        return HeldOutBlocks((), np.empty((0, records.seq_len + 1), np.int32), np.empty(0, np.int64))
    indices = np.concatenate([indices for _, indices in chosen])
    domain_of = np.repeat(np.arange(len(chosen)), [len(indices) for _, indices in chosen])
    return HeldOutBlocks(tuple(name for name, _ in chosen), records.tokens(indices), domain_of)


def held_out_loss(
    eval_step: Callable[[Params, Batch], Float[Any, "b t"]],
    params: Params,
    blocks: HeldOutBlocks,
    *,
    token_bytes: Int[np.ndarray, " vocab"],
    batch_size: int,
    isolate: int | None,
) -> dict[str, Any]:
    """Scores the blocks.

    Args:
      eval_step: (params, batch) → nats of every target, see `step.compile_eval_step`.
      token_bytes: bytes of text per token; 0 for the end of text, whose nats still count.
      isolate: see `loader.as_batch`.
    Returns:
      `loss` (nats per token, all domains weighted by their tokens), `bits_per_byte` (nats / ln 2 / bytes of the targets), and the same with
      `tokens` per domain under `domains`.
    """
    nats, n_bytes = np.empty(len(blocks.records)), np.empty(len(blocks.records))
    for start in range(0, len(blocks.records), batch_size):
        records = blocks.records[start : start + batch_size]
        batch = as_batch(np.pad(records, ((0, batch_size - len(records)), (0, 0)), mode="edge"), isolate=isolate)
        losses = np.asarray(eval_step(params, batch), np.float64)[: len(records)]
        nats[start : start + len(records)] = losses.sum(1)
        n_bytes[start : start + len(records)] = token_bytes[records[:, 1:]].sum(1)
    n_targets = blocks.records.shape[1] - 1
    domains = {}
    for d, name in enumerate(blocks.domains):
        inside = blocks.domain_of == d
        domains[name] = _summary(nats[inside], n_bytes[inside], n_targets) | {"tokens": int(inside.sum()) * n_targets}
    return _summary(nats, n_bytes, n_targets) | {"domains": domains}


def _summary(nats: Float[np.ndarray, " n"], n_bytes: Float[np.ndarray, " n"], n_targets: int) -> dict[str, float]:
    tokens, total, size = len(nats) * n_targets, float(nats.sum()), float(n_bytes.sum())
    return {
        "loss": total / tokens if tokens else math.nan,
        "bits_per_byte": total / math.log(2) / size if size else math.nan,
    }
