"""Train the digits network, its exit and the ensemble's members: `python -m stages.digits.train`.

Writes the safetensors files and `train.json` beside this file; with names behind the command, only
those (`weights`, `exit`, `perceptron`, `convolution`). Seeded: a second run on the same machine
gives the same weights, bit for bit.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from stages.digits import members
from stages.digits.images import pixels
from stages.digits.model import build

__all__ = [
    "MEAN",
    "MEMBERS",
    "STD",
    "Split",
    "accuracy",
    "normalise",
    "split",
    "train",
    "trained",
    "trunk",
]

HERE = Path(__file__).parent
MEAN, STD = 0.3054, 0.3760  # of the training pixels / 255; pipeline.yaml says the same
HELD_OUT = 360
SEED = 0
EPOCHS = 40
BATCH = 64
MEMBERS = {"perceptron": members.perceptron, "convolution": members.convolution}
MAKERS = {"weights": build, "exit": members.exit_head, **MEMBERS}  # by the name of their file

Layers = Callable[[Tensor], Tensor]


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


def train(
    images: Tensor,
    labels: Tensor,
    epochs: int = EPOCHS,
    seed: int = SEED,
    make: Callable[[], nn.Module] = build,
    before: Layers | None = None,
) -> nn.Module:
    """Return a network that learnt from images and their labels; ready to evaluate.

    Args:
        images: float32 [N, 1, 8, 8].
        labels: int64 [N].
        epochs: how often each image is seen.
        seed: of the first weights, the order and the shifts.
        make: the network to teach, fresh.
        before: layers that learn nothing, through which the images go first.
    """
    torch.manual_seed(seed)
    network = make().train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=6e-3, total_steps=steps)
    loss = nn.CrossEntropyLoss(label_smoothing=0.05)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(images)), BATCH):
            optimiser.zero_grad()
            seen = _shift(images[rows])
            if before is not None:
                with torch.no_grad():
                    seen = before(seen)
            loss(network(seen), labels[rows]).backward()
            optimiser.step()
            schedule.step()
    return network.eval()


def trunk(network: nn.Module) -> nn.Module:
    """Return the layers before the exit of early-exit.yaml: float32 [N,1,8,8] → [N,12,8,8]."""
    assert isinstance(network, nn.Sequential)
    return network[:2]


def _shift(images: Tensor) -> Tensor:
    """Move every image by up to one pixel each way: a digit stays what it is."""
    background = float(images.min())
    padded = nn.functional.pad(images, (1, 1, 1, 1), value=background)
    down, right = torch.randint(0, 3, (2, len(images))).tolist()
    moved = [
        image[:, y : y + 8, x : x + 8] for image, y, x in zip(padded, down, right, strict=True)
    ]
    return torch.stack(moved)


def accuracy(network: Layers, images: Tensor, labels: Tensor) -> float:
    """Return the share of images whose likeliest class is their label."""
    with torch.inference_mode():
        return float((network(images).argmax(1) == labels).float().mean())


def trained(name: str) -> nn.Module:
    """Return one of `MAKERS` with the weights of its file; ready to evaluate."""
    network = MAKERS[name]()
    network.load_state_dict(load_file(HERE / f"{name}.safetensors"))
    return network.eval()


def main(names: Sequence[str]) -> None:
    """Train what is named, ask all about the held-out scans, and write the files."""
    # One thread: sums are added up in one order, whatever the machine has to do besides.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    grey, labels = pixels()
    images, answers = normalise(grey), torch.from_numpy(labels)
    learn, held_out = split(labels)
    for name in names:
        before = trunk(trained("weights")) if name == "exit" else None
        made = train(images[learn], answers[learn], make=MAKERS[name], before=before)
        (HERE / f"{name}.safetensors").write_bytes(save(made.state_dict()))
    networks = {name: trained(name) for name in MAKERS}
    networks["exit"] = nn.Sequential(trunk(networks["weights"]), networks["exit"])
    shares = {
        name: round(accuracy(network, images[held_out], answers[held_out]), 4)
        for name, network in networks.items()
    }
    report = {
        "accuracy": shares.pop("weights"),
        "held_out": HELD_OUT,
        "seed": SEED,
        "epochs": EPOCHS,
        "others": shares,
    }
    text = json.dumps(report, indent=1)
    print(text)
    (HERE / "train.json").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:] or list(MAKERS))
