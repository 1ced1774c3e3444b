"""A device that is not there is named, with those that are, where the user named it."""

from __future__ import annotations

import pytest
import torch

from streaminfer.errors import ConfigError
from streaminfer.runtime.compute import device_of


@pytest.mark.parametrize(
    ("where", "hint"), [("stages.device", "device: cpu"), ("--device", "--device cpu")]
)
def test_a_device_that_is_not_there_is_named(where: str, hint: str) -> None:
    with pytest.raises(ConfigError, match="no device 'cuda:77' on this machine; it has: cpu") as e:
        device_of("cuda:77", where)
    assert e.value.where == where
    assert e.value.hint == hint or torch.cuda.is_available()


def test_the_cpu_is_there() -> None:
    assert device_of("cpu") == torch.device("cpu")
