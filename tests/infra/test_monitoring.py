"""Files of infra/monitoring: every metric that they use exists on the endpoint of a Ray on which jobs of this project run."""

import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import yaml
from prometheus_client.parser import text_string_to_metric_families

from pipelines.config import Config
from pipelines.config.parser import load_config
from pipelines.gauges import TrainingGauges
from tests.pipelines.test_preprocess import write_video

FOLDER = Path(__file__).parents[2] / "infra" / "monitoring"
DASHBOARDS = sorted((FOLDER / "grafana").glob("*.json"))
RULES = FOLDER / "rules.yaml"


def expressions(dashboard: Path) -> list[str]:
    panels = json.loads(dashboard.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def all_expressions() -> list[str]:
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    return [
        *(e for dashboard in DASHBOARDS for e in expressions(dashboard)),
        *(rule["expr"] for rule in rules),
    ]


def metric_names() -> set[str]:
    return {name for expression in all_expressions() for name in re.findall(r"\bray_\w+", expression)}


def gpu_metrics() -> set[str]:
    """Metrics that Ray exports on machines with GPUs only, from its own definitions."""
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    return {f"ray_{name}" for name in METRICS_GAUGES if name.startswith(("node_gpu", "node_gram"))}


def test_dashboards_have_a_data_source_unique_ids_and_no_overlap() -> None:
    assert len(DASHBOARDS) == 2
    for dashboard in DASHBOARDS:
        content = json.loads(dashboard.read_text())
        panels = content["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels) > 5
        assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels)
        assert content["templating"]["list"][0]["name"] == "datasource"
        cells = [
            (x, y)
            for place in (panel["gridPos"] for panel in panels)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ]
        assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24


@pytest.mark.skipif(shutil.which("promtool") is None, reason="requires promtool (Debian package prometheus)")
def test_prometheus_accepts_the_configuration_and_every_expression(tmp_path: Path) -> None:
    dashboards = [{"record": "x", "expr": re.sub(r"\$\w+", ".*", e)} for e in all_expressions()]
    (tmp_path / "panels.yaml").write_text(
        yaml.safe_dump({"groups": [{"name": "panels", "rules": dashboards}]})
    )
    for arguments in (["config", FOLDER / "prometheus.yaml"], ["rules", tmp_path / "panels.yaml"]):
        result = subprocess.run(["promtool", "check", *arguments], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture
def exported(ray_cluster: None) -> Iterator[dict[str, set[str]]]:
    """Metrics on the endpoint of the local Ray -> their label names, collected while the test runs."""
    import ray

    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    found: dict[str, set[str]] = {}
    stop = threading.Event()

    def scrape() -> None:
        while not stop.wait(0.5):
            for family in text_string_to_metric_families(requests.get(url, timeout=30).text):
                for sample in family.samples:
                    found.setdefault(sample.name, set()).update(sample.labels)

    thread = threading.Thread(target=scrape)
    thread.start()
    yield found
    stop.set()
    thread.join()


@pytest.mark.slow
def test_every_metric_of_the_dashboards_and_alerts_is_exported(
    exported: dict[str, set[str]], tmp_path: Path, pretrained_folder: Path
) -> None:
    from pipelines.preprocess.job import preprocess
    from pipelines.train.job import train

    write_video(tmp_path / "videos" / "a.mp4", 20)
    (tmp_path / "videos" / "broken.mp4").write_bytes(b"no video")
    config = small_config(pretrained_folder, tmp_path)
    preprocess(str(tmp_path / "videos"), str(tmp_path / "dataset"), config)
    train(tmp_path / "dataset", tmp_path / "run", config)
    # This training has no validation clips, and the peak of a CPU is unknown.
    TrainingGauges("run", 1, "id", steps=1).set({"validation_loss": 1.0, "mfu": 0.5}, step=1)
    expected = metric_names() - gpu_metrics()
    deadline = time.monotonic() + 60  # Ray exports every few seconds
    while not exported.keys() >= expected and time.monotonic() < deadline:
        time.sleep(1)
    assert exported.keys() >= expected, expected - exported.keys()
    for expression in all_expressions():
        for name, labels in re.findall(r"\b(ray_\w+)\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)\s*(?:=|!)", labels)) <= exported.get(name, set()), expression


def small_config(pretrained: Path, folder: Path) -> Config:
    keys = {
        "size": 64, "tracking.folder": folder / "mlflow", "preprocess.min_person_fraction": 0,
        "preprocess.validation_fraction": 0, "pretrained.pose": pretrained / "pose", "train.workers": 1,
        "train.stage1.validate_every": 0, "train.stage2.validate_every": 0,
        **{f"pretrained.{part}": pretrained for part in ("vae", "unet", "controlnet", "motion_adapter", "text_encoder")},
        **{
            f"train.stage{stage}.{key}": value
            for stage in (1, 2)
            for key, value in {"steps": 1, "batch_size": 1, "micro_batch": 1, "checkpoint_every": 1, "sample_every": 0}.items()
        },
    }  # fmt: skip
    return load_config(*(f"--{key}={value}" for key, value in keys.items()))
