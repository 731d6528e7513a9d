"""A site with labels, and an empty one."""

import pytest

from tests.helpers.sites import Site


@pytest.fixture
def site(tmp_path) -> Site:
    return Site(tmp_path / "one").fill()


@pytest.fixture
def other(tmp_path) -> Site:
    """An empty one to restore to."""
    made = Site(tmp_path / "other")
    made.studies.rmdir()
    return made
