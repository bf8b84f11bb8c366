"""Whole pretraining runs: resume, vmapped members, divergence, what is recorded."""

import gzip
import json
import math
import uuid

import jax
import numpy as np
import pytest
from worlds import CONFIG, OF_LOSSES, OF_PARAMS, TRAIN, World, change

from plasticity_jax.model.checkpoint import Checkpoints
from plasticity_jax.model.load import load_model
from plasticity_jax.runs.directory import DONE, RunDirectory
from plasticity_jax.runs.jsonfiles import read_json, read_jsonl, to_json
from plasticity_jax.runs.storage import location, upload
from plasticity_jax.train import loop

pytestmark = pytest.mark.slow


def untimed(path):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_jsonl(path / "metrics.jsonl")]


def state_of(path, step):
    """Every array of a checkpoint, read without our own trees."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(path / "checkpoints", item_names=("params", "optimizer")) as manager:
        tree = manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(), optimizer=ocp.args.StandardRestore()))
    return jax.tree.leaves({"params": tree["params"], "optimizer": tree["optimizer"]})


class Killed(BaseException):
    pass


def killed_after(batches, n):
    for i, batch in enumerate(batches):
        if i == n:
            raise Killed
        yield batch


def test_what_is_recorded(world: World):
    result, path = world.results["base"], world.root / "base"
    rows = read_jsonl(path / "metrics.jsonl")
    assert result["steps"] == TRAIN.steps and result["tokens"] == TRAIN.steps * TRAIN.batch_size * TRAIN.seq_len
    assert result["diverged"] is None and result["compute_dtype"] == "float32"
    assert result["timescale_steps"] == pytest.approx(1 / (1e-2 * 0.1)) and result["timescale_share"] == pytest.approx(50)
    assert world.results["free"]["timescale_steps"] is None
    assert result["train_loss"] == pytest.approx(np.mean([row["loss"] for row in rows[-loop.TAIL_STEPS :]]))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    assert [row["step"] for row in rows if "held_out" in row] == [10, 20]
    assert set(result["norms"]) == set(result["decay_table"]) and all(result["decay_table"].values())
    provenance = read_json(path / "provenance.json")
    assert provenance["data_fingerprint"] == "f00d" and provenance["mesh"]["data"] == len(jax.devices())


def test_held_out_loss_against_numpy(world: World):
    model = load_model(world.root / "base")
    records = world.root / "corpus" / "tokens"
    held_out = world.results["base"]["held_out"]
    assert set(held_out["domains"]) == {"north", "south"}
    from plasticity_jax.data.loader import TokenRecords

    split = TokenRecords(records, "held_out")
    nats = n_bytes = count = 0
    for d, name in enumerate(split.domains):
        blocks = split.tokens(np.flatnonzero(split.domain_of == d)[: TRAIN.held_out_tokens // TRAIN.seq_len])
        logits = np.asarray(model(blocks[:, :-1], capture=())[0], np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        of_domain = -np.take_along_axis(log_probs, blocks[:, 1:, None], -1)
        assert held_out["domains"][name]["loss"] == pytest.approx(of_domain.mean(), rel=1e-5)
        text = "".join(model.tokenizer.decode(block[1:]) for block in blocks if not (block == 0).any())
        assert text
        nats, count = nats + of_domain.sum(), count + of_domain.size
        n_bytes += sum(model.tokenizer.token_bytes[token] for block in blocks for token in block[1:])
        assert held_out["domains"][name]["tokens"] == of_domain.size
    assert held_out["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert held_out["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_members_start_from_the_same_parameters(world: World):
    hashes = {read_json(world.root / name / "provenance.json")["step_0_sha256"] for name in ("base", "free")}
    assert hashes == {read_json(world.init / "results.json")["params_sha256"]}
    first = [untimed(world.root / name)[0] for name in ("base", "free")]
    assert first[0] == first[1]  # same parameters, same batch: the same first step


@pytest.mark.parametrize("n_steps", [3, 13, 17])
def test_resume_is_bitwise(world: World, monkeypatch, n_steps):
    """Killed before the first checkpoint, between two, and after two, and started again: the same files as without the kill."""
    from plasticity_jax.train import pretrain

    name, real = f"killed{n_steps}", pretrain.batches
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "batches", lambda *args, **kwargs: killed_after(real(*args, **kwargs), n_steps))
        with pytest.raises(Killed):
            world.pretrain({name: 0.1}, CONFIG)
    assert not (world.root / name / "DONE").exists()
    result = world.pretrain({name: 0.1}, CONFIG)[0]
    for a, b in zip(state_of(world.root / name, 20), state_of(world.root / "base", 20), strict=True):
        np.testing.assert_array_equal(a, b)
    assert untimed(world.root / name) == untimed(world.root / "base")
    timed = ("seconds", "tokens_per_second", "mfu")
    assert {k: v for k, v in result.items() if k not in timed} == {k: v for k, v in world.results["base"].items() if k not in timed}


def test_a_corpus_on_a_store_gives_the_same_run(world: World, monkeypatch):
    store = location(f"memory://{uuid.uuid4().hex}/corpus")
    upload(world.corpus, store)
    monkeypatch.setattr(world, "corpus", store)
    world.pretrain({"stored": 0.1}, CONFIG)
    assert untimed(world.root / "stored") == untimed(world.root / "base")
    for a, b in zip(state_of(world.root / "stored", 20), state_of(world.root / "base", 20), strict=True):
        np.testing.assert_array_equal(a, b)


def test_chosen_steps_are_kept_and_change_no_result(world: World, monkeypatch):
    """Also where the run was killed in between and resumed at one of them."""
    from plasticity_jax.train import pretrain

    real, config = pretrain.batches, change(CONFIG, "train", keep_steps=(3, 11))
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "batches", lambda *args, **kwargs: killed_after(real(*args, **kwargs), 13))
        with pytest.raises(Killed):
            world.pretrain({"kept": 0.1}, config)
    result = world.pretrain({"kept": 0.1}, config)[0]
    assert sorted(int(path.name) for path in (world.root / "kept" / "checkpoints").iterdir()) == [3, 11, 20]
    for a, b in zip(state_of(world.root / "kept", 20), state_of(world.root / "base", 20), strict=True):
        np.testing.assert_array_equal(a, b)
    timed = ("seconds", "tokens_per_second", "mfu")
    assert {k: v for k, v in result.items() if k not in timed} == {k: v for k, v in world.results["base"].items() if k not in timed}


def test_model_flops_utilization_where_the_peak_is_known(world: World, monkeypatch):
    from plasticity_jax.model.flops import flops_per_token
    from plasticity_jax.parallel import hardware

    assert world.results["base"]["mfu"] is None and not any("mfu" in row for row in read_jsonl(world.root / "base" / "metrics.jsonl"))
    known = hardware.Hardware("slow", "cpu", 1e9, 1e9, hardware.GIB, 0, 1)
    monkeypatch.setattr(hardware, "of_kind", lambda kind: known)
    found = world.pretrain({"timed": 0.1, "timed too": 0.2}, CONFIG)
    for name, result in zip(("timed", "timed too"), found, strict=True):
        last = read_jsonl(world.root / name / "metrics.jsonl")[-1]
        expected = last["tokens"] * flops_per_token(CONFIG.model, CONFIG.train.seq_len) / last["seconds"] / 1e9
        assert result["mfu"] == last["mfu"] == pytest.approx(expected)
    # Both shared the time of one program, whose throughput counts.
    assert found[0]["mfu"] == pytest.approx(found[1]["mfu"])


def test_recorded_steps_change_no_result_and_hold_the_steps(world: World):
    [plain] = world.pretrain({"plain": 0.1}, CONFIG)
    [recorded] = world.pretrain({"recorded": 0.1}, change(CONFIG, "train", profile_steps=(5, 6)))
    assert recorded["held_out"] == plain["held_out"] and recorded["train_loss"] == plain["train_loss"]
    folder = world.root / "recorded" / "profile"
    [trace] = folder.glob("plugins/profile/*/*.trace.json.gz")  # where TensorBoard's plugin looks
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert [event["args"]["step_num"] for event in events if event.get("name") == "train"] == ["5", "6"]
    assert [path.stat().st_size > 0 for path in folder.glob("plugins/profile/*/*.xplane.pb")] == [True]
    memory = gzip.decompress((folder / "memory.prof").read_bytes())  # a profile of pprof, whose table of strings names what it counts
    assert all(name in memory for name in (b"allocations", b"count", b"space", b"bytes")) and not (world.root / "plain" / "profile").exists()


def test_a_batch_that_parts_do_not_divide_is_filled_with_rows_that_do_not_count(world: World):
    """Four rows in three parts are six rows, two of them empty."""
    [result] = world.pretrain({"filled": 0.1}, change(CONFIG, "train", grad_accum_steps=3))
    assert result["tokens"] == world.results["base"]["tokens"]
    assert result["held_out"]["loss"] == pytest.approx(world.results["base"]["held_out"]["loss"], rel=OF_LOSSES)
    for a, b in zip(state_of(world.root / "filled", 20), state_of(world.root / "base", 20), strict=True):
        assert np.linalg.norm(a - b) <= OF_PARAMS * np.linalg.norm(b)


def test_resume_really_resumes(world: World, monkeypatch):
    from plasticity_jax.train import pretrain

    starts, real = [], pretrain.batches
    monkeypatch.setattr(pretrain, "batches", lambda *args, **kw: starts.append(kw["start_step"]) or killed_after(real(*args, **kw), 13))
    with pytest.raises(Killed):
        world.pretrain({"twice": 0.1}, CONFIG)
    world.pretrain({"twice": 0.1}, CONFIG)
    assert starts == [0, 8]


def relative(a, b):
    return max(np.linalg.norm(x - y) / np.linalg.norm(x) for x, y in zip(map(np.asarray, jax.tree.leaves(a)), map(np.asarray, jax.tree.leaves(b))))


def test_vmapped_members_agree_with_one_by_one(world: World, monkeypatch):
    """To rounding, per tensor and loss after 20 steps, and also when the program was killed while only one member had saved its last step."""
    from plasticity_jax.train import pretrain

    real_save, saves = Checkpoints.save, []

    def save_or_die(self, step, params, optimizer=None):
        saves.append(step)
        if len(saves) == 4:
            raise Killed
        real_save(self, step, params, optimizer)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_or_die)
        with pytest.raises(Killed):
            world.pretrain({"together-base": 0.1, "together-free": 0.0}, CONFIG)
    assert saves == [8, 8, 16, 16]
    starts, real = [], pretrain.batches
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "batches", lambda *args, **kw: starts.append(kw["start_step"]) or real(*args, **kw))
        results = world.pretrain({"together-base": 0.1, "together-free": 0.0}, CONFIG)
    assert starts == [8]
    for name, result in zip(("base", "free"), results):
        alone, together = load_model(world.root / name), load_model(world.root / f"together-{name}")
        assert relative(alone.params, together.params) <= OF_PARAMS
        assert result["held_out"]["loss"] == pytest.approx(world.results[name]["held_out"]["loss"], rel=OF_LOSSES)
        for a, b in zip(untimed(world.root / name), untimed(world.root / f"together-{name}"), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=OF_LOSSES) and a["step"] == b["step"] and a["tokens"] == b["tokens"]


def test_vmapped_members_may_differ_in_rate_and_warm_up(world: World):
    """λ × peak learning rate × warm-up as one program, each against its own run."""
    grid = {f"grid{i}": (0.1 * (i % 2), change(CONFIG, "train", peak_lr=1e-2 * (1 + i // 2), warmup_fraction=0.1 + 0.2 * (i == 3))) for i in range(4)}
    alone = {name: world.pretrain({f"{name}-alone": decay}, config)[0] for name, (decay, config) in grid.items()}
    together = dict(zip(grid, world.pretrain_grid(grid)))
    assert len({result["held_out"]["loss"] for result in alone.values()}) == 4, "the four members differ"
    for name, (decay, config) in grid.items():
        assert relative(load_model(world.root / f"{name}-alone").params, load_model(world.root / name).params) <= OF_PARAMS
        assert together[name]["held_out"]["loss"] == pytest.approx(alone[name]["held_out"]["loss"], rel=OF_LOSSES)
        assert together[name]["peak_lr"] == config.train.peak_lr and together[name]["lr_times_decay"] == config.train.peak_lr * decay
        for a, b in zip(untimed(world.root / f"{name}-alone"), untimed(world.root / name), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=OF_LOSSES) and a.get("lr") == b.get("lr")


@pytest.mark.parametrize(("peak_lr", "max_loss", "reason"), [(1e1, 6.5, "above the limit 6.5"), (1e38, 1e30, "nan"), (1e-2, 1e30, "held-out")])
def test_a_diverged_run_is_a_result(world: World, monkeypatch, peak_lr, max_loss, reason):
    config, name = change(CONFIG, "train", peak_lr=peak_lr, max_loss=max_loss), f"wild{peak_lr:g}"
    if reason == "held-out":  # an update that breaks the parameters after the last training loss
        from plasticity_jax.train import pretrain

        real = pretrain.train
        monkeypatch.setattr(pretrain, "train", lambda *args, **kw: jax.tree.map(lambda x: x * np.nan, real(*args, **kw)))
    result = world.pretrain({name: 0.0}, config)[0]
    assert reason in result["diverged"] and "step" in result["diverged"] and result["held_out"] is None and result["norms"] == {}
    assert result["steps"] < TRAIN.steps or reason == "held-out"
    assert RunDirectory(world.root / name).state() == ("diverged", result["diverged"])
    monkeypatch.undo()
    # Started again before it was marked as done, it does not train a second time.
    (world.root / name / DONE).unlink()
    again = world.pretrain({name: 0.0}, config)[0]
    assert to_json(again) == to_json(result)


def test_a_diverged_member_does_not_touch_the_others(world: World):
    """In one program, one member with an absurd decay fails while the other goes on as if alone."""
    wild, calm = world.pretrain({"mixed-wild": 1e6, "mixed-base": 0.1}, CONFIG)
    assert wild["diverged"] and wild["steps"] < TRAIN.steps
    assert calm["diverged"] is None and calm["steps"] == TRAIN.steps
    assert relative(load_model(world.root / "base").params, load_model(world.root / "mixed-base").params) <= OF_PARAMS


def test_an_interrupt_leaves_a_whole_checkpoint(world: World, monkeypatch):
    from plasticity_jax.train import pretrain

    def interrupted(batches):
        for i, batch in enumerate(batches):
            if i == 9:
                raise KeyboardInterrupt
            yield batch

    real = pretrain.batches
    monkeypatch.setattr(pretrain, "batches", lambda *args, **kw: interrupted(real(*args, **kw)))
    with pytest.raises(KeyboardInterrupt):
        world.pretrain({"stopped": 0.1}, CONFIG)
    with Checkpoints(world.root / "stopped" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.latest() == 8
    assert len(state_of(world.root / "stopped", 8)) == len(state_of(world.root / "base", 20))
