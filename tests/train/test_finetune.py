"""Whole fine-tuning runs."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from test_pretrain import Killed, killed_after, state_of, untimed
from worlds import CONFIG, OF_PARAMS, World, change, write_copy_task

from plasticity_jax.config import MeshConfig, TaskConfig, load_config
from plasticity_jax.data.sft import SftRows, plan_packed, sft_batch
from plasticity_jax.data.tasks import Example, Rows, format_prompt, read_task, write_task
from plasticity_jax.errors import UserError
from plasticity_jax.model import init_params
from plasticity_jax.model.load import load_model
from plasticity_jax.parallel.mesh import make_mesh
from plasticity_jax.parallel.rules import param_paths
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.runs.run import Run
from plasticity_jax.stages import finetune as stage
from plasticity_jax.stages.stage import Context
from plasticity_jax.train import finetune
from plasticity_jax.train.optimizer import Schedule
from plasticity_jax.train.step import compile_train_step, hyper_parameters, initial_state, make_train_step, next_token_losses

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tuned(world: World):
    config = dataclasses.replace(change(CONFIG, "finetune", peak_lr=2e-2), tasks={"topic": TaskConfig(epochs=30)})
    return world.finetune("tuned", "base", config)


def test_it_learns_a_trivial_mapping(world: World, tuned):
    """Greedy answers of the tuned model are right, those of its base are not."""
    model = load_model(world.root / "tuned")
    assert tuned["diverged"] is None and tuned["train_loss"] < 0.05 and tuned["rows"] == 40 and tuned["cut_rows"] == 0
    for prompt, answer in (("r", "red"), ("the t", "tree")):
        for path, right in (("tuned", True), ("base", False)):
            tokens = model.tokenizer.encode(format_prompt(prompt))
            start = len(tokens)
            for _ in range(6):
                logits, _ = load_model(world.root / path)([tokens], capture=())
                tokens.append(int(np.argmax(logits[0, -1])))
            continuation = tokens[start:]
            if model.tokenizer.eos_id in continuation:
                continuation = continuation[: continuation.index(model.tokenizer.eos_id)]
            assert (model.tokenizer.decode(continuation) == answer) is right


def test_held_out_loss_rises_after_fine_tuning(world: World, tuned):
    """Of the base model the same number as at the end of pretraining; of the tuned one what NumPy makes of its logits on the same blocks."""
    from plasticity_jax.data.loader import TokenRecords
    from plasticity_jax.stages import forgetting

    of = {}
    for name in ("base", "tuned"):
        parents = {"model": world.root / name, "corpus": world.corpus}
        of[name] = world.stage(forgetting.run, Run("tiny", "forgetting", name, {}), world.root / f"forgetting-{name}", CONFIG, parents)["held_out"]
    assert of["base"]["loss"] == pytest.approx(world.results["base"]["held_out"]["loss"], rel=1e-6)
    split, model, tokens = TokenRecords(world.corpus / "tokens", "held_out"), load_model(world.root / "tuned"), CONFIG.train.held_out_tokens
    for d, name in enumerate(split.domains):
        blocks = split.tokens(np.flatnonzero(split.domain_of == d)[: tokens // CONFIG.train.seq_len])
        logits = np.asarray(model(blocks[:, :-1], capture=())[0], np.float64)
        nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, blocks[:, 1:, None], -1)[..., 0]
        assert of["tuned"]["domains"][name]["loss"] == pytest.approx(nats.mean(), rel=1e-5)
    assert of["tuned"]["loss"] > of["base"]["loss"] + 0.1  # thirty epochs of two answers


def test_numbers_of_a_run(world: World, tuned):
    base, model = load_model(world.root / "base"), load_model(world.root / "tuned")
    flat = [np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(m.params)]) for m in (base, model)]
    assert tuned["relative_update"] == pytest.approx(np.linalg.norm(flat[1] - flat[0]) / np.linalg.norm(flat[0]), rel=1e-6)
    rows = read_task(world.task).train
    assert tuned["tokens"] == 30 * sum(len(model.tokenizer.encode(row.response)) + 1 for row in rows)
    assert [row["step"] for row in untimed(world.root / "tuned")][-1] == tuned["steps"]
    assert (world.root / "tuned" / "tokenizer.json").read_bytes() == (world.corpus / "tokenizer.json").read_bytes()


def test_several_bases_as_one_program_agree_with_one_by_one(world: World):
    """To rounding, also with other rates."""
    fast = change(CONFIG, "finetune", peak_lr=2e-2, warmup_fraction=0.4, weight_decay=0.1)
    members = {"base": CONFIG, "free": fast}
    alone = {name: world.finetune(f"alone-{name}", name, config) for name, config in members.items()}
    contexts = [
        Context(
            config,
            Run("tiny", "finetune", f"jointly-{name}", {}, task="topic", seed=0),
            RunDirectory(world.root / f"jointly-{name}"),
            {"base": world.root / name, "task": world.task},
        )
        for name, config in members.items()
    ]
    before = compile_train_step.cache_info().misses
    for name, found in zip(members, world.in_work(contexts, stage.run_batch), strict=True):
        expected = alone[name]
        for key in found.keys() - {"seconds"}:
            assert found[key] == (pytest.approx(expected[key], rel=1e-4) if isinstance(expected[key], float) else expected[key]), key
        one, other = (load_model(world.root / f"{how}-{name}").params for how in ("alone", "jointly"))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            assert np.linalg.norm(np.subtract(a, b)) <= OF_PARAMS * np.linalg.norm(a)
    assert compile_train_step.cache_info().misses == before + 1
    assert np.abs(np.asarray(one["head"]["kernel"]) - np.asarray(load_model(world.root / "alone-base").params["head"]["kernel"])).max() > 1e-3


def test_parts_that_do_not_divide_the_batch_give_the_same_models(world: World):
    """Pretraining in 3 parts of 4 rows and fine-tuning in 3 parts of 8: the tensors, the loss and the targets of unsplit batches, to rounding."""
    split = change(change(CONFIG, "train", grad_accum_steps=3), "finetune", grad_accum_steps=3)
    found = {"split": world.pretrain({"split": 0.1}, split)[0], "base": world.results["base"]}
    found |= {name: world.finetune(name, "base", config) for name, config in (("tuned-whole", CONFIG), ("tuned-split", split))}
    for whole, other in (("base", "split"), ("tuned-whole", "tuned-split")):
        assert found[other]["tokens"] == found[whole]["tokens"] and found[other]["steps"] == found[whole]["steps"]
        assert found[other]["train_loss"] == pytest.approx(found[whole]["train_loss"], rel=1e-4)
        pairs = zip(*(jax.tree.leaves(load_model(world.root / name).params) for name in (whole, other)), strict=True)
        assert all(np.linalg.norm(np.subtract(a, b)) <= OF_PARAMS * np.linalg.norm(a) for a, b in pairs)


def test_resume_is_bitwise(world: World, monkeypatch):
    whole = world.finetune("whole", "base", CONFIG)
    real = finetune._batches
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "_batches", lambda *args: killed_after(real(*args), 9))
        with pytest.raises(Killed):
            world.finetune("killed-tune", "base", CONFIG)
    seen = []
    monkeypatch.setattr(finetune, "_batches", lambda rows, schedule, *args: seen.append(len(schedule)) or real(rows, schedule, *args))
    again = world.finetune("killed-tune", "base", CONFIG)
    assert seen == [whole["steps"] - 8]
    for a, b in zip(state_of(world.root / "whole", whole["steps"]), state_of(world.root / "killed-tune", whole["steps"]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert untimed(world.root / "whole") == untimed(world.root / "killed-tune")
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in whole.items() if k != "seconds"}


def finetune_on(world: World, name: str, base: str, config, *, task: str, rows: list[Example] | None = None, seed: int = 0) -> dict:
    """A run on a task of its own."""
    folder = world.root / f"task-{name}"
    write_copy_task(folder, config, 56)
    if rows is not None:
        write_task(folder, Rows(rows, rows[:1]))
    run = Run("tiny", "finetune", name, {}, task=task, seed=seed)
    return world.stage(stage.run, run, world.root / name, config, {"base": world.root / base, "task": folder})


def test_runs_share_their_compiled_steps(world: World, tuned):
    """Another base, task, seed, number of steps, learning rate and weight decay compile nothing new."""
    mesh = make_mesh(CONFIG.mesh)
    step = compile_train_step(finetune.step_settings(CONFIG, CONFIG.model, mesh), mesh, members=False)
    before = step._cache_size()
    config = dataclasses.replace(
        change(CONFIG, "finetune", peak_lr=3e-3, weight_decay=0.1, warmup_fraction=0.3), tasks={"addition2": TaskConfig(epochs=1)}
    )
    assert finetune_on(world, "other", "free", config, task="addition2", seed=5)["steps"] != tuned["steps"]
    assert step._cache_size() == before > 0


def test_weight_decay_of_the_recipe_reaches_all_but_norms(world: World):
    """With λ = 1/lr every decayed parameter forgets its value at the peak of the learning rate; norms stay where they were."""
    results = {}
    for decay in (0.0, 100.0):
        config = change(CONFIG, "finetune", weight_decay=decay)
        world.finetune(f"decay{decay:g}", "base", config)
        params = load_model(world.root / f"decay{decay:g}").params
        results[decay] = {path: np.linalg.norm(leaf) for path, leaf in zip(param_paths(params), jax.tree.leaves(params), strict=True)}
    for path, norm in results[0.0].items():
        ratio = results[100.0][path] / norm
        assert (ratio > 0.7) if "norm" in path else (ratio < 0.5), (path, ratio)


def packed_and_single() -> tuple[SftRows, list, list]:
    """Rows of random tokens, the batches that pack them, and those that hold one row each."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 25, 30)
    rows = SftRows([rng.integers(2, CONFIG.model.vocab_size, n).astype(np.int32) for n in lengths], [int(rng.integers(1, n)) for n in lengths])
    packed = plan_packed(rows.lengths, sequence_length=48, batch_size=30, epochs=1, seed=0)
    assert len(packed) == 1 and max(len(sequence) for sequence in packed[0][1]) >= 3
    return rows, packed[0][1], list(range(30))


