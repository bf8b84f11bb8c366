import pytest


@pytest.hookimpl(trylast=True)  # after -m has taken out what is not to run: the ordinary suite has nothing left of this folder, and asks no device
def pytest_collection_modifyitems(items):
    if not any(item.get_closest_marker("device") for item in items):
        return
    import jax

    if jax.default_backend() == "cpu":
        raise pytest.UsageError("no GPU or TPU here: jax finds only the CPU; run make test-device where there is one, with jax[cuda13] or jax[tpu].")
