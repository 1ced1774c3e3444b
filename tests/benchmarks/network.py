"""ResNet-50 as a person would cut it by hand: two `nn.Sequential`s, behind layer2.

Its weights are random; the statistics of its norms come from real images, so that activations are
as large as a trained network's (fp16 must hold them).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from torch import Tensor, nn
from torchvision.models import resnet50

from tests.benchmarks.images import photos

__all__ = ["BATCH", "best", "halves", "prepare", "write_weights"]

BATCH = 4  # as in stages/resnet50/pipeline.yaml: all systems compute the same micro-batches
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def prepare(jpegs: Sequence[bytes]) -> Tensor:
    """Decode JPEGs of 256x256 pixels, crop the centre: float32 [N, 3, 224, 224]."""
    pixels = [simplejpeg.decode_jpeg(jpeg)[16:240, 16:240] for jpeg in jpegs]
    batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return ((batch.float() / 255 - MEAN) / STD).contiguous()


def write_weights(file: Path) -> None:
    """Write the weights that every process of a comparison loads."""
    torch.manual_seed(0)
    network = resnet50(weights=None).train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain average over what is seen
    with torch.no_grad():
        network(prepare(list(photos(24))))
    torch.save(network.state_dict(), file)


def halves(file: Path) -> tuple[nn.Module, nn.Module]:
    """Return what comes up to layer2, and the rest: float32 [N, 512, 28, 28] crosses."""
    network = resnet50(weights=None)
    network.load_state_dict(torch.load(file, weights_only=True))
    network.eval().requires_grad_(False)
    first = [network.conv1, network.bn1, network.relu, network.maxpool]
    second = [network.layer3, network.layer4, network.avgpool, nn.Flatten(1), network.fc]
    return (
        nn.Sequential(*first, network.layer1, network.layer2),
        nn.Sequential(*second),
    )


def best(logits: Tensor, count: int = 5) -> list[list[tuple[int, float]]]:
    """Return the classes and scores of the best few, per row."""
    scores, classes = logits.softmax(1).topk(count)
    return [
        list(zip(row, values, strict=True))
        for row, values in zip(classes.tolist(), scores.tolist(), strict=True)
    ]
