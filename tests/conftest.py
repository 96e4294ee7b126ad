"""Shapes are checked at every call in the suite; one thread, so that runs repeat."""

import os
from pathlib import Path

# Before torch reads it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook(["distrl.ops", "distrl.nn", "distrl.methods"], "beartype.beartype")

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(7)


@pytest.fixture(scope="session")
def beauty_file() -> Path:
    """The real Beauty sequences, which lie beside the checkout and may not be shipped with it."""
    path = SHARED_DATA / "beauty" / "sequences.txt"
    assert path.exists(), (
        f"{path} is missing: put the file Beauty.txt of S3-Rec/ICLRec/MCLRec there "
        "(one user a line, `user item item ...`)"
    )
    return path


def pytest_collection_modifyitems(items):
    """With two processes one takes all that starts clusters, in turn, and the other the rest.

    Two clusters at once on two cores starve each other: Ray gives a node 30 s to start.
    """
    for item in items:
        clusters = "integration" in item.path.parts
        item.add_marker(pytest.mark.xdist_group("clusters" if clusters else str(item.path)))
