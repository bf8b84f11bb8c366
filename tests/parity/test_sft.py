"""Fine-tuning against transformers: the loss of every row with -100 on its prompt, which parameters decay, and the learning rate."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from plasticity_jax.config import FinetuneConfig, MeshConfig, ModelConfig, StudyConfig, TrainConfig
from plasticity_jax.data.sft import SftRows, plan_packed, sft_batch
from plasticity_jax.model import load_model
from plasticity_jax.model.hf_config import describe
from plasticity_jax.model.hf_names import family_of, parts
from plasticity_jax.parallel.mesh import make_mesh
from plasticity_jax.train.finetune import step_settings
from plasticity_jax.train.optimizer import decay_table, schedule_shape
from plasticity_jax.train.step import initial_state, make_train_step, next_token_losses
from plasticity_jax.train.tuning import tuning_numbers

pytestmark = pytest.mark.parity

SMALL = dict(vocab_size=330, d_model=48, n_layers=2, n_heads=6, n_kv_heads=2, d_ff=80)
CASES = {
    "llama": ModelConfig(**SMALL),
    "olmo2": ModelConfig(**SMALL | {"n_kv_heads": 6}, norm_position="post", qk_norm=True, norm_eps=1e-6, init="truncated"),
}
LENGTH, BATCH = 64, 16


@pytest.fixture(params=CASES)
def pair(request, tmp_path):
    """A model of transformers with random weights, and the same one read by us."""
    config = CASES[request.param]
    settings = describe(
        config, family_of(config), "float32", {"max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    )
    (tmp_path / "config.json").write_text(json.dumps(settings))
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(1 + 0.3 * torch.randn(parameter.shape) if parameter.ndim == 1 else 4 * parameter)
    (tmp_path / "config.json").unlink()
    model.save_pretrained(tmp_path)
    return model, load_model(tmp_path)


@pytest.fixture
def rows() -> SftRows:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, LENGTH // 2, BATCH)
    return SftRows([rng.integers(2, SMALL["vocab_size"], n).astype(np.int32) for n in lengths], [int(rng.integers(1, n)) for n in lengths])


def settings_of(config: ModelConfig, packing: bool):
    study = StudyConfig(
        model=config,
        train=TrainConfig(compute_dtype="float32"),
        finetune=FinetuneConfig(batch_size=BATCH, length_buckets=(LENGTH,), packing=packing),
    )
    mesh = make_mesh(MeshConfig())
    return step_settings(study, config, mesh), mesh


def batches_of(rows: SftRows) -> dict[bool, tuple[list, dict]]:
    packed = plan_packed(rows.lengths, sequence_length=LENGTH, batch_size=BATCH, epochs=1, seed=0)[0][1]
    assert max(map(len, packed)) > 1
    return {
        packing: (sequences, sft_batch(rows, sequences, bucket_length=LENGTH, batch_size=BATCH, pad_id=1))
        for packing, sequences in ((True, packed), (False, list(range(BATCH))))
    }


def test_the_loss_of_every_row_is_that_of_transformers_with_its_prompt_left_out(pair, rows):
    model, ours = pair
    expected = []
    for row, start in zip(rows.tokens, rows.response_starts, strict=True):
        labels = torch.tensor(row[None].astype(np.int64))
        labels[:, :start] = -100
        with torch.no_grad():
            expected.append(model(torch.tensor(row[None].astype(np.int64)), labels=labels).loss.item())
    for packing, (sequences, batch) in batches_of(rows).items():
        nats = (
            np.asarray(jax.jit(functools.partial(next_token_losses, *settings_of(ours.config, packing)))(ours.params, batch)[0]) * batch["loss_mask"]
        )
        for place, indices in enumerate(sequences):
            for segment, index in enumerate(np.atleast_1d(indices), 1):
                inside = batch["segment_ids"][place] == segment
                found = nats[place][inside].sum() / batch["loss_mask"][place][inside].sum()
                assert abs(found - expected[index]) <= 1e-5 * expected[index], (packing, index)


def test_the_loss_of_a_padded_batch_and_its_gradient_are_those_of_transformers(pair, rows):
    """The Trainer's own batch: rows padded on the right, hidden from attention and from the loss."""
    model, ours = pair
    tokens, labels = (torch.full((BATCH, max(rows.lengths)), fill, dtype=torch.int64) for fill in (1, -100))
    mask = torch.zeros_like(tokens)
    for place, (row, start) in enumerate(zip(rows.tokens, rows.response_starts, strict=True)):
        tokens[place, : len(row)], labels[place, start : len(row)] = torch.tensor(row), torch.tensor(row[start:])
        mask[place, : len(row)] = 1
    loss = model(tokens, attention_mask=mask, labels=labels).loss
    loss.backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()]).item()
    for packing, (_, batch) in batches_of(rows).items():
        settings, _ = settings_of(ours.config, packing)
        params = jax.tree.map(jnp.asarray, ours.params)
        _, metrics = jax.jit(make_train_step(settings))(initial_state(settings, params), batch, tuning_numbers(FinetuneConfig(), steps=10))
        assert abs(float(metrics["loss"]) - loss.item()) <= 1e-5 * loss.item(), packing
        assert abs(float(metrics["grad_norm"]) - norm) <= 1e-4 * norm, packing
        assert int(metrics["tokens"]) == int((labels != -100).sum())


def test_the_decayed_parameters_are_those_of_the_trainer(pair):
    model, ours = pair
    decayed = set(transformers.Trainer.get_decay_parameter_names(None, model))
    table = decay_table(ours.params, settings_of(ours.config, False)[0].optimizer.decay_mask)
    names = parts(ours.config, family_of(ours.config))
    assert {part.name for part in names} == {name for name, _ in model.named_parameters()}
    assert {part.name for part in names if table[part.path]} == decayed
    assert 0 < len(decayed) < len(names)


@pytest.mark.parametrize("steps", [9, 30, 282, 2561])
def test_the_learning_rate_is_that_of_the_trainer(steps, tmp_path):
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), warmup_steps=0.1, use_cpu=True)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-5)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, arguments.get_warmup_steps(steps), steps)
    expected = []
    for _ in range(steps):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    numbers = tuning_numbers(FinetuneConfig(peak_lr=1e-5, warmup_fraction=0.1), steps=steps)
    schedule = settings_of(CASES["llama"], False)[0].optimizer.schedule
    ours = numbers["peak_lr"] * schedule_shape(jnp.arange(steps), warmup=numbers["warmup_steps"], total=numbers["total_steps"], schedule=schedule)
    np.testing.assert_allclose(np.asarray(ours), expected, atol=1e-5 * 1e-6)
