"""Llama 1B at 20 tokens per parameter, fine-tuned on the five commonsense sets of the paper's second version.

Command:     plasticity study --config configs/llama_1b_commonsense.py --workdir /mnt/work --config.data.files=gs://BUCKET/fineweb-edu/sample/350BT
Devices:     v5e:8x8, v4:2x2x4 or h100:8, as those of configs/llama_1b_20tpp.py, whose base models it shares in one workdir.
Tests:       before and after, zero-shot by lm-evaluation-harness on seven sets (the extra `harness`; MathQA from its file), as in the original; and the
             likelihood of the sets' own test rows in the template of fine-tuning.
Not yet run here.
"""

from plasticity_jax.config import task
from plasticity_jax.config.recipes import ALL_ROWS, llama_1b

SETS = ("HellaSwag", "WinoGrande", "PIQA", "ARC-Easy", "ARC-Challenge")


def get_config(faithful=False):
    config = llama_1b(faithful=faithful)
    config.name = "llama-1b-commonsense"
    config.tasks = {name: task(train_rows=ALL_ROWS, test_rows=ALL_ROWS, epochs=3) for name in SETS}
    config.reward.scorer, config.reward.model = "none", None
    return config
