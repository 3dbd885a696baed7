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
STALLED = "stalled"


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


ALERTS = {
    # name: series at one sample per minute, alerts after 10 and after 25 minutes
    "no first step": ({"train_step": "0x30", "train_steps": "9x30"}, [], ["TrainingStalled"]),
    "steps": ({"train_step": "0+1x30", "train_steps": "99x30"}, [], []),
    "no second step": ({"train_step": "0 0 1x30", "train_steps": "9x30"}, [], ["TrainingStalled"]),
    "last step": ({"train_step": "9x30", "train_steps": "9x30"}, [], []),
    "no first clip": ({"preprocess_videos_to_process": "9x30"}, [], ["PreprocessingStalled"]),
    "clips of the first video": (
        {"preprocess_videos_to_process": "9x30", "preprocess_frames_total": "_x8 0+64x22"}, [], []
    ),
    "no second video": (
        {
            "preprocess_videos_to_process": "9x30",
            "preprocess_frames_total": "_ 64x30",
            "preprocess_videos_total": "_ 1x30",
        },
        [],
        ["PreprocessingStalled"],
    ),
    "last video": (
        {
            "preprocess_videos_to_process": "9x30",
            "preprocess_frames_total": "_ 64x30",
            "preprocess_videos_total": "_ 9x30",
        },
        [],
        [],
    ),
}  # fmt: skip


@pytest.mark.skipif(shutil.which("promtool") is None, reason="requires promtool (Debian package prometheus)")
def test_alerts_fire_for_stalled_jobs_only(tmp_path: Path) -> None:
    labels = {"train": {"run": "r", "stage": "1"}, "preprocess": {"dataset": "d"}}
    tests = []
    for name, (series, *expected) in ALERTS.items():
        job = next(iter(series)).partition("_")[0]
        text = ", ".join(f'{key}="{value}"' for key, value in labels[job].items())
        inputs = [{"series": f"ray_tcan_{key}{{{text}}}", "values": values} for key, values in series.items()]
        alert = {"train": "TrainingStalled", "preprocess": "PreprocessingStalled"}[job]
        summary = {"train": "r, stage 1: no step for 15 minutes", "preprocess": "d: no frame for 15 minutes"}[
            job
        ]
        fired = {
            "exp_labels": {"severity": "critical", **labels[job]},
            "exp_annotations": {"summary": summary},
        }
        checks = [
            {"eval_time": time, "alertname": alert, "exp_alerts": [fired] * len(alerts)}
            for time, alerts in zip(("10m", "25m"), expected, strict=True)
        ]
        tests.append({"name": name, "interval": "1m", "input_series": inputs, "alert_rule_test": checks})
    file = tmp_path / "tests.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "tests": tests}))
    result = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture
def exported(ray_cluster: None) -> Iterator[dict[str, set[str]]]:
    """Metrics on the endpoint of the local Ray -> their label names, collected while the test runs.

    The steps of stalled trainings are under `STALLED`.
    """
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
                    if sample.name == "ray_tcan_train_step" and sample.labels["run"] == STALLED:
                        found.setdefault(STALLED, set()).add(str(sample.value))

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
    TrainingGauges(STALLED, 1, "other id", steps=1)  # before its first step
    expected = (metric_names() - gpu_metrics()) | {STALLED}
    deadline = time.monotonic() + 60  # Ray exports every few seconds
    while not exported.keys() >= expected and time.monotonic() < deadline:
        time.sleep(1)
    assert exported.keys() >= expected, expected - exported.keys()
    assert exported[STALLED] == {"0.0"}
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
