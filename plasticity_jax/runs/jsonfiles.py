from plasticity_jax.runs.records import read_json, read_jsonl, to_json, write_json, write_jsonl  # noqa
