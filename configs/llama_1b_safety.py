"""Llama 1B at 20 tokens per parameter, fine-tuned on instructions with 300 safety rows among them; and tests out of domain.

Command:     plasticity study --config configs/llama_1b_safety.py --workdir /mnt/work --config.data.files=gs://BUCKET/fineweb-edu/sample/350BT
Devices:     v5e:8x8, v4:2x2x4 or h100:8, as those of configs/llama_1b_20tpp.py, whose base models it shares in one workdir.
Tests:       refusals of harmful prompts and over-refusal of harmless ones (tables/metrics.csv, test sets "harmful" and "harmless"); CRUXEval,
             BoardgameQA, TabMWP and StrategyQA before and after (tables/out_of_domain.csv).
Not yet run here. The original's λ for this start at 1e-4; its test is not known.
"""

from plasticity_jax.config import task
from plasticity_jax.config.recipes import ALL_ROWS, OUT_OF_DOMAIN, llama_1b

FILES = {
    "instructions": "data/alpaca",
    "safety": "data/safety-tuned-llamas/safety_only_data_Instructions.json",
    "test": "data/XSTest",
}
TEST_ROWS = {"CRUXEval": 800, "BoardgameQA": 500, "TabMWP": 1000, "StrategyQA": 500}  # as many as in the original


def get_config(faithful=False):
    config = llama_1b(faithful=faithful)
    config.name = "llama-1b-safety"
    config.grid.weight_decay = tuple(decay for decay in config.grid.weight_decay if decay)
    tests = {name: task(test_rows=TEST_ROWS[name], files={"test": place}) for name, place in OUT_OF_DOMAIN.items()}
    config.tasks = {"Safety": task(train_rows=ALL_ROWS, test_rows=450, epochs=3, files=FILES)} | tests
    config.reward.scorer, config.reward.model = "none", None
    return config
