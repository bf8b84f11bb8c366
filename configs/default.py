"""The first study: a half-million-parameter Llama, four weight decays, real text, on a CPU.

Command:   make study          (plasticity study --config configs/default.py --workdir work)
Machine:   2 CPU cores, under 6 GB of memory, about ten minutes; nothing is downloaded but the pinned wheels.
"""

from plasticity_jax.config import base_config, task


def get_config():
    config = base_config()
    config.name = "default"
    config.train.steps = 320
    config.finetune.peak_lr = 3e-3
    config.finetune.batch_size = 16
    config.tasks = {
        "addition2": task(train_rows=1600, test_rows=300, epochs=3, max_new_tokens=40),
        "topic": task(train_rows=1400, test_rows=300, epochs=3, max_new_tokens=12),
        "sentiment": task(train_rows=2200, test_rows=300, epochs=2, max_new_tokens=12),
    }
    return config