def step_of(packing: bool):
    mesh = make_mesh(CONFIG.mesh)
    config = change(CONFIG, "finetune", packing=packing, length_buckets=(48,), batch_size=30)
    return finetune.step_settings(config, config.model, mesh), mesh


def test_packing_leaves_the_loss_of_every_row_unchanged():
    rows, packed, single = packed_and_single()
    params = init_params(CONFIG.model, 0)
    losses = {}
    for packing, sequences in ((True, packed), (False, single)):
        batch = sft_batch(rows, sequences, bucket_length=48, batch_size=30, pad_id=1)
        nats = np.asarray(jax.jit(functools.partial(next_token_losses, *step_of(packing)))(params, batch)[0]) * batch["loss_mask"]
        for place, indices in enumerate(sequences):
            for segment, index in enumerate(np.atleast_1d(indices), 1):
                inside = batch["segment_ids"][place] == segment
                losses[packing, int(index)] = (float(nats[place][inside].sum()), int(batch["loss_mask"][place][inside].sum()))
    for index in range(30):
        (ours, n_targets), (alone, n_alone) = losses[True, index], losses[False, index]
        assert n_targets == n_alone == rows.lengths[index] - rows.response_starts[index]
        assert abs(ours - alone) <= 1e-6 * alone


def test_packing_leaves_the_update_unchanged():
    rows, packed, single = packed_and_single()
    norms, gradients = [], []
    for packing, sequences in ((True, packed), (False, single)):
        settings, mesh = step_of(packing)
        batch = sft_batch(rows, sequences, bucket_length=48, batch_size=30, pad_id=1)
        state, metrics = jax.jit(make_train_step(settings))(
            initial_state(settings, init_params(CONFIG.model, 0)), batch, hyper_parameters(weight_decay=0.0, peak_lr=1.0, warmup=1, total=2)
        )
        norms.append([float(metrics["loss"]), float(metrics["tokens"]), float(metrics["grad_norm"])])
        gradients.append(jax.tree.leaves(next(part for part in state["optimizer"] if hasattr(part, "mu")).mu))  # (1 - b1) times the clipped gradient
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-5)
    for a, b in zip(*gradients, strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b) > 0


