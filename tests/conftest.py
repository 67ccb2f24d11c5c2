"""What all tests share: one thread each, no network, the same seed."""

import os

# Before torch is imported, and for every process that a test starts: tests run side by side, and numbers must not
# depend on how many cores there are. torch is not imported here: pytest-xdist's first process never needs it.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", HF_HUB_OFFLINE="1")

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole workflows first: they take longest, and each uses a second processor only now and then."""
    items.sort(key=lambda item: item.path.parent.name != "workflow")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same random numbers, whatever ran before it."""
    import torch

    torch.manual_seed(0)
