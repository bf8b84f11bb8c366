from plasticity_jax.runs.records import RunDirectory, open_run  # noqa

STUDY, CONFIG = "study.json", "config.json"
PROBLEMS, COMPLETIONS, OPTIONS, REWARDS = "problems.jsonl", "completions.jsonl", "options.jsonl", "rewards.jsonl"
