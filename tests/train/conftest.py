import pytest
from worlds import CONFIG, World


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    """A corpus, a task, step-0 parameters, and two finished members: `base` (λ 0.1) and `free` (λ 0)."""
    world = World(tmp_path_factory.mktemp("world"), CONFIG)
    world.results = {"base": world.pretrain({"base": 0.1}, CONFIG)[0], "free": world.pretrain({"free": 0.0}, CONFIG)[0]}
    return world
