"""Shapes are checked at every call in the suite; one thread, so that runs repeat."""

import os
from pathlib import Path

# Before torch reads it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from jaxtyping import install_import_hook
from xdist.scheduler import LoadFileScheduling

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


class ClustersInTurn(LoadFileScheduling):
    """One process takes all that starts clusters, in turn, and the others the other files.

    Two clusters at once on two cores starve each other: Ray gives a node 30 s to start.
    """

    def _split_scope(self, nodeid):
        if nodeid.startswith("tests/integration/"):
            return "clusters"
        return super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return ClustersInTurn(config, log)
