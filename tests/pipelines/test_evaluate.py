"""`tcan evaluate`: metrics and control metrics of synthetic results with known values."""

import csv
from pathlib import Path

import numpy as np
import pytest

from pipelines.config.parser import load_config
from pipelines.evaluate import (
    Evaluated,
    _local_video,
    _write_csv,
    compute_metrics,
    compute_network_metrics,
    contact_sheet,
    evaluate,
    means,
    reconstruct,
    write_comparison,
)
from pipelines.inference import load_pipeline
from pipelines.metrics_table import protocol_lines, table, unavailable_lines
from pipelines.protocol import at_protocol_size, check_videos, published
from pipelines.puppets.world import sample_clip, write_clip
from pipelines.staging import upload
from tcan.errors import UserError
from tcan.metrics.networks import load_networks
from tcan.metrics.region_labels import REGIONS, write_regions
from tcan.pose import draw_poses, write_poses
from tcan.pose.skeleton import JOINTS
from tcan.video import read_video
from tcan.weights import MINI_MODEL
from tests.tcan.metrics import network_files


def perfect_result(seed: int, num_frames: int = 6) -> Evaluated:
    """Puppet video whose result equals its ground truth."""
    clip = sample_clip("dance", seed, num_frames, every=6)
    poses = clip.keypoints
    drawn = draw_poses(poses, 128, 128, 2)
    return Evaluated(
        Path(f"{seed}.mp4"), 4.0, clip.frames, poses, drawn, clip.frames.copy(), poses.copy(), poses.copy()
    )


@pytest.fixture(scope="module")
def videos() -> list[Evaluated]:
    videos = [perfect_result(seed) for seed in (1, 2, 3)]
    compute_metrics(videos)
    return videos


def test_perfect_results_have_ideal_metrics_and_worse_controls(videos: list[Evaluated]) -> None:
    for video in videos:
        metrics = video.metrics
        assert (metrics["l1"], metrics["psnr"], metrics["ssim"]) == (0, np.inf, pytest.approx(1, abs=1e-4))
        assert metrics["pose_5"] == metrics["pose_5_wrists"] == metrics["pose_5_true"] == 1
        assert metrics["psnr_uint8_overflow"] == 100 and metrics["psnr_uint8_overflow_still"] < 40
        assert metrics["flicker"] == metrics["flicker_source"]
        assert 0 < metrics["warping_error"] == metrics["warping_error_source"]
        assert np.isfinite(metrics["psnr_still"]) and metrics["l1_still"] > 0
        assert metrics["pose_5_other"] < 0.6 and metrics["pose_5_mean_pose"] < 0.6
        assert metrics["colour_distance"] < metrics["colour_distance_other"]
        assert metrics["identified_chance"] == pytest.approx(1 / 3)
    assert np.mean([video.metrics["identified"] for video in videos]) > 0.9


def test_static_result_has_no_flicker_and_low_pose_score() -> None:
    videos = [perfect_result(seed) for seed in (1, 2)]
    for video in videos:
        video.result = np.repeat(video.truth[:1], len(video.truth), axis=0)
        video.found = np.repeat(video.poses[:1], len(video.poses), axis=0)
    compute_metrics(videos)
    for video in videos:
        assert video.metrics["flicker"] == 0 or np.isnan(video.metrics["flicker"])
        assert video.metrics["warping_error"] == 0 < video.metrics["warping_error_source"]
        assert video.metrics["pose_5"] < 0.7


def test_table_contains_warping_error_with_source_but_no_overflowing_psnr(videos: list[Evaluated]) -> None:
    lines = table(means([video.metrics for video in videos])).splitlines()
    assert [line for line in lines if line.startswith("warping error") and "source" in line]
    assert len([line for line in lines if "PSNR" in line]) == 1


def test_single_video_has_nan_cross_video_controls() -> None:
    video = perfect_result(1)
    compute_metrics([video])
    assert np.isnan(video.metrics["pose_5_other"]) and np.isnan(video.metrics["colour_distance_other"])
    assert "another" not in table(means([video.metrics]))


def test_means_ignore_missing_and_nan_metrics() -> None:
    assert means([{"a": 1.0, "b": float("nan")}, {"a": 3.0, "b": 2.0, "c": 5.0}]) == {"a": 2, "b": 2, "c": 5}


