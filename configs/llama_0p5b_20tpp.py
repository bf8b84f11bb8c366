"""Llama 0.5B at 20 tokens per parameter: the study's main sweep over weight decay.

Command:     plasticity study --config configs/llama_0p5b_20tpp.py --workdir /mnt/work --config.data.files=gs://BUCKET/fineweb-edu/sample/350BT
Devices:     v5e:4x4 or h100:1, as plasticity check names them; the authors used 4 A100 for about 15 hours per member.
Tokens:      10.0B = 9,536 steps of 512 x 2048, peak learning rate 2.5e-4.
Timescales:  of the run, at the peak rate: λ 0 none, 0.0001 4190, 0.001 419, 0.01 41.9, 0.1 4.19, 0.5 0.839, 1 0.419, 1.5 0.28, 3 0.14, 10 0.0419.
Not yet run here; lowest loss reported at λ 0.5, best after fine-tuning at 1.0.
"""

from plasticity_jax.config.recipes import llama


def get_config(faithful=False):
    config = llama("llama-0.5b", tokens=10e9, batch_size=512, peak_lr=2.5e-4, faithful=faithful)
    config.name = "llama-0.5b-20tpp"
    config.grid.weight_decay = (0.0, 0.0001, 0.001, 0.01, 0.1, 0.5, 1.0, 1.5, 3.0, 10.0)
    config.hardware = (
        ("TPU v5 lite", {"train.grad_accum_steps": 4, "train.remat": "dots"}),
        ("H100|H200", {"train.grad_accum_steps": 16, "train.remat": "dots", "finetune.grad_accum_steps": 4}),
    )
    return config
