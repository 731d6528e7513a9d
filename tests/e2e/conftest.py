"""How the servers of these tests start."""

import os

import pytest

from tests.e2e.forks import forked
from tests.e2e.server import Server


@pytest.fixture(scope="session", autouse=True)
def spared_starts():
    """Servers are forks of one process, which has the libraries, and score images only when they are asked to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Server, "launch", staticmethod(forked))
        patch.setitem(os.environ, "MONAI_LABEL_AUTO_UPDATE_SCORING", "false")
        yield
