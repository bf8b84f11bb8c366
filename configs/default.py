"""The first study: a half-million-parameter Llama, four weight decays, real text, on a CPU.

Command:   make study          (plasticity study --config configs/default.py --workdir work)
Machine:   2 CPU cores, 1.6 GiB of memory, 12 minutes from an empty folder; nothing is downloaded but packages and the pinned wheels.
Result:    held-out loss 3.907, 3.900, 3.966, 4.776 nats per token for no decay and timescales 4, 0.8, 0.2 (seed 0, Python 3.11, float32).
"""

from plasticity_jax.config import base_config, task


def get_config():
    config = base_config()
    config.name = "default"
    config.train.steps = 320
    config.finetune.peak_lr = 3e-3
    config.finetune.batch_size = 16
    config.tasks = {
        "addition2": task(train_rows=1600, test_rows=300, validation_rows=200, epochs=3, max_new_tokens=40),
        "topic": task(train_rows=1400, test_rows=300, validation_rows=200, epochs=3, max_new_tokens=12),
        "sentiment": task(train_rows=2200, test_rows=300, validation_rows=200, epochs=2, max_new_tokens=12),
    }
    config.evaluate.max_length = 168
    config.reward.scorer = "log-probability"
    return config
