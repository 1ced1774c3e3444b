"""The programs that judge what is in docker/, and what they are given: found, built or skipped."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

__all__ = [
    "DOCKER",
    "ROOT",
    "compose_services",
    "dashboard_queries",
    "program",
    "rules",
    "validator",
]

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
COMPOSE_GO = "github.com/compose-spec/compose-go/v2/cmd@v2.16.2"


def program(name: str) -> str:
    """Return a program's path; without it skip, or fail where CI should have had it."""
    if found := shutil.which(name):
        return found
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI has no {name}: apt-get install prometheus")
    pytest.skip(f"needs {name}, which Debian's package prometheus has")


def validator() -> Path:
    """Return compose-go's checker, built once; skip without Go, or where it cannot be fetched.

    In CI only a Go that is there and fails is a failure: no other part of the project needs Go.
    """
    binary = ROOT / "build" / "compose-go" / "cmd"
    if binary.exists():
        return binary
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if go is None:
        pytest.skip("needs Go to build compose-go with, and none is in build/compose-go")
    part = binary.parent.with_suffix(".part")
    part.mkdir(parents=True, exist_ok=True)
    with (part / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs at once build once
        done = subprocess.run(
            [go, "install", COMPOSE_GO],
            env={**os.environ, "GOBIN": str(part)},
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            binary.parent.mkdir(exist_ok=True)
            (part / "cmd").replace(binary)
            return binary
    if os.environ.get("CI") == "true":
        pytest.fail(f"compose-go does not build: {done.stderr}")
    pytest.skip(f"compose-go cannot be built here: {done.stderr[-300:]}")


def compose_services(file: str = "compose.yaml") -> dict[str, dict[str, Any]]:
    """Return a compose file's services, every variable at its default."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (DOCKER / file).read_text())
    services: dict[str, dict[str, Any]] = yaml.safe_load(text)["services"]
    return services


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """Yield (panel's title, expression) of the committed dashboard."""
    board = json.loads((DOCKER / "grafana" / "dashboards" / "streaminfer.json").read_text())
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def rules() -> list[dict[str, Any]]:
    """Return every recording and alert rule."""
    groups = yaml.safe_load((DOCKER / "prometheus" / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]
