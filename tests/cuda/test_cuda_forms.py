"""On a GPU every form gives what the uncut model gives there, and what it gives on the CPU."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from streaminfer.planning.verify import verify
from tests.cuda.device import GPU, WITHOUT
from tests.pipelines import own
from tests.pipelines.forms import Form, Made, copied
from tests.pipelines.test_forms import LARGE, NAMES

pytestmark = WITHOUT


def placed(stage: dict[str, Any], device: str) -> dict[str, Any]:
    """Put a stage on a device, or what its branches are made of."""
    if not (inner := stage.get("branches") or stage.get("stages")):
        return {**stage, "device": device}
    key = "branches" if "branches" in stage else "stages"
    return {**stage, key: [placed(one, device) for one in inner]}


def on_device(file: Path, device: str) -> Path:
    """Rewrite a pipeline file: all of its stages on one device."""
    raw = yaml.safe_load(file.read_text())
    raw["stages"] = [placed(stage, device) for stage in raw["stages"]]
    file.write_text(yaml.safe_dump(raw))
    return file


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Form]]:
    threads, rounded = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # the CPU's answers have all bits
    found = {}
    for name, (file, changes) in NAMES.items():
        folder = tmp_path_factory.mktemp("form")
        shutil.copy(own.__file__, folder)
        copy = on_device(copied(file, folder, changes), GPU)
        found[name] = Form(copy, folder, file in LARGE, Made() if file in LARGE else None)
    yield found
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = rounded


@pytest.mark.parametrize("name", NAMES)
def test_verify_holds_there(forms: dict[str, Form], name: str) -> None:
    form = forms[name]
    sizes = (2,) if form.random_weights else (1, 3, 8)
    with form.making():
        spec, where, _ = form.planned
        report = verify(spec, where, batch_sizes=sizes, device=torch.device(GPU))
    assert report.holds, report


@pytest.mark.parametrize("name", [name for name, (file, _) in NAMES.items() if file not in LARGE])
async def test_the_answers_are_those_of_the_uncut_model_on_the_cpu(
    forms: dict[str, Form], name: str
) -> None:
    forms[name].check(await forms[name].answers(None))
