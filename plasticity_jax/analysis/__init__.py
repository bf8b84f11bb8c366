"""Why a model is as plastic as it is: attention spectra, linear probes, the gap between seen and held-out text, and the statistics."""

from typing import TYPE_CHECKING

from plasticity_jax._lazy import attach

if TYPE_CHECKING:
    from plasticity_jax.analysis.probes import fit_probe
    from plasticity_jax.analysis.spectra import attention_products, attention_spectra, noise_floor, noise_variance, pseudo_rank, spectra_summary

_SPECTRA = ["attention_products", "attention_spectra", "noise_floor", "noise_variance", "pseudo_rank", "spectra_summary"]

__all__ = ["attention_products", "attention_spectra", "fit_probe", "noise_floor", "noise_variance", "pseudo_rank", "spectra_summary"]

__getattr__, __dir__ = attach(__name__, {"probes": ["fit_probe"], "spectra": _SPECTRA})
