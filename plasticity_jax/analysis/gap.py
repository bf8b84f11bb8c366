"""The gap between the losses on held-out text and on text seen in training, with a unigram model as the control."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from plasticity_jax.analysis.statistics import Blocks, Estimate, cluster_bootstrap_gap
from plasticity_jax.config import StudyConfig
from plasticity_jax.data.loader import TokenRecords, order
from plasticity_jax.data.prepare import TOKENS
from plasticity_jax.errors import UserError
from plasticity_jax.model.forward import Forward, record_nats
from plasticity_jax.model.load import LoadedModel
from plasticity_jax.parallel import processes
from plasticity_jax.progress import Progress
from plasticity_jax.runs.storage import AnyPath

BOOTSTRAP_SAMPLES = 2000
RECORDS_PER_READ = 4096
EARLY, LATE = 0.25, 0.75  # first and last quarter of the reading


@dataclass(frozen=True, eq=False)
class Choice:
    """The blocks of both sides, as record indices of the two splits, domain by domain. Both sides have the same number of blocks of each domain.

    Attributes:
      seen, held_out: [n] each.
      read_at: for each seen block, when training last read it, as a fraction of the training stream, in [0, 1).
    """

    seen: Int[np.ndarray, " n"]
    held_out: Int[np.ndarray, " n"]
    read_at: Float[np.ndarray, " n"]


def last_readings(n_records: int, *, seed: int, batch_size: int, steps: int) -> Int[np.ndarray, " n_records"]:
    """Position in the stream of training records at which each record was last read; -1 for those never read."""
    # By the loader's definition, the concatenated batches of all steps equal one batch of that size.
    stream = order(n_records, seed=seed, batch_size=batch_size * steps, step=0)
    last_n = np.full(n_records, -1, np.int64)
    last_n[stream] = np.arange(len(stream))  # for repeated indices, the last assignment wins
    return last_n


def blocks_per_domain(weights: Float[np.ndarray, " d"], available: Int[np.ndarray, " d"], total: int) -> Int[np.ndarray, " d"]:
    """Number of blocks of each domain to take on each side.

    Every domain with a block on both sides gets its share of `total`. If a domain has fewer blocks than its share, all are scaled down alike, so that
    the weights are kept up to rounding. What rounding leaves over goes to the largest remainders.

    Args:
      weights: fraction of each domain in the training records, [d].
      available: blocks available on both sides (the smaller of the two numbers), [d].
      total: blocks per side.
    """
    usable_d = available > 0
    if not usable_d.any():
        return np.zeros(len(weights), np.int64)
    wanted_d = np.where(usable_d, weights, 0.0)
    wanted_d = total * wanted_d / wanted_d.sum()
    scale = min(1.0, (available[usable_d] / wanted_d[usable_d]).min())
    wanted_d = wanted_d * scale
    taken_d = np.floor(wanted_d + 1e-9).astype(np.int64)
    left_over = round(wanted_d.sum()) - taken_d.sum()
    # At most one block is left over per domain with a remainder, and such a domain has another block.
    taken_d[np.argsort(taken_d - wanted_d, kind="stable")[:left_over]] += 1
    return taken_d


def choose_blocks(train: TokenRecords, held_out: TokenRecords, last_reading: Int[np.ndarray, " n_train"], *, total: int, seed: int) -> Choice:
    """Draws the same number of blocks of each domain from the records that training read and from the held-out records.

    Seen blocks are spread evenly over the training stream, held-out blocks over the records of the domain, which are in the order of their documents:
    one block is drawn from each of equal stretches.

    Args:
      train, held_out: the two splits of a corpus.
      last_reading: what `last_readings` returns.
      total: blocks per side; fewer if a domain has too few (see `blocks_per_domain`).
      seed: of the draw.
    Raises:
      UserError: no domain has blocks on both sides.
    """
    read = np.flatnonzero(last_reading >= 0)
    read = read[np.argsort(last_reading[read])]
    sides = [(read[train.domain_of[read] == d], np.flatnonzero(held_out.domain_of == d)) for d in range(len(train.domains))]
    available = np.asarray([min(len(seen), len(held)) for seen, held in sides])
    weights = np.bincount(train.domain_of, minlength=len(train.domains)) / len(train)
    taken = blocks_per_domain(weights, available, total)
    if taken.sum() == 0:
        raise UserError(
            f"no domain of {', '.join(train.domains)} has a block on both sides of the gap; "
            "use more documents, more steps or a larger held_out_fraction."
        )
    rng = np.random.default_rng(seed)
    seen, held = (np.concatenate([_spread(side[i], n, rng) for side, n in zip(sides, taken)]) for i in (0, 1))
    return Choice(seen=seen, held_out=held, read_at=last_reading[seen] / (last_reading.max() + 1))


def _spread(candidates: np.ndarray, n: int | np.integer, rng: np.random.Generator) -> np.ndarray:
    """One of each of n stretches of `candidates`, of equal length up to rounding."""
    edges = np.arange(n + 1) * len(candidates) // max(n, 1)
    return candidates[rng.integers(edges[:-1], edges[1:])]


def unigram_log_probabilities(records: TokenRecords, left_out: Int[np.ndarray, " m"]) -> Float[np.ndarray, " vocab"]:
    """Log-probability (nats) of each token, add-one smoothed, counted over the records except those left out.

    Leaving out the blocks to score, the model has seen neither side, so that any remaining gap comes from how the sides were chosen.
    """
    counts, left_out = 1 + _token_counts(records), np.unique(left_out)
    for start in range(0, len(left_out), RECORDS_PER_READ):
        counts -= _counted(records, left_out[start : start + RECORDS_PER_READ])
    return np.log(counts / counts.sum())


_COUNTS: dict[tuple[str, str], Int[np.ndarray, " vocab"]] = {}  # (folder, split) → tokens of all records; of the last corpus only


def _token_counts(records: TokenRecords) -> Int[np.ndarray, " vocab"]:
    """How often each token occurs in all records: read once for all models that a command looks at."""
    key = (str(records.directory), records.split)
    if key not in _COUNTS:
        total, indices = np.zeros(records.vocab_size, np.int64), np.arange(len(records))
        with Progress("count tokens", total=len(records), unit="records") as progress:
            for start in range(0, len(records), RECORDS_PER_READ):
                part = indices[start : start + RECORDS_PER_READ]
                total += _counted(records, part)
                progress.update(len(part))
        _COUNTS.clear()
        _COUNTS[key] = total
    return _COUNTS[key]


def _counted(records: TokenRecords, indices: Int[np.ndarray, " m"]) -> Int[np.ndarray, " vocab"]:
    return np.bincount(records.tokens(indices).ravel(), minlength=records.vocab_size)


def summarise(
    losses: dict[str, np.ndarray], control: dict[str, np.ndarray], keys: dict[str, tuple[list, list]], read_at: np.ndarray, *, seed: int
) -> dict:
    """The results of the stage, from the losses of blocks.

    Args:
      losses, control: per side ("seen", "held_out"), [n]: losses of the model and of the unigram model on the same blocks, in nats per token.
      keys: per side, names of the blocks' domains and keys of the documents in which they begin.
      read_at: [n], when each seen block was last read, as a fraction of the training stream.
      seed: of the bootstrap.
    Returns:
      seen, held_out, gap, interval, domains, seen_early, seen_late, control, adjusted; see `measure_gap`.
    """
    gap = _gap(losses, keys, seed)
    control_gap = _gap(control, keys, seed)
    adjusted = _gap({side: losses[side] - control[side] for side in losses}, keys, seed)
    domains = {}
    for domain in sorted(set(keys["seen"][0])):
        means = {side: losses[side][np.asarray(keys[side][0]) == domain].mean() for side in losses}
        domains[domain] = {**means, "gap": means["held_out"] - means["seen"], "blocks": keys["seen"][0].count(domain)}
    return {
        "seen": losses["seen"].mean(),
        "held_out": losses["held_out"].mean(),
        "gap": gap.value,
        "interval": [gap.low, gap.high],
        "domains": domains,
        "seen_early": _mean_or_none(losses["seen"][read_at < EARLY]),
        "seen_late": _mean_or_none(losses["seen"][read_at >= LATE]),
        "control": {
            "seen": control["seen"].mean(),
            "held_out": control["held_out"].mean(),
            "gap": control_gap.value,
            "interval": [control_gap.low, control_gap.high],
            "passes": control_gap.low <= 0 <= control_gap.high,
        },
        "adjusted": {"gap": adjusted.value, "interval": [adjusted.low, adjusted.high]},
    }


def _gap(losses: dict[str, np.ndarray], keys: dict[str, tuple[list, list]], seed: int) -> Estimate:
    sides = {side: Blocks(losses[side], *keys[side]) for side in losses}
    return cluster_bootstrap_gap(sides["seen"], sides["held_out"], samples=BOOTSTRAP_SAMPLES, seed=seed)


def _mean_or_none(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def measure_gap(
    model: LoadedModel,
    pretraining: StudyConfig,
    corpus: AnyPath,
    *,
    forward: Forward,
    reading_seed: int,
    tokens_per_side: int,
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    """Compares a model's loss on text that its pretraining read with its loss on held-out text.

    Args:
      model: what the pretraining made, with its tokenizer.
      pretraining: the config of that run.
      corpus: directory of the prepare run that it read.
      forward: how to run the model.
      reading_seed: seed of the order of its batches.
      tokens_per_side: tokens wanted on each side; fewer where a domain has too few.
      seed: of the choice of blocks and of the bootstrap.
      batch_size: blocks at a time; rounded up for the mesh.
    Returns:
      On the first process (empty on the others): seen, held_out: mean losses in nats per token; gap = held_out − seen, with its 95% interval (bootstrap over documents within domains);
      domains: the same per domain, with the number of blocks on each side; seen_early and seen_late: mean over the blocks last read in the first and
      the last quarter of training (None where there are none); control: the same of the unigram model, which passes if its interval holds 0;
      adjusted: gap of the model's loss less the unigram model's, block by block, which is free of how hard the words of a block are;
      blocks: per side domain, document, record, loss and unigram loss of every block, read_at for the seen ones; tokens_per_side; left_out_domains.
    Raises:
      UserError: no domain has a block on both sides.
    """
    training = pretraining.train
    isolate = model.text_tokenizer.eos_id if pretraining.data.isolate_documents else None
    tokens = corpus / TOKENS
    records = {"seen": TokenRecords(tokens, "train"), "held_out": TokenRecords(tokens, "held_out")}
    train = records["seen"]
    last_reading = last_readings(len(train), seed=reading_seed, batch_size=training.batch_size, steps=training.steps)
    choice = choose_blocks(train, records["held_out"], last_reading, total=tokens_per_side // train.seq_len, seed=seed)
    indices = {"seen": choice.seen, "held_out": choice.held_out}
    losses, control, keys = {}, {}, {}
    for side, split in records.items():
        nats = record_nats(
            forward,
            model.config,
            model.params,
            split.tokens,
            indices[side],
            seq_len=split.seq_len,
            batch_size=batch_size,
            isolate=isolate,
            loss_chunks=training.loss_chunks,
            what=f"loss on {split.split} blocks",
        )
        losses[side] = nats / split.seq_len
    if not processes.primary():
        return {}
    log_probability_V = unigram_log_probabilities(train, choice.seen)
    for side, split in records.items():
        control[side] = -log_probability_V[split.tokens(indices[side])[:, 1:]].mean(axis=-1)
        keys[side] = ([train.domains[d] for d in split.domain_of[indices[side]]], split.document_of[indices[side]].tolist())
    blocks = {
        side: [
            {"domain": domain, "document": document, "record": int(record), "loss": float(loss), "unigram_loss": float(unigram)}
            for domain, document, record, loss, unigram in zip(*keys[side], indices[side], losses[side], control[side])
        ]
        for side in records
    }
    for block, read_at in zip(blocks["seen"], choice.read_at):
        block["read_at"] = float(read_at)
    return summarise(losses, control, keys, choice.read_at, seed=seed) | {
        "blocks": blocks,
        "tokens_per_side": len(choice.seen) * train.seq_len,
        "left_out_domains": [domain for domain in train.domains if domain not in keys["seen"][0]],
    }
