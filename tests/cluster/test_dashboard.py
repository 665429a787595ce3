"""The Grafana dashboard draws exactly the metrics that the code registers."""

from __future__ import annotations

import json
import re
from pathlib import Path

from fae.pipelines.runtime.metrics import METRICS
from fae.pipelines.storage import retry_metrics

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana-dashboard.json"
EVERY_METRIC = METRICS | {
    retry_metrics.NAME: ("counter", retry_metrics.DESCRIPTION, retry_metrics.LABELS)
}
ENDINGS = {"counter": ("_total",), "histogram": ("_sum", "_count", "_bucket")}


def test_the_dashboard_draws_every_metric_of_the_code_and_no_other():
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    drawn = {name for text in expressions for name in re.findall(r"\bray_\w+", text)}
    exported = {
        f"ray_{name}{ending}"
        for name, (kind, _, _) in EVERY_METRIC.items()
        for ending in ENDINGS[kind]
    }
    assert drawn == exported


def test_the_dashboard_groups_by_labels_that_the_metrics_have():
    labels = {label for _, _, labels in EVERY_METRIC.values() for label in labels}
    text = DASHBOARD.read_text()
    grouped = {
        word.strip() for found in re.findall(r"by \(([^)]*)\)", text) for word in found.split(",")
    }
    # WorkerId is Ray's own, le Prometheus' own.
    assert grouped - {"WorkerId", "le"} == labels
