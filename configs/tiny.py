"""The whole graph in under two minutes on 2 CPU cores: for tests and for trying out a change. Its numbers mean nothing.

Command:   plasticity study --config configs/tiny.py --workdir work
"""

from plasticity_jax.config import base_config, task


def get_config():
    config = base_config()
    config.name = "tiny"
    config.data.sources = ("wikipedia", "bbc")
    config.data.max_documents = 400
    config.model.vocab_size = 512
    config.model.d_model = 32
    config.model.n_layers = 2
    config.model.d_ff = 64
    config.train.batch_size = 8
    config.train.seq_len = 64
    config.train.steps = 40
    config.train.held_out_tokens = 2048
    config.train.eval_tokens = 1024
    config.train.eval_every = 20
    config.train.checkpoint_every = 10
    config.grid.timescales = (None, 0.2)
    config.finetune.batch_size = 16
    config.finetune.length_buckets = (192,)
    config.tasks = {
        "addition2": task(train_rows=128, test_rows=16, validation_rows=8, epochs=1, max_new_tokens=24),
        "topic": task(train_rows=128, test_rows=16, validation_rows=0, epochs=1, max_new_tokens=8),
    }
    config.evaluate.n_samples = 2
    config.evaluate.max_length = 200
    config.evaluate.prompt_buckets = (192,)
    config.evaluate.batch_size = 64
    config.probe.train_rows = 200
    config.probe.test_rows = 100
    config.probe.max_length = 64
    config.gap.tokens_per_side = 2048
    config.report.bootstrap_samples = 200
    return config
