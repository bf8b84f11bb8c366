"""Held-out loss per domain: the same blocks for every member, in nats per token and in bits per byte."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from plasticity_jax.config import ModelConfig
from plasticity_jax.data.loader import TokenRecords
from plasticity_jax.model.forward import Forward, record_nats
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
    forward: Forward,
    config: ModelConfig,
    params: Params,
    blocks: HeldOutBlocks,
    *,
    token_bytes: Int[np.ndarray, " vocab"],
    batch_size: int,
    isolate: int | None,
    loss_chunks: int,
) -> dict[str, Any]:
    """Scores the blocks.

    Args:
      token_bytes: bytes of text per token; 0 for the end of text, whose nats still count.
      batch_size, isolate, loss_chunks: of `forward.record_nats`.
    Returns:
      `loss` (nats per token, all domains weighted by their tokens), `bits_per_byte` (nats / ln 2 / bytes of the targets), and the same with
      `tokens` per domain under `domains`.
    """
    nats = record_nats(
        forward,
        config,
        params,
        blocks.records.__getitem__,
        np.arange(len(blocks.records)),
        seq_len=blocks.records.shape[1] - 1,
        batch_size=batch_size,
        isolate=isolate,
        loss_chunks=loss_chunks,
        what="held-out loss",
    )
    n_bytes = token_bytes[blocks.records[:, 1:]].sum(1, dtype=np.float64)
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
