import importlib.util

# Elsewhere than in the environment that tests/environment makes, these files cannot even be imported.
if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
    collect_ignore_glob = ["*.py"]
