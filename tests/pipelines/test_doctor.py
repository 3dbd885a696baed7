"""`tcan doctor`: the mini networks pass every check; wrong networks and settings are found, each by its name."""

import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipelines import cli
from pipelines.config.parser import load_config
from pipelines.doctor import job
from pipelines.doctor.finding import Finding
from pipelines.doctor.job import LOADING, MACHINE, PROOFS, examine, examine_on_cluster, make_subject
from pipelines.doctor.sample import PHOTO, PHOTO_JOINTS, make_sample
from pipelines.doctor.subject import Subject
from tcan.pose.skeleton import JOINTS
from tcan.video import read_image, read_video
from tcan.weights import MINI_MODEL

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def subject() -> Subject:
    """The mini networks, loaded once."""
    subject = make_subject(load_config(), str(MINI_MODEL))
    assert {finding.status for finding in examine(subject, LOADING)} == {"OK"}
    return subject


def findings(subject: Subject, *names: str, **networks: Any) -> dict[str, Finding]:
    """Findings of these checks, with other networks than those of the subject."""
    changed = dataclasses.replace(subject, networks=subject.networks | networks)
    return {f.check: f for f in examine(changed, [check for check in PROOFS if check.name in names])}


def statuses(subject: Subject, *names: str, **networks: Any) -> dict[str, str]:
    return {name: finding.status for name, finding in findings(subject, *names, **networks).items()}


def random(network: nn.Module) -> Any:
    """The architecture of a network with random weights."""
    torch.manual_seed(1)  # with 0, the text encoder would be that of mini, which is not trained
    build: Any = type(network)
    return (build(network.config) if "CLIP" in build.__name__ else build.from_config(network.config)).eval()


def half_loaded(network: nn.Module) -> Any:
    """A network whose first 50 % of the weights, in the order of their names, are random."""
    broken, untrained = copy.deepcopy(network), random(network).state_dict()
    for name, weight in list(broken.state_dict().items())[: len(untrained) // 2]:
        weight.copy_(untrained[name])
    return broken


def with_pose(subject: Subject, network: nn.Module) -> Any:
    detector = copy.copy(subject.networks["pose"])
    detector.network = network
    return detector


def test_mini_networks_pass_every_proof(subject: Subject) -> None:
    names = ("vae", "unet", "scaling factor", "text_encoder", "controlnet", "pose", "motion_adapter")
    assert statuses(subject, *names) == dict.fromkeys(names, "OK")


@pytest.mark.parametrize("part", ["vae", "unet", "controlnet", "motion_adapter", "text_encoder", "pose"])
@pytest.mark.parametrize("break_network", [random, half_loaded])
def test_random_and_half_loaded_networks_are_named(
    subject: Subject, part: str, break_network: Callable[[nn.Module], Any]
) -> None:
    if part == "text_encoder" and break_network is half_loaded:
        pytest.skip("the text encoder of mini has random weights")
    network = subject.networks[part]
    broken = with_pose(subject, break_network(network.network)) if part == "pose" else break_network(network)
    found = findings(subject, part, **{part: broken})[part]
    assert found.status in ("failed", "suspicious") if part == "motion_adapter" else found.status == "failed"
    assert found.advice and found.expected


def test_random_unet_is_not_blamed_on_other_networks(subject: Subject) -> None:
    names = ("text_encoder", "scaling factor")
    found = findings(subject, *names, unet=random(subject.networks["unet"]))
    assert all(f.status == "suspicious" and "undecided, because the UNet" in f.found for f in found.values())


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_wrong_scaling_factor_is_named(subject: Subject, factor: float) -> None:
    vae = copy.deepcopy(subject.networks["vae"])
    vae.register_to_config(scaling_factor=vae.config.scaling_factor * factor)
    assert statuses(subject, "vae", "scaling factor", vae=vae) == {"vae": "OK", "scaling factor": "failed"}


def test_vae_of_another_latent_space_does_not_fit_the_unet(subject: Subject) -> None:
    """A VAE whose latent channels have another order reconstructs as well, but no UNet of the first one fits."""
    vae = copy.deepcopy(subject.networks["vae"])
    channels = vae.config.latent_channels
    order = torch.arange(channels).flip(0)
    moments = torch.cat([order, order + channels])
    with torch.no_grad():
        vae.quant_conv.weight.copy_(vae.quant_conv.weight[moments])
        vae.quant_conv.bias.copy_(vae.quant_conv.bias[moments])
        vae.post_quant_conv.weight.copy_(vae.post_quant_conv.weight[:, order])
    assert statuses(subject, "vae", "unet", vae=vae) == {"vae": "OK", "unet": "failed"}


def test_controlnet_with_the_weights_of_the_unet_is_named(subject: Subject) -> None:
    """Two files of which one was copied over the other: all shared names have the shapes that are expected."""
    controlnet, unet = copy.deepcopy(subject.networks["controlnet"]), subject.networks["unet"].state_dict()
    shared = {
        name: unet[name]
        for name, w in controlnet.state_dict().items()
        if unet.get(name, w[:0]).shape == w.shape
    }
    assert len(shared) > 100
    controlnet.load_state_dict(shared, strict=False)
    assert statuses(subject, "controlnet", controlnet=controlnet)["controlnet"] != "OK"


def test_swapped_motion_modules_are_named(subject: Subject) -> None:
    """The modules of up and down blocks of the same width are exchanged."""
    adapter = copy.deepcopy(subject.networks["motion_adapter"])
    state = adapter.state_dict()
    swapped = {}
    for name, weight in state.items():
        other = re.sub(r"down_blocks\.(\d)", lambda match: f"up_blocks.{3 - int(match[1])}", name)
        if other != name and state[other].shape == weight.shape:
            swapped |= {name: state[other].clone(), other: weight.clone()}
    assert len(swapped) > 50
    adapter.load_state_dict(swapped, strict=False)
    assert statuses(subject, "motion_adapter", motion_adapter=adapter)["motion_adapter"] != "OK"


def test_pose_network_with_another_order_of_joints_is_named(subject: Subject) -> None:
    network = copy.deepcopy(subject.networks["pose"].network)
    last = network.stage2.heatmap[-1]
    with torch.no_grad():
        last.weight[:18] = last.weight[:18].flip(0)
        last.bias[:18] = last.bias[:18].flip(0)
    assert statuses(subject, "pose", pose=with_pose(subject, network)) == {"pose": "failed"}


def test_nan_weights_fail_every_proof_that_uses_them(subject: Subject) -> None:
    unet = copy.deepcopy(subject.networks["unet"])
    unet.conv_out.bias.data.fill_(float("nan"))
    assert statuses(subject, "unet", "motion_adapter", unet=unet) == {
        "unet": "failed",
        "motion_adapter": "failed",
    }


def test_missing_files_fail_their_checks_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job, "SERVICES", ())
    monkeypatch.setattr(job, "MACHINE", ())
    monkeypatch.setattr(job, "PROOFS", [check for check in PROOFS if not check.name.startswith("training")])
    (tmp_path / "empty.safetensors").touch()
    status = cli.main(
        [
            "doctor", f"--out={tmp_path}/report", f"--pretrained.unet={tmp_path}/missing",
            f"--pretrained.controlnet={tmp_path}/empty.safetensors",
        ]
    )  # fmt: skip
    assert status == 1
    out = capsys.readouterr().out
    assert (
        f"unet: no such folder: {tmp_path}/missing" in out and "not run: unet, controlnet not loaded" in out
    )
    cells = re.findall(
        r"^\| (OK|suspicious|failed) \| ([^|]+) \|",
        (tmp_path / "report" / "report.md").read_text(),
        re.MULTILINE,
    )
    rows = {name: status for status, name in cells}
    failed = {name for name, status in rows.items() if status == "failed"}
    networks = ("unet", "controlnet", "motion_adapter", "text_encoder", "scaling factor", "animation")
    assert failed == {"load unet", "load controlnet", *networks}
    assert rows.keys() - failed == {
        "load vae", "load motion_adapter", "load text_encoder", "load scheduler", "load pose", "compatibility", "vae", "pose",
    }  # fmt: skip


