"""Models that exist, of any lab: the whole study after pretraining, for Llama and OLMo-2 checkpoints in Hugging Face folders or in runs of this program.

Command:   plasticity study --config configs/from_checkpoints.py --workdir work

Put OLMo-2 1B after 21, 210, 1,007 and 4,001 billion tokens of its first stage below `checkpoints/` first (revisions of allenai/OLMo-2-0425-1B), or name
your own: docs/existing-models.md. Held-out loss is that of `texts/`, a folder of your own text; `config.data.files = None` does without. One 80 GB GPU; not
run here, because these weights are not at hand.
"""

from plasticity_jax.config import base_config, task


def get_config():
    config = base_config()
    config.name = "from-checkpoints"
    config.grid.axis = "tokens"
    config.grid.models = (
        (21e9, "checkpoints/stage1-step10000-tokens21B"),
        (210e9, "checkpoints/stage1-step100000-tokens210B"),
        (1007e9, "checkpoints/stage1-step480000-tokens1007B"),
        (4001e9, "checkpoints/stage1-step1907359-tokens4001B"),
    )
    config.data.sources = ()
    config.data.files = "texts"
    config.data.held_out_fraction = 0.5
    config.train.seq_len = 2048
    config.train.held_out_tokens = 262144
    config.train.remat = "full"
    config.finetune.peak_lr = 1e-5
    config.finetune.batch_size = 64
    config.finetune.length_buckets = (256, 512)
    config.forgetting.held_out_loss = True
    config.forgetting.batch_size = 8
    config.tasks = {
        "news": task(train_rows=6000, test_rows=1000, epochs=2, max_new_tokens=16),
        "topic": task(train_rows=6000, test_rows=1000, epochs=2, max_new_tokens=16),
    }
    config.evaluate.prompt_buckets = (256, 512)
    config.evaluate.max_length = 768
    config.probe.sets = ("topic",)
    return config
