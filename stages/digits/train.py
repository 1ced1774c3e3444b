"""Train the digits network: `python -m stages.digits.train`.

Writes `weights.safetensors` and `train.json` beside this file. Seeded: a second run on the same
machine gives the same weights, bit for bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from stages.digits.images import pixels
from stages.digits.model import build

__all__ = ["MEAN", "STD", "Split", "accuracy", "normalise", "split", "train"]

HERE = Path(__file__).parent
MEAN, STD = 0.3054, 0.3760  # of the training pixels / 255; pipeline.yaml says the same
HELD_OUT = 360
SEED = 0
EPOCHS = 40
BATCH = 64


class Split(NamedTuple):
    """Which scans are learnt from and which are only asked about; fixed, stratified by label."""

    learn: NDArray[np.int64]
    held_out: NDArray[np.int64]


def split(labels: NDArray[np.int64]) -> Split:
    """Return the indices of both sides."""
    learn, held_out = train_test_split(
        np.arange(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=0
    )
    return Split(learn, held_out)


def normalise(grey: NDArray[np.uint8]) -> Tensor:
    """Turn uint8 [N, 8, 8] into what the network sees, float32 [N, 1, 8, 8]."""
    return (torch.from_numpy(grey).unsqueeze(1).float() / 255 - MEAN) / STD


def train(images: Tensor, labels: Tensor, epochs: int = EPOCHS, seed: int = SEED) -> nn.Module:
    """Return a network that learnt `images` [N, 1, 8, 8] and `labels` [N]; ready to evaluate."""
    torch.manual_seed(seed)
    network = build().train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=6e-3, total_steps=steps)
    loss = nn.CrossEntropyLoss(label_smoothing=0.05)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(images)), BATCH):
            optimiser.zero_grad()
            loss(network(_shift(images[rows])), labels[rows]).backward()
            optimiser.step()
            schedule.step()
    return network.eval()


def _shift(images: Tensor) -> Tensor:
    """Move every image by up to one pixel each way: a digit stays what it is."""
    background = float(images.min())
    padded = nn.functional.pad(images, (1, 1, 1, 1), value=background)
    down, right = torch.randint(0, 3, (2, len(images))).tolist()
    moved = [
        image[:, y : y + 8, x : x + 8] for image, y, x in zip(padded, down, right, strict=True)
    ]
    return torch.stack(moved)


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images whose likeliest class is their label."""
    with torch.inference_mode():
        return float((network(images).argmax(1) == labels).float().mean())


def main() -> None:
    """Train, ask about the held-out scans, and write both files."""
    # One thread: sums are added up in one order, whatever the machine has to do besides.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    grey, labels = pixels()
    images, answers = normalise(grey), torch.from_numpy(labels)
    sides = split(labels)
    network = train(images[sides.learn], answers[sides.learn])
    share = accuracy(network, images[sides.held_out], answers[sides.held_out])
    print(f"{share:.4f} of {HELD_OUT} held-out scans are right")
    report = {"accuracy": round(share, 4), "held_out": HELD_OUT, "seed": SEED, "epochs": EPOCHS}
    (HERE / "train.json").write_text(json.dumps(report, indent=1) + "\n")
    (HERE / "weights.safetensors").write_bytes(save(network.state_dict()))


if __name__ == "__main__":
    main()