def test_photograph_shows_the_labelled_person() -> None:
    """An independent detector finds the face where the labels of nose, eyes and ears are."""
    import skimage.data
    import skimage.feature

    photo = read_image(PHOTO)
    original = skimage.data.astronaut()
    assert np.abs(photo.astype(int) - original).mean() < 4
    detector = skimage.feature.Cascade(skimage.data.lbp_frontal_face_cascade_filename())
    (face,) = detector.detect_multi_scale(photo, 1.2, 1, min_size=(80, 80), max_size=(150, 150))
    left, top = face["c"], face["r"]
    for name in ("nose", "right_eye", "left_eye"):
        x, y = PHOTO_JOINTS[name]
        assert left < x < left + face["width"] and top < y < top + face["height"], (name, face)
    assert PHOTO_JOINTS["right_ear"][0] < PHOTO_JOINTS["right_eye"][0] < PHOTO_JOINTS["left_eye"][0]
    sample = make_sample(256)
    assert sample.image.shape == (256, 256, 3) and sample.motion.shape == (8, 18, 3)
    np.testing.assert_allclose(sample.keypoints[JOINTS.index("nose"), :2], np.array([221, 126]) / 2, atol=0.5)


def test_puppet_is_the_example_image() -> None:
    np.testing.assert_array_equal(make_sample(128).image, read_image(EXAMPLES / "dancer.png"))


def test_large_networks_without_a_gpu_are_reported_without_hours_of_computation() -> None:
    subject = make_subject(load_config("--config", "sd15"), None)
    subject.networks = dict.fromkeys(["vae", "unet", "text_encoder", "scheduler", "pose"])
    checks = [check for check in (*MACHINE, *PROOFS) if check.name in ("gpu", "vae", "unet", "pose")]
    found = list(examine(subject, checks))
    assert [finding.status for finding in found] == ["failed"] * 4
    assert "tcan memory --config sd15 --job animate" in found[0].advice
    assert all(finding.found == "not run: no GPU" for finding in found[1:])


@pytest.mark.slow
def test_checks_run_on_a_node_of_the_cluster(ray_cluster: None) -> None:
    checks = [check for check in MACHINE if check.name in ("python", "disk")]
    found = list(examine_on_cluster(load_config(), None, checks, num_gpus=0))
    assert [finding.check for finding in found] == ["python", "disk"]


@pytest.mark.slow
def test_doctor_of_mini_finds_nothing_and_writes_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor", "--config=mini"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for check in (*MACHINE, *job.SERVICES, *LOADING, *PROOFS):
        (line,) = [line for line in lines if line[12:].startswith(f"{check.name}  ")]
        assert line.startswith("OK") or check.name in ("memory", "disk", "shared memory"), line
    frames, _ = read_video(tmp_path / "doctor" / "animation.mp4")
    assert frames.shape == (8, 128, 128, 3)
    report = (tmp_path / "doctor" / "report.md").read_text()
    assert report.count("\n| OK | ") >= len(LOADING) + len(PROOFS) and "fingerprint" in report
