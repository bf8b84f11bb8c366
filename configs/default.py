"""The first study: a 0.15M-parameter Llama at 20 tokens per parameter, four weight decays, three seeds, real text, on a CPU.

Command:   make study          (plasticity study --config configs/default.py --workdir work)
Machine:   2 CPU cores, 1.5 GiB in the largest of three processes, 7 to 15 minutes from an empty folder (408 s measured); nothing is downloaded but
           packages and the pinned wheels.
Result:    held-out loss 3.928, 3.930, 4.006, 4.340 nats per token and mean accuracy of the three tasks after fine-tuning 0.555, 0.586, 0.617, 0.579 for no
           decay and timescales 0.8, 0.4, 0.2 (means over seeds 3, 4, 5; Python 3.11, float32; docs/results.md).
"""

from plasticity_jax.config import base_config, task


def get_config():
    config = base_config()
    config.name = "default"
    config.model.d_model = 48
    config.model.n_layers = 2
    config.model.d_ff = 128
    config.train.steps = 728
    config.train.eval_every = 182
    config.train.checkpoint_every = 364
    config.train.log_every = 52
    config.grid.timescales = (None, 0.8, 0.4, 0.2)
    config.grid.seeds = (3, 4, 5)
    config.finetune.peak_lr = 3e-3
    config.finetune.batch_size = 16
    config.tasks = {
        "news": task(train_rows=1600, test_rows=225, validation_rows=200, epochs=2, max_new_tokens=12),
        "sentiment": task(train_rows=2400, test_rows=400, validation_rows=200, epochs=2, max_new_tokens=12),
        "topic": task(train_rows=1600, test_rows=400, validation_rows=200, epochs=3, max_new_tokens=12),
    }
    config.evaluate.n_samples = 4
    config.evaluate.max_length = 168
    config.reward.scorer = "log-probability"
    config.launch.parallel_runs = 0
    return config
