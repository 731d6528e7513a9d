"""Which number formats there are, and where."""

import pytest
import torch

from sam2sgp.errors import ConfigError
from sam2sgp.inferers.precision import autocast


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_layer_computes_in_it(precision, dtype):
    with autocast("cpu", precision):
        assert torch.nn.Linear(4, 2)(torch.ones(3, 4)).dtype == dtype


def test_what_a_device_can_not_do_is_refused():
    with pytest.raises(ConfigError, match="precision is 'int8': expected one of fp32, bf16, fp16"):
        autocast("cpu", "int8")
    with pytest.raises(ConfigError, match="needs a GPU"):
        autocast("cpu", "fp16")
