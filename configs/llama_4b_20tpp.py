"""Llama 4B at 20 tokens per parameter: the study's largest sweep over weight decay.

Command:     plasticity study --config configs/llama_4b_20tpp.py --workdir /mnt/work --config.data.files=gs://BUCKET/fineweb-edu/sample/350BT
Devices:     v5p:4x4x4 or h100:32, as plasticity check names them.
Tokens:      80.0B = 38,146 steps of 1024 x 2048, peak learning rate 1.5e-4; fine-tuning at 7.5e-6.
Timescales:  of the run, at the peak rate: λ 0 none, 0.1 1.75, 1 0.175.
Faithful:    --config.faithful=True takes the batches that the authors' nodes made of theirs: 8192 x 2048 at λ 1 (4,768 steps, timescale 1.4) and
             4096 x 2048 at λ 0 (9,536 steps), so λ is not all that differs. Their λ 0.1 came from earlier work; its batch is not known and stays.
Not yet run here; lowest loss and best fine-tuning reported at λ 1.0, of 0.1 and 1.0.
"""

from plasticity_jax.config.recipes import llama


def get_config(faithful=False):
    config = llama("llama-4b", tokens=80e9, batch_size=1024, peak_lr=1.5e-4, faithful=faithful)
    config.name = "llama-4b-20tpp"
    config.grid.weight_decay = (0.0, 0.1, 1.0)
    if faithful:
        config.grid.changes = (
            ("^wd1-", {"train.batch_size": 8192, "train.steps": 4768}),
            ("^wd0-", {"train.batch_size": 4096, "train.steps": 9536}),
        )
    config.finetune.peak_lr = 7.5e-6
    parts = 8 if faithful else 1  # as many times the batch of 1024 at λ 1
    config.hardware = (
        ("TPU v5p?$", {"train.grad_accum_steps": parts, "train.remat": "dots"}),
        ("H100|H200", {"train.grad_accum_steps": 2 * parts, "train.remat": "dots"}),
    )
    return config
