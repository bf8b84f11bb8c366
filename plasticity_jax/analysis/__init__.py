"""Why a model is as plastic as it is: attention spectra, linear probes, the gap between seen and held-out text, and the statistics."""

_HOMES = {
    "attention_spectra": "spectra",
    "pseudo_rank": "spectra",
    "spectra_summary": "spectra",
    "fit_probe": "probes",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    # Imported on first use, because jax takes longer to import than `--help` may take.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
