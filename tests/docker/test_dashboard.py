"""What rings and what is shown: rules on their stories, a dashboard as its source says."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from types import ModuleType

from streaminfer.metrics import Metrics
from tests.docker.tools import DOCKER, dashboard_queries, program, rules


def generator() -> ModuleType:
    file = DOCKER / "grafana" / "dashboard.py"
    spec = importlib.util.spec_from_file_location("dashboard", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["dashboard"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_alerts_ring_on_their_stories_and_on_no_others() -> None:
    done = subprocess.run(
        [program("promtool"), "test", "rules", str(DOCKER / "prometheus" / "rules_test.yml")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_its_story_and_says_what_to_do() -> None:
    stories = (DOCKER / "prometheus" / "rules_test.yml").read_text()
    readme = (DOCKER / "README.md").read_text()
    for rule in rules():
        if "alert" not in rule:
            continue
        assert re.search(rf"alertname: {rule['alert']}\n", stories), f"no story: {rule['alert']}"
        assert f"\n## {rule['alert']}\n" in readme
        runbook = f"docker/README.md#{rule['alert'].lower()}"
        assert rule["annotations"]["runbook_url"] == runbook


def test_the_dashboard_is_what_panels_yaml_says() -> None:
    """A change of one without the other is not seen by anybody."""
    committed = (DOCKER / "grafana" / "dashboards" / "streaminfer.json").read_text()
    assert committed == generator().text(), "run: python docker/grafana/dashboard.py"


def test_every_metric_that_is_shown_or_rings_exists() -> None:
    metrics = Metrics("p")
    metrics.start_sink()
    metrics.window.labels("p")
    stage = metrics.stage("s")
    stage.start_worker()
    stage.start_gather(["s.0"])
    stage.lag("t", 0, 0, 0.0)
    stage.share(0, 1.0)
    known = {reading.name for reading in metrics.readings()}
    expressions = [e for _, e in dashboard_queries()] + [rule["expr"] for rule in rules()]
    named = {n for e in expressions for n in re.findall(r"(?<!:)\bstreaminfer_\w+", e)}
    assert len(named) > 30
    assert not {n for n in named if n not in known}
