"""The gap on planted corpora: what is equal on both sides gives none, what was memorised gives the planted one."""

import json
from dataclasses import asdict

import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given
from hypothesis import strategies as st

from plasticity_jax.analysis import gap
from plasticity_jax.analysis.gap import blocks_per_domain, choose_blocks, last_readings, summarise, unigram_log_probabilities
from plasticity_jax.config import GapConfig, ModelConfig, StudyConfig, TrainConfig
from plasticity_jax.data.loader import TokenRecords, order
from plasticity_jax.data.packing import MANIFEST, index_path, records_path
from plasticity_jax.errors import UserError
from plasticity_jax.model.checkpoint import Checkpoints
from plasticity_jax.model.forward import Forward, record_nats
from plasticity_jax.model.transformer import init_params
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.runs.run import Run
from plasticity_jax.stages import gap as stage_gap
from plasticity_jax.stages.stage import Context

SEQ_LEN, VOCAB = 15, 300
DOMAINS = ("long", "short")
CONFIG = ModelConfig(vocab_size=VOCAB, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24)


def write_corpus(folder, sizes: dict[str, tuple[int, int]], *, blocks_per_document: int = 3, seed: int = 0):
    """Records of iid tokens, with another distribution in each domain; the same on both sides."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    shares = [rng.dirichlet(np.full(VOCAB, 0.3)) for _ in DOMAINS]
    for split, counts in sizes.items():
        domain_of = np.repeat(np.arange(len(DOMAINS)), counts)
        writer = ArrayRecordWriter(str(records_path(folder, split)), "group_size:1,uncompressed")
        for domain in domain_of:
            writer.write(rng.choice(VOCAB, size=SEQ_LEN + 1, p=shares[domain]).astype("<u2").tobytes())
        writer.close()
        np.save(index_path(folder, split, "domain_of"), domain_of.astype(np.int32))
        np.save(index_path(folder, split, "document_of"), (np.arange(len(domain_of)) // blocks_per_document).astype(np.int32))
    manifest = {
        "seq_len": SEQ_LEN,
        "vocab_size": VOCAB,
        "dtype": "<u2",
        "domains": list(DOMAINS),
        "fingerprint": "0",
        "splits": {split: {name: {"records": n} for name, n in zip(DOMAINS, counts)} for split, counts in sizes.items()},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tokens", {"train": (300, 600), "held_out": (60, 90)})


@pytest.mark.parametrize("n_records, batch_size, steps", [(40, 4, 5), (10, 4, 6)])
def test_last_readings_are_those_of_the_batches(n_records, batch_size, steps):
    expected = np.full(n_records, -1)
    for step in range(steps):
        for row, record in enumerate(order(n_records, seed=3, batch_size=batch_size, step=step)):
            expected[record] = step * batch_size + row
    np.testing.assert_array_equal(last_readings(n_records, seed=3, batch_size=batch_size, steps=steps), expected)


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 60)), min_size=1, max_size=6), st.integers(1, 400))
def test_blocks_keep_the_weights_and_never_exceed_what_exists(domains, total):
    weights, available = (np.asarray(column) for column in zip(*domains))
    weights = weights / weights.sum()
    taken = blocks_per_domain(weights, available, total)
    assert (taken <= available).all() and taken.sum() <= total
    usable = available > 0
    if not usable.any():
        assert taken.sum() == 0
        return
    shares = weights[usable] / weights[usable].sum()
    full = min(total, (available[usable] / shares).min())
    # Every domain is within one block of its exact share of the largest size that all can fill.
    assert (np.abs(taken[usable] - full * shares) < 1 + 1e-6).all()
    assert abs(taken.sum() - full) <= 0.5 + 1e-6


def test_blocks_of_known_cases():
    weights = np.array([0.5, 0.3, 0.2])
    assert blocks_per_domain(weights, np.array([99, 99, 99]), 10).tolist() == [5, 3, 2]
    assert blocks_per_domain(weights, np.array([99, 99, 1]), 10).tolist() in ([3, 1, 1], [2, 2, 1])
    assert blocks_per_domain(weights, np.array([99, 0, 99]), 7).tolist() == [5, 0, 2]


def test_sides_have_equal_blocks_per_domain_and_only_read_records(corpus):
    train, held_out = TokenRecords(corpus, "train"), TokenRecords(corpus, "held_out")
    last = last_readings(len(train), seed=1, batch_size=8, steps=50)
    choice = choose_blocks(train, held_out, last, total=90, seed=0)
    seen, held = train.domain_of[choice.seen], held_out.domain_of[choice.held_out]
    np.testing.assert_array_equal(seen, held)
    np.testing.assert_array_equal(np.bincount(seen), [30, 60])
    assert len(set(choice.seen.tolist())) == len(set(choice.held_out.tolist())) == 90
    assert (last[choice.seen] >= 0).all()
    np.testing.assert_allclose(choice.read_at, last[choice.seen] / 400)
    # Evenly over the reading: every tenth of it holds about a tenth of the blocks.
    assert np.histogram(choice.read_at, bins=10, range=(0, 1))[0].min() >= 5
    again, other = (choose_blocks(train, held_out, last, total=90, seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(choice.seen, again.seen)
    assert (choice.seen != other.seen).any()


def test_short_training_takes_fewer_blocks_and_keeps_the_weights(corpus):
    train, held_out = TokenRecords(corpus, "train"), TokenRecords(corpus, "held_out")
    last = last_readings(len(train), seed=1, batch_size=8, steps=3)
    read = np.bincount(train.domain_of[last >= 0])
    choice = choose_blocks(train, held_out, last, total=90, seed=0)
    counts = np.bincount(train.domain_of[choice.seen])
    assert (counts <= read).all() and counts.sum() < 24
    assert abs(counts[1] - 2 * counts[0]) <= 2


def test_no_common_domain_is_refused(corpus, tmp_path):
    train = TokenRecords(corpus, "train")
    with pytest.raises(UserError, match="no domain") as error:
        choose_blocks(train, TokenRecords(corpus, "held_out"), np.full(len(train), -1), total=10, seed=0)
    assert "\n" not in str(error.value)


def test_unigram_is_the_add_one_estimate_without_the_left_out_records(corpus):
    train = TokenRecords(corpus, "train")
    left_out = np.array([0, 5, 899])
    counts = {token: 1 for token in range(VOCAB)}
    for index in set(range(900)) - {0, 5, 899}:
        for token in train.tokens([index])[0].tolist():
            counts[token] += 1
    expected = np.log(np.array(list(counts.values())) / sum(counts.values()))
    np.testing.assert_allclose(unigram_log_probabilities(train, left_out), expected, rtol=1e-12)


def nats_of(params, records, indices):
    options = {"seq_len": SEQ_LEN, "batch_size": 16, "isolate": None, "loss_chunks": 1, "what": "test"}
    return record_nats(Forward("float32"), CONFIG, params, records.tokens, indices, **options)


def test_the_nats_of_a_record_are_the_sum_of_its_cross_entropies(corpus):
    train = TokenRecords(corpus, "train")
    params = init_params(CONFIG, seed=0)
    # Without a head every token is equally likely.
    params["head"]["kernel"] = jnp.zeros_like(params["head"]["kernel"])
    np.testing.assert_allclose(nats_of(params, train, np.arange(40)), SEQ_LEN * np.log(VOCAB), rtol=1e-6)


def stage(tmp_path, corpus, name: str, *, model_stage: str = "pretrain") -> dict:
    study = StudyConfig(model=CONFIG, train=TrainConfig(batch_size=16, seq_len=SEQ_LEN, steps=40), gap=GapConfig(tokens_per_side=120 * SEQ_LEN))
    directory = RunDirectory(tmp_path / name)
    with directory.work(Run("t", model_stage, "wd0", {}, member="wd0", seed=0), study):
        with Checkpoints(directory.path / "checkpoints", asynchronous=False) as checkpoints:
            checkpoints.save(0, init_params(CONFIG, seed=1))
        directory.finish({"diverged": None})
    parents = {"model": directory.path, "corpus": corpus.parent}
    return asdict(stage_gap.run(Context(study, Run("t", "gap", "wd0", {}), RunDirectory(tmp_path / "gap"), parents)))


def test_stage_finds_no_gap_where_there_is_none_and_the_planted_one_where_there_is(tmp_path, corpus, monkeypatch):
    results = stage(tmp_path, corpus, "model")
    assert results["control"]["passes"] and results["interval"][0] <= 0 <= results["interval"][1]
    assert results["tokens_per_side"] == 120 * SEQ_LEN and results["left_out_domains"] == []
    sides = results["blocks"]
    assert [b["domain"] for b in sides["seen"]] == [b["domain"] for b in sides["held_out"]]
    for side in ("seen", "held_out"):
        assert results[side] == pytest.approx(np.mean([b["loss"] for b in sides[side]]))
        assert results["control"][side] == pytest.approx(np.mean([b["unigram_loss"] for b in sides[side]]))
    assert results["gap"] == pytest.approx(results["held_out"] - results["seen"])
    json.dumps(results, allow_nan=False)

    def memorised(forward, config, params, read, indices, **options):
        nats = record_nats(forward, config, params, read, indices, **options)
        return nats - (0.25 * SEQ_LEN if read.__self__.split == "train" else 0.0)

    monkeypatch.setattr(gap, "record_nats", memorised)
    planted = stage(tmp_path, corpus, "memorised")
    assert planted["gap"] == pytest.approx(results["gap"] + 0.25)
    assert planted["interval"][0] > 0 and planted["adjusted"]["interval"][0] > 0
    assert planted["control"] == results["control"]
    assert sum(d["gap"] * d["blocks"] for d in planted["domains"].values()) / 120 == pytest.approx(planted["gap"])


def test_stage_refuses_a_fine_tuned_model(tmp_path, corpus):
    with pytest.raises(UserError, match="finetune"):
        stage(tmp_path, corpus, "tuned", model_stage="finetune")


def test_summary_of_an_exact_case():
    losses = {"seen": np.array([1.0, 2.0, 3.0, 4.0]), "held_out": np.array([2.0, 3.0, 5.0, 6.0])}
    control = {"seen": np.array([5.0, 5.0, 7.0, 7.0]), "held_out": np.array([5.5, 5.5, 7.5, 7.5])}
    keys = {side: (["a", "a", "b", "b"], [0, 1, 2, 3]) for side in losses}
    summary = summarise(losses, control, keys, np.array([0.1, 0.3, 0.2, 0.9]), seed=0)
    assert (summary["seen"], summary["held_out"], summary["gap"]) == (2.5, 4.0, 1.5)
    assert summary["domains"] == {
        "a": {"seen": 1.5, "held_out": 2.5, "gap": 1.0, "blocks": 2},
        "b": {"seen": 3.5, "held_out": 5.5, "gap": 2.0, "blocks": 2},
    }
    assert (summary["seen_early"], summary["seen_late"]) == (2.0, 4.0)
    assert summary["control"] == {"seen": 6.0, "held_out": 6.5, "gap": 0.5, "interval": [0.5, 0.5], "passes": False}
    assert summary["adjusted"]["gap"] == 1.0
    assert summarise(losses, control, keys, np.full(4, 0.5), seed=0)["seen_early"] is None


def test_a_control_off_zero_does_not_pass():
    losses = {side: np.zeros(4) for side in ("seen", "held_out")}
    keys = {side: (["a"] * 4, [0, 1, 2, 3]) for side in losses}
    control = {"seen": np.array([1.0, 1.1, 0.9, 1.0]), "held_out": np.array([2.0, 2.1, 1.9, 2.0])}
    assert summarise(losses, control, keys, np.zeros(4), seed=0)["control"]["passes"] is False
