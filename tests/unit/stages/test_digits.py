"""What a user loses: a first model whose stated accuracy is true and can be had again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from stages.digits import train
from stages.digits.images import pixels, scans
from stages.digits.model import build
from streaminfer.planning.example import Inputs
from streaminfer.planning.reference import reference
from streaminfer.runtime.decode import decode_image
from streaminfer.spec import PipelineSpec
from streaminfer.spec.file import load

FOLDER = Path(train.__file__).parent


@pytest.fixture(scope="module")
def spec() -> PipelineSpec:
    return load(FOLDER / "pipeline.yaml", environ={})


@pytest.fixture(scope="module")
def network() -> nn.Module:
    network = build()
    network.load_state_dict(load_file(FOLDER / "weights.safetensors"))
    return network.eval()


@pytest.fixture(scope="module")
def decoded(spec: PipelineSpec) -> Tensor:
    """All scans as the pipeline sees them: decoded from their files, normalised by its numbers."""
    rows = np.stack([decode_image(value, None, spec.input) for _, _, value in scans()])
    return (torch.from_numpy(rows).float() / 255 - spec.input.mean[0]) / spec.input.std[0]


def test_the_stated_accuracy_is_had_from_the_files(network: nn.Module, decoded: Tensor) -> None:
    stated = json.loads((FOLDER / "train.json").read_text())
    labels = torch.tensor([label for _, label, _ in scans()])
    held_out = train.split(labels.numpy()).held_out
    assert len(held_out) == stated["held_out"] == 360
    assert stated["accuracy"] >= 0.985
    share = train.accuracy(network, decoded[held_out], labels[held_out])
    assert share >= stated["accuracy"] - 1e-4  # rounded to four digits


def test_the_others_are_as_good_as_stated(decoded: Tensor) -> None:
    stated = json.loads((FOLDER / "train.json").read_text())["others"]
    labels = torch.tensor([label for _, label, _ in scans()])
    held_out = train.split(labels.numpy()).held_out
    assert set(stated) == {"exit", *train.MEMBERS}
    early = train.trunk(train.trained("weights"))
    for name, share in stated.items():
        network = train.trained(name)
        if name == "exit":
            network = nn.Sequential(early, network)
        found = train.accuracy(network, decoded[held_out], labels[held_out])
        assert found >= share - 1e-4 >= 0.95, name


def test_the_readme_states_what_each_file_gets_right(decoded: Tensor) -> None:
    """Its numbers are what somebody chooses a form by, the bad one too."""
    labels = torch.tensor([label for _, label, _ in scans()])
    held_out = train.split(labels.numpy()).held_out
    rows = re.findall(
        r"^\| `([\w-]+\.yaml)` .* (\S+) \|$", (FOLDER / "README.md").read_text(), re.M
    )
    stated = {name: float(share) for name, share in rows}
    assert set(stated) == {file.name for file in FOLDER.glob("*.yaml")}
    for name, share in stated.items():
        with torch.inference_mode():
            (logits,) = reference(load(FOLDER / name, environ={}))(Inputs((decoded[held_out],)))
        found = float((logits.argmax(1) == labels[held_out]).float().mean())
        assert abs(found - share) < 0.003, f"{name}: {found:.4f}"  # one scan of 360
    vote = (FOLDER / "tiles-vote.yaml").read_text()
    assert f"only {stated['tiles-vote.yaml']} of the held-out" in vote


def test_most_scans_leave_at_the_exit(decoded: Tensor) -> None:
    declared = load(FOLDER / "early-exit.yaml", environ={}).stages[0].exit
    assert declared is not None
    head = nn.Sequential(train.trunk(train.trained("weights")), train.trained("exit"))
    with torch.inference_mode():
        sure = head(decoded).softmax(1).amax(1) >= declared.threshold
    assert 0.8 < float(sure.float().mean()) < 0.97


def test_held_out_scans_are_not_learnt_from() -> None:
    _, labels = pixels()
    sides = train.split(labels)
    assert not set(sides.learn) & set(sides.held_out)
    assert len(sides.learn) + len(sides.held_out) == len(labels) == 1797


def test_files_hold_the_scans_that_were_learnt(spec: PipelineSpec) -> None:
    grey, labels = pixels()
    files = scans()
    assert [label for _, label, _ in files] == labels.tolist()
    assert len({name for name, _, _ in files}) == len(files)
    for (name, _, value), scan in zip(files, grey, strict=True):
        off = np.abs(decode_image(value, None, spec.input)[0].astype(int) - scan).max()
        assert off <= (0 if name.endswith("png") else 1), name


def test_the_pipeline_normalises_as_training_did(spec: PipelineSpec, decoded: Tensor) -> None:
    grey, labels = pixels()
    assert (spec.input.mean, spec.input.std) == ((train.MEAN,), (train.STD,))
    learnt = train.normalise(grey)[train.split(labels).learn]
    assert abs(float(learnt.mean())) < 1e-3
    assert abs(float(learnt.std()) - 1) < 1e-3
    assert torch.equal(decoded[::2], train.normalise(grey)[::2])  # PNG is every second one


def test_the_cuts_are_layers_of_the_model(spec: PipelineSpec) -> None:
    layers = [name for name, _ in build().named_children()]
    cuts = [layers.index(stage.until) for stage in spec.stages if stage.until]
    assert len(cuts) == len(spec.stages) - 1 == 2
    assert cuts == sorted(set(cuts))
    assert build()(torch.zeros(2, *spec.first_model.example)).shape == (
        2,
        len(spec.output.labels or ()),
    )


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(strict)


@pytest.mark.usefixtures("one_thread")
def test_training_again_gives_the_same_weights() -> None:
    grey, labels = pixels()
    images, answers = train.normalise(grey)[:128], torch.from_numpy(labels)[:128]
    first, again, other = (
        train.train(images, answers, epochs=2, seed=seed).state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
