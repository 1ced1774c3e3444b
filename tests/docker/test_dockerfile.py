"""The image can be built and is safe to run, as far as its text says so."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.docker.tools import DOCKER, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


class Line(NamedTuple):
    """One instruction, its lines joined: word, flags, the rest."""

    word: str
    flags: dict[str, str]
    rest: str


class Stage(NamedTuple):
    """One stage of the build and the image or stage that it starts from."""

    base: str
    lines: list[Line]


def parse(text: str) -> dict[str, Stage]:
    """Return the stages of a Dockerfile by their names."""
    stages: dict[str, Stage] = {}
    bare = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for joined in bare.replace("\\\n", " ").splitlines():
        if not joined.strip():
            continue
        word, _, rest = joined.strip().partition(" ")
        flags = dict(re.findall(r"--(\w[\w-]*)(?:=(\S+))?(?=\s)", rest.split("[")[0]))
        rest = re.sub(r"^(\s*--\S+)+\s+", "", " " + rest).strip()
        if word == "FROM":
            base, _, name = rest.split()
            stages[name] = Stage(base, [])
        else:
            list(stages.values())[-1].lines.append(Line(word, flags, rest))
    return stages


STAGES = parse((DOCKER / "Dockerfile").read_text())


def lineage(target: str) -> list[Line]:
    """Return all instructions that make a target's own layers, the base's first."""
    stage = STAGES[target]
    return [*(lineage(stage.base) if stage.base in STAGES else []), *stage.lines]


def last(target: str, word: str) -> str:
    """Return what the last instruction of that kind says."""
    return [line.rest for line in lineage(target) if line.word == word][-1]


def test_bases_are_pinned_to_a_release() -> None:
    """A base that moves makes another image of the same commit."""
    bases = {stage.base for stage in STAGES.values()} - set(STAGES)
    assert bases
    assert all(re.fullmatch(r"python:3\.12\.\d+-slim-\w+", base) for base in bases), bases


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_a_target_runs_streaminfer_as_nobody_special(target: str) -> None:
    assert last(target, "USER") == "10001:10001"
    assert json.loads(last(target, "ENTRYPOINT")) == ["streaminfer"]
    assert last(target, "WORKDIR") == "/app"
    assert not [line for line in lineage(target)[-3:] if line.word == "RUN"]
    labels = " ".join(line.rest for line in lineage(target) if line.word == "LABEL")
    assert f'org.opencontainers.image.version="{PROJECT["version"]}"' in labels
    assert f'org.opencontainers.image.licenses="{PROJECT["license"]}"' in labels


def test_copies_come_from_what_is_there() -> None:
    """A source that is missing or ignored ends the build minutes after it began."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    copies = [line for stage in STAGES.values() for line in stage.lines if line.word == "COPY"]
    local = {
        source for copy in copies if "from" not in copy.flags for source in copy.rest.split()[:-1]
    }
    assert {"pyproject.toml", "streaminfer", "stages"} <= local
    for source in local:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored, f"{source} does not reach the builder"
    assert {copy.flags["from"] for copy in copies if "from" in copy.flags} <= set(STAGES)


def test_libraries_lie_below_the_source() -> None:
    """Else every changed line of ours installs torch again."""
    copied = [line.rest for line in lineage("torch") if line.word == "COPY"]
    assert copied == ["pyproject.toml ./"]


def test_every_library_is_installed_and_torch_from_its_own_index(tmp_path: Path) -> None:
    """Runs the step that sorts pyproject's names, without its pip."""
    (step,) = [line.rest for line in STAGES["libraries"].lines if line.word == "RUN"]
    commands = step.split("&& /opt/venv")[0].replace("python -c", f"{sys.executable} -c")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    subprocess.run(["sh", "-ec", commands], cwd=tmp_path, check=True)
    torch = (tmp_path / "torch.txt").read_text().split()
    rest = (tmp_path / "rest.txt").read_text().split()
    assert [re.split(r"\W", name)[0] for name in torch] == ["torch", "torchvision"]
    assert sorted(torch + rest) == sorted(
        PROJECT["dependencies"] + PROJECT["optional-dependencies"]["stages"]
    )
    (install,) = [line.rest for line in STAGES["torch"].lines if line.word == "RUN"]
    for index, flags in (("", []), ("there", ["--index-url", "there"])):
        shell = f"TORCH_INDEX={index}; set -- {install.partition(' ')[2]}; echo $*"
        words = subprocess.check_output(["sh", "-c", shell], text=True).split()
        assert words == ["install", *flags, "-r", "torch.txt"]


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_health_check_is_the_worker_s_readiness(status: int, code: int) -> None:
    """A container that is up and cannot take work must not count as healthy."""
    line = last("cpu", "HEALTHCHECK")
    command = json.loads(line[line.index("[") :])
    assert command[0] == "python"
    port = re.search(r"STREAMINFER_METRICS__PORT=(\d+)", last("cpu", "ENV"))
    assert port
    with answering(status) as (here, asked):
        words = [word.replace(port[1], str(here)) for word in command[1:]]
        done = subprocess.run([sys.executable, *words], capture_output=True)
    assert done.returncode == code
    assert asked == ["/readyz"]


def test_no_index_is_written_into_the_file() -> None:
    """Which mirror to use is the builder's choice, by argument."""
    text = (DOCKER / "Dockerfile").read_text()
    assert "https://" not in text
    assert {"TORCH_INDEX", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"} <= {
        shlex.split(line.rest)[0].partition("=")[0]
        for line in lineage("torch")
        if line.word == "ARG"
    }


@contextmanager
def answering(status: int) -> Iterator[tuple[int, list[str]]]:
    """Serve every path with a status; yields the port and the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port, asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
