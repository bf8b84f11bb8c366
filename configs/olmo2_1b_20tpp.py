"""OLMo-2 1B at 20 tokens per parameter: the sweep over weight decay on another architecture and mixture.

Command:     plasticity study --config configs/olmo2_1b_20tpp.py --workdir /mnt/work --config.data.files=gs://BUCKET/olmo-mix-1124
Devices:     v5p:4x4x4 or h100:8, as plasticity check names them.
Tokens:      30.0B = 14,305 steps of 512 x 4096, peak learning rate 4e-4.
Timescales:  of the run, at the peak rate: λ 0 none, 0.1 1.75, 0.3 0.583, 0.6 0.291, 1 0.175.
Not yet run here; lowest loss reported at λ 0.6, best after fine-tuning at 1.0. Warm-up and floor of the authors' runs are not known: 10% each.
"""

from plasticity_jax.config.recipes import olmo2


def get_config(faithful=False):
    config = olmo2(tokens=30e9, faithful=faithful)
    config.name = "olmo2-1b-20tpp"
    config.grid.weight_decay = (0.0, 0.1, 0.3, 0.6, 1.0)
    config.hardware = (
        ("TPU v5p?$", {"train.remat": "dots"}),
        ("H100|H200", {"train.grad_accum_steps": 4, "train.remat": "dots"}),
    )
    return config
