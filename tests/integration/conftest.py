"""What this directory's tests need of third parties: quiet imports, and one thread."""

import warnings

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # fbgemm's CPU wheel lacks two GPU lookups and says so, and TorchRec imports a module that fbgemm has renamed.
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:fbgemm_gpu")
    # Collection has begun when this file is found, with the filters there were before it.
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="fbgemm_gpu")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # On a busy machine two threads wait for each other at every tiny product: a hundred times slower than one.
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> object:
    """A small synthetic dataset and the bundle of its run."""
    from tests.integration.world import make_world

    return make_world(tmp_path_factory.mktemp("world"))
