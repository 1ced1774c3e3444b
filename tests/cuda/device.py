"""The GPU that these tests take; without one they are skipped."""

from __future__ import annotations

import pytest
import torch

GPU = "cuda:0"
WITHOUT = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
