"""A network whose own results are bad, and correctors at the size of the phantoms."""

import pytest
import torch

from sam2sgp.adaptation import plan
from sam2sgp.networks import SAM2SGP
from tests.helpers.banks import SIZE


@pytest.fixture(scope="module")
def small_correctors():
    """Correctors at the size of the phantoms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "WHOLE_SIZE", SIZE)
        yield


@pytest.fixture(scope="module")
def network() -> SAM2SGP:
    """A network whose own results are bad."""
    torch.manual_seed(0)
    return SAM2SGP("nano", SIZE, pmg={"prior": False, "regression": False}, refinement=False).eval()