@pytest.mark.parametrize("options", [{"packing": True}, {"group_by_length": False}])
def test_other_orders_of_rows_train_and_see_every_target(world: World, options):
    """Both learn the mapping, and train on all targets of every epoch."""
    config = dataclasses.replace(change(CONFIG, "finetune", peak_lr=2e-2, **options), tasks={"topic": TaskConfig(epochs=40)})
    name = next(iter(options))
    result = world.finetune(name, "base", config)
    rows = read_task(world.task).train
    tokenizer = load_model(world.root / name).tokenizer
    assert result["diverged"] is None and result["train_loss"] < 0.3
    assert result["tokens"] == 40 * sum(len(tokenizer.encode(row.response)) + 1 for row in rows)


def test_a_packed_run_resumes_bitwise(world: World, monkeypatch):
    config = dataclasses.replace(change(CONFIG, "finetune", packing=True, checkpoint_every=3), tasks={"topic": TaskConfig(epochs=4)})
    whole = world.finetune("packed-whole", "base", config)
    real = finetune._batches
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "_batches", lambda *args: killed_after(real(*args), 5))
        with pytest.raises(Killed):
            world.finetune("packed-killed", "base", config)
    world.finetune("packed-killed", "base", config)
    for a, b in zip(state_of(world.root / "packed-whole", whole["steps"]), state_of(world.root / "packed-killed", whole["steps"]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_rows_that_are_cut_dropped_or_empty_are_counted(world: World):
    rows = [
        Example(str(i), prompt, response, "x", "generated", "generated")
        for i, (prompt, response) in enumerate([("r", "red"), ("the t", "tree"), ("r", ""), ("a " * 30, "red")])
    ]
    for too_long, counts in (("cut", (3, 1, 0, 1)), ("cut-both", (3, 1, 0, 1)), ("drop", (2, 0, 1, 1))):
        config = change(CONFIG, "finetune", too_long=too_long)
        result = finetune_on(world, f"rows-{too_long}", "base", config, task="topic", rows=rows)
        assert tuple(result[name] for name in ("rows", "cut_rows", "dropped_rows", "empty_rows")) == counts


def test_a_task_without_usable_rows_is_refused(world: World):
    rows = [Example("0", "r", " ", "x", "generated", "generated"), Example("1", "a " * 30, "red", "x", "generated", "generated")]
    with pytest.raises(UserError, match=r"no training row is left, 1 are longer than 24 tokens and 1 have no response"):
        finetune_on(world, "rows-none", "base", change(CONFIG, "finetune", too_long="drop"), task="topic", rows=rows)


@pytest.mark.parametrize("faithful", [False, True])
def test_the_recipe_of_the_paper(faithful):
    """Section 4.1 of the specification, number by number."""
    config = load_config(Path(__file__).parents[2] / "configs" / "llama_1b_20tpp.py", [("faithful", "True")] if faithful else [])
    recipe = config.finetune
    assert (recipe.batch_size, recipe.peak_lr, recipe.warmup_fraction, recipe.weight_decay) == (64, 1e-5, 0.1, 0.0)
    assert (recipe.b1, recipe.b2, recipe.eps, recipe.clip_norm) == (0.9, 0.999, 1e-8, 1.0)
    assert recipe.length_buckets[-1] == 2048 and not recipe.packing and not recipe.group_by_length and recipe.seeds == (42,)
    assert recipe.too_long == ("cut-both" if faithful else "cut") and config.train.compute_dtype == "bfloat16"
    assert recipe.loss_parts == (4 if faithful else 1)
    assert {task.epochs for task in config.tasks.values()} == {3}
    optimizer = finetune.step_settings(config, config.model, make_mesh(MeshConfig())).optimizer
    assert (optimizer.schedule, optimizer.decay_kind, optimizer.decay_mask) == (Schedule("cosine", 0.0, 1.0), "coupled", "no-norms")


def test_another_architecture_is_refused(world: World):
    with pytest.raises(UserError, match=r"model\.d_ff=64 is 32 in .*base"):
        world.finetune("misfit", "base", change(CONFIG, "model", d_ff=64))


@pytest.mark.parametrize("n_rows", [28, 18], ids=["four devices", "the last batch leaves one without rows"])
def test_the_loss_of_parts_is_the_mean_of_their_means(n_rows):
    """What the Hugging Face Trainer logged with a part per device; the mean over all targets is another number."""
    rows, _, _ = packed_and_single()
    settings, mesh = step_of(packing=False)
    params = init_params(CONFIG.model, 0)
    how = dict(bucket_length=48, batch_size=28, pad_id=1)
    losses = {}
    for parts in (1, 4):
        batch = sft_batch(rows, list(range(n_rows)), **how, loss_parts=parts)
        step = jax.jit(make_train_step(settings))
        _, metrics = step(initial_state(settings, params), batch, hyper_parameters(weight_decay=0.0, peak_lr=1.0, warmup=1, total=2))
        losses[parts] = float(metrics["loss"])
        n_targets = sum(rows.lengths[i] - rows.response_starts[i] for i in range(n_rows))
        assert round(float(metrics["tokens"])) == n_targets
    plain = sft_batch(rows, list(range(n_rows)), **how)
    nats = np.asarray(jax.jit(functools.partial(next_token_losses, settings, mesh))(params, plain)[0], np.float64)
    inside = plain["loss_mask"] == 1
    means = [nats[start : start + 7][inside[start : start + 7]].mean() for start in range(0, n_rows, 7)]
    assert losses[4] == pytest.approx(np.mean(means), rel=1e-5)
    assert losses[1] == pytest.approx(nats[inside].mean(), rel=1e-5)
    assert abs(losses[4] - losses[1]) > 1e-4


def test_parts_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(UserError, match="finetune.loss_parts=3 does not divide finetune.batch_size=64; set it to a divisor, such as 1"):
        load_config("configs/tiny.py", [("finetune.batch_size", "64"), ("finetune.loss_parts", "3")])
