"""Llama 1B at 20 tokens per parameter: the study's main sweep over weight decay.

Command:     plasticity study --config configs/llama_1b_20tpp.py --workdir /mnt/work --config.data.files=gs://BUCKET/fineweb-edu/sample/350BT
Devices:     v5e:8x8, v4:2x2x4 or h100:8, as plasticity check names them; the authors used 8 A100 for about a day per member.
Tokens:      20.0B = 19,073 steps of 512 x 2048, peak learning rate 2e-4.
Timescales:  of the run, at the peak rate: λ 0 none, 0.0001 2620, 0.001 262, 0.01 26.2, 0.1 2.62, 0.5 0.524, 1 0.262, 1.5 0.175, 3 0.0874, 10 0.0262.
Faithful:    --config.faithful=True takes the batch that the authors' two nodes made of theirs: 1024 x 2048, so 9,536 steps and twice the timescales.
Not yet run here; lowest loss reported at λ 0.5, best after fine-tuning at 1.0.
"""

from plasticity_jax.config.recipes import llama_1b


def get_config(faithful=False):
    config = llama_1b(faithful=faithful)
    config.name = "llama-1b-20tpp"
    return config