def test_csv_contact_sheet_and_comparison_have_expected_contents(
    videos: list[Evaluated], tmp_path: Path
) -> None:
    _write_csv(videos, tmp_path / "videos.csv")
    with open(tmp_path / "videos.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["pose_5"]) for row in rows] == [1, 1, 1]
    assert contact_sheet(videos).shape == (3 * 128, 13 * 128, 3)
    write_comparison(videos[0], tmp_path / "one.mp4")
    assert read_video(tmp_path / "one.mp4")[0].shape == (6, 128, 4 * 128, 3)


def test_invalid_video_sources_raise_user_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for videos, reason in ((tmp_path / "empty", "no videos"), (tmp_path / "missing", "no such")):
        with pytest.raises(UserError, match=reason):
            evaluate(videos, tmp_path / "model", tmp_path / "out", load_config())
    assert not (tmp_path / "out").exists()


def test_network_metrics_are_ideal_for_perfect_results_and_have_controls(tmp_path: Path) -> None:
    network_files.write_torchvision_trunk(tmp_path / "alex.pth", "alex")
    network_files.write_i3d(tmp_path / "i3d.pt")
    network_files.write_clip(tmp_path / "clip")
    network_files.write_face(tmp_path / "face.onnx")
    files = {"alexnet": "alex.pth", "i3d": "i3d.pt", "image": "clip", "face": "face.onnx"}
    networks = load_networks({name: str(tmp_path / file) for name, file in files.items()})
    videos = [perfect_result(seed, 17) for seed in (1, 2)]
    videos[1].found[3:5, JOINTS.index("left_eye"), 2] = 0
    videos[1].poses[10, JOINTS.index("nose"), 2] = 0
    sets = compute_network_metrics(videos, networks)
    # Two windows of 16 frames in each video; faces in both videos, except in three frames.
    assert sets.samples == {"fvd": 4, "face_similarity": 31}
    assert sets.values["fvd"] == pytest.approx(0, abs=1e-6) and sets.values["fvd_still"] > 0
    assert sets.unavailable.keys() == {"lpips_vgg", "lpips_vgg_disco", "fid", "fid_vid"}
    for video in videos:
        metrics = video.metrics
        assert metrics["lpips_alex"] == 0 < metrics["lpips_alex_still"]
        # The frames are the true ones, and the first is the reference.
        expected = (1 + 16 * metrics["image_similarity_source"]) / 17
        assert metrics["image_similarity"] == pytest.approx(expected, abs=1e-6)
        expected = 1 + (metrics["face_frames"] - 1) * metrics["face_similarity_source"]
        assert metrics["face_similarity"] * metrics["face_frames"] == pytest.approx(expected, abs=1e-6)
        assert metrics["face_similarity_other"] < metrics["face_similarity"] < 1
        assert "lpips_vgg" not in metrics
    assert [video.metrics["face_frames"] for video in videos] == [17, 14]
    rows = table(means([video.metrics for video in videos]) | sets.values)
    assert "LPIPS (AlexNet)" in rows and "FVD" in rows and "FID" not in rows
    assert "face similarity to the reference" in rows and "15.5" in rows  # frames per video

    still = perfect_result(1, 3)
    still.truth = np.repeat(still.truth[:1], 3, axis=0)
    other = perfect_result(2, 3)
    still.result, other.result = still.truth.copy(), np.repeat(still.truth[:1], 3, axis=0)
    compute_network_metrics([still, other], networks)
    # Each frame equals the reference of `still`, which is the other reference of `other`.
    assert still.metrics["image_similarity"] == pytest.approx(1, abs=1e-6)
    assert other.metrics["image_similarity_other"] == pytest.approx(1, abs=1e-6)
    assert other.metrics["image_similarity"] == pytest.approx(
        still.metrics["image_similarity_other"], abs=1e-6
    )

    single = compute_network_metrics([perfect_result(1, 16)], networks)
    assert "fvd" not in single.values and "fewer than 2 samples of 16 frame(s)" in single.unavailable["fvd"]


def test_unavailable_metrics_are_listed_with_their_reason() -> None:
    files = {"i3d": "missing.pt", "vgg16": None}
    networks = load_networks(files, prefix="evaluate.networks.")
    expected = "unavailable: fvd (evaluate.networks.i3d = missing.pt: no such file or folder)"
    assert unavailable_lines(networks.unavailable, files) == expected  # the others are not configured


def test_wrong_network_file_is_an_error_before_the_evaluation_starts(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "fid.pth").write_text("not weights")
    config = load_config(
        "--evaluate.networks.inception", f"{tmp_path}/fid.pth", "--tracking.folder", f"{tmp_path}/runs"
    )
    with pytest.raises(UserError, match=r"fid\.pth: not torch-fidelity's .*: unreadable"):
        evaluate(tmp_path, tmp_path / "model", tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_joints_of_results_are_found_by_the_configured_detector(tmp_path: Path) -> None:
    clip = sample_clip("dance", 0, 2)
    write_clip(clip, tmp_path / "a")
    config = load_config(
        "--evaluate.frames", "2", "--animate.steps", "1", "--evaluate.detector", str(tmp_path)
    )
    wanted = clip.keypoints + np.array([5, 0, 0], np.float32)

    class Shifted:
        def detect(self, frames: np.ndarray) -> list[np.ndarray]:
            return list(wanted[:, None])

    pipe = load_pipeline(MINI_MODEL, config)
    video = reconstruct(pipe, Shifted(), tmp_path / "a.mp4", config)  # type: ignore[arg-type]
    np.testing.assert_array_equal(video.found, wanted)
    # Driven by the poses of the model's detector.
    assert np.median(np.abs(video.poses - clip.keypoints)[..., :2]) < 2
    with pytest.raises(UserError, match=r"body_pose_model\.pth"):
        evaluate(tmp_path, MINI_MODEL, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_videos_with_labels_have_the_psnr_of_their_regions(tmp_path: Path) -> None:
    """Also at another size than the model's. Without a file of labels, the metrics do not exist."""
    write_clip(sample_clip("dance", 3, 3, 192, every=6, regions=True), tmp_path / "a")
    write_clip(sample_clip("dance", 3, 3, 192, every=6), tmp_path / "b")
    config = load_config("--evaluate.frames", "2", "--animate.steps", "1")
    pipe = load_pipeline(MINI_MODEL, config)
    videos = [reconstruct(pipe, pipe.pose_detector, tmp_path / f"{name}.mp4", config) for name in "ab"]
    compute_metrics(videos)
    labelled, unlabelled = (video.metrics for video in videos)
    assert videos[0].regions is not None and videos[0].regions.shape == (2, 128, 128)
    names = ("psnr_face_true", "psnr_hands_true", "psnr_hair_ears_true")
    keys = {f"{name}{suffix}" for name in names for suffix in ("", "_still")}
    assert labelled.keys() - unlabelled.keys() == keys
    assert all(5 < labelled[key] < 50 for key in keys)
    rows = table(means([labelled, unlabelled])).splitlines()
    assert len([row for row in rows if "pixels of" in row and "first frame, still" in row]) == 3
    assert not [row for row in table(unlabelled).splitlines() if "pixels of" in row]

    videos[0].result = videos[0].truth.copy()
    videos[0].result[videos[0].regions == 1 + REGIONS.index("hair_ears")] //= 2
    compute_metrics(videos[:1])
    assert videos[0].metrics["psnr_face_true"] == videos[0].metrics["psnr_hands_true"] == np.inf
    assert np.isfinite(videos[0].metrics["psnr_hair_ears_true"])


def test_poses_and_labels_of_fewer_frames_than_the_video_are_user_errors(tmp_path: Path) -> None:
    clip = sample_clip("dance", 3, 3, 128, regions=True)
    write_clip(clip, tmp_path / "a")
    assert clip.regions is not None
    config = load_config("--animate.steps", "1")
    pipe = load_pipeline(MINI_MODEL, config)
    write_regions(clip.regions[:2], tmp_path / "a.regions.npz")
    with pytest.raises(UserError, match=r"a\.regions\.npz: 2 frames, but 3 of the video"):
        reconstruct(pipe, pipe.pose_detector, tmp_path / "a.mp4", config)
    write_poses(clip.keypoints[:2], tmp_path / "a.json", 128, 128)
    with pytest.raises(UserError, match=r"a\.json: 2 frames, but 3 of the video"):
        reconstruct(pipe, pipe.pose_detector, tmp_path / "a.mp4", config)


def test_poses_and_labels_of_videos_in_buckets_are_downloaded(any_bucket: str, tmp_path: Path) -> None:
    (tmp_path / "held-out").mkdir()
    write_clip(sample_clip("dance", 3, 2, 64, regions=True), tmp_path / "held-out" / "a")
    upload(tmp_path / "held-out", f"{any_bucket}/held-out")
    path = _local_video(f"{any_bucket}/held-out/a.mp4")
    assert sorted(file.name for file in path.parent.iterdir()) == ["a.json", "a.mp4", "a.regions.npz"]


def test_protocol_rejects_training_videos_of_tiktok() -> None:
    check_videos(["TiktokDance_00335.mp4", "00340.mp4", "TiktokDance_203_006_1x1.mp4", "0012.mp4"])
    for name in ("TiktokDance_00001.mp4", "s3://corpus/00334.mp4"):
        with pytest.raises(UserError, match="in the training split"):
            check_videos([name])


def test_protocol_crops_the_central_square() -> None:
    frames = np.zeros((2, 512, 256, 3), np.uint8)
    frames[:, 128:384] = 200
    assert (at_protocol_size(frames) == 200).all() and at_protocol_size(frames).shape == (2, 256, 256, 3)


def test_published_metrics_are_averages_over_frames_in_the_published_conventions() -> None:
    videos = [perfect_result(1, 4), perfect_result(2, 12)]
    for video in videos:
        video.scored = at_protocol_size(video.result[::-1]), at_protocol_size(video.truth)
    compute_metrics(videos)
    report = published(
        [video.metrics for video in videos], [4, 12], {"fid": 3.0, "fvd": 9.0, "fid_still": 1.0}
    )
    result, truth = (np.concatenate([video.scored[i] for video in videos]).astype(float) for i in (0, 1))
    assert report["metrics"]["l1_disco"] == pytest.approx(np.abs(result - truth).mean() / 256**2)
    assert report["metrics"].keys() == {"l1_disco", "ssim_disco", "psnr_uint8_overflow", "fid"}
    assert "not comparable: 2 of 10 videos" in protocol_lines(report)
