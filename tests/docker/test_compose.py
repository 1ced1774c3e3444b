"""`docker compose up` brings up the whole pipeline: the files are valid and fit the rest."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from streaminfer.spec.file import load
from tests.docker.tools import DOCKER, ROOT, compose_services, validator
from tests.e2e.conftest import digits_file, streaminfer

DIGITS = "stages/digits/pipeline.yaml"
STAGES = [stage.name for stage in load(ROOT / DIGITS, environ={}).stages]
WORKERS = [*STAGES, "sink"]
GPU = ("compose.yaml", "compose.gpu.yaml")


@pytest.mark.parametrize("files", [("compose.yaml",), GPU])
def test_compose_accepts_the_files(files: tuple[str, ...]) -> None:
    services = resolved(files)
    assert set(services) == {"kafka", "plan", "topics", "prometheus", "grafana", *WORKERS}


def test_a_misspelt_key_would_be_found(tmp_path: Path) -> None:
    file = tmp_path / "compose.yaml"
    file.write_text((DOCKER / "compose.yaml").read_text().replace("read_only:", "readonly:"))
    assert subprocess.run([validator(), file], capture_output=True).returncode != 0


def test_the_gpu_file_gives_each_stage_one_gpu_and_nobody_else() -> None:
    services = resolved(GPU)
    for name in WORKERS:
        deploy = services[name].get("deploy", {})
        devices = deploy.get("resources", {}).get("reservations", {}).get("devices", [])
        wanted = {"driver": "nvidia", "device_ids": ["0"], "capabilities": ["gpu"]}
        assert devices == ([] if name == "sink" else [wanted])
        assert services[name]["build"]["target"] == "gpu"


def test_the_gpu_file_moves_every_stage_to_its_gpu() -> None:
    for name in STAGES:
        environment = compose_services("compose.gpu.yaml")[name]["environment"]
        spec = load(ROOT / DIGITS, environ=environment)
        assert spec.stage(name).device == "cuda:0"


def test_there_is_a_worker_for_every_stage_and_the_sink() -> None:
    """A stage without a container: records pile up and nobody answers."""
    services = compose_services()
    ran = {name: service["command"] for name, service in services.items() if "command" in service}
    for name in STAGES:
        assert ran[name][:4] == ["worker", DIGITS, "--stage", name]
    assert ran["sink"][:3] == ["worker", DIGITS, "--sink"]
    assert set(ran) == {"plan", "topics", *WORKERS}


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_is_confined_and_may_drain(name: str) -> None:
    """Without init or the grace period SIGTERM kills it in the midst of a batch."""
    service = compose_services()[name]
    assert service["init"] is True
    assert service["stop_grace_period"] == "60s"
    assert service["read_only"] is True
    assert service["tmpfs"] == ["/tmp"]  # noqa: S108 - of a container
    assert service["depends_on"] == {
        "kafka": {"condition": "service_healthy"},
        "topics": {"condition": "service_completed_successfully"},
    }


def test_the_plan_is_there_before_the_topics() -> None:
    needs = compose_services()["topics"]["depends_on"]
    assert needs["plan"] == {"condition": "service_completed_successfully"}
    assert needs["kafka"] == {"condition": "service_healthy"}


def test_images_are_pinned_and_ports_are_local() -> None:
    """An image that moves breaks a deployment that nobody changed; an open port is everybody's."""
    for name, service in compose_services().items():
        if "build" not in service:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name


def test_prometheus_finds_every_worker_and_grafana_every_file() -> None:
    services = compose_services()
    (job,) = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())[
        "scrape_configs"
    ]
    (lookup,) = job["dns_sd_configs"]
    assert lookup["names"] == WORKERS
    assert f"EXPOSE {lookup['port']}" in (DOCKER / "Dockerfile").read_text()

    provisioning = DOCKER / "grafana" / "provisioning"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "streaminfer.yaml").read_text())[
        "providers"
    ]
    folder = provider["options"]["path"]
    assert f"./grafana/dashboards:{folder}:ro" in services["grafana"]["volumes"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{folder}/streaminfer.json"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    variable = source["url"].strip("${}")
    assert services["grafana"]["environment"][variable] == "http://prometheus:9090"


def test_mounted_folders_exist() -> None:
    for service in compose_services().values():
        for volume in service.get("volumes", ()):
            if volume.startswith("./"):
                assert (DOCKER / volume.split(":")[0]).is_dir(), volume


@pytest.mark.kafka
async def test_the_commands_of_the_containers_run(kafka_address: str, tmp_path: Path) -> None:
    """What the containers would execute, as processes: plan, topics, then every worker is ready."""
    file, services = digits_file(tmp_path), compose_services()
    image = {"STREAMINFER_METRICS__PORT": "0", "KAFKA_BOOTSTRAP_SERVERS": kafka_address}

    def command(name: str) -> list[str]:
        places = {DIGITS: str(file), "/plan/current": str(tmp_path / "plan" / "current")}
        return [places.get(word, word) for word in services[name]["command"]]

    for name in ("plan", "topics"):
        async with streaminfer(*command(name), cwd=tmp_path, **image) as run:
            assert await run.process.wait() == 0, run.text
    (tmp_path / "plan").chmod(0o555)  # the workers' mount is read-only
    async with AsyncExitStack() as stack:
        runs = [
            await stack.enter_async_context(streaminfer(*command(name), cwd=tmp_path, **image))
            for name in WORKERS
        ]
        await asyncio.gather(*[run.line("ready") for run in runs])


def resolved(files: tuple[str, ...]) -> dict[str, Any]:
    """Return the services as compose sees them; fail with its words if it refuses the files."""
    done = subprocess.run(
        [validator(), "-format", "json", *(DOCKER / name for name in files)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    services: dict[str, Any] = json.loads(done.stdout)["services"]
    return services
