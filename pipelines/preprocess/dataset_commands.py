"""`tcan dataset info|rejected|verify|preview DATASET`: statistics, rejections, integrity check and preview of a dataset."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.config import Config
from pipelines.dataset import (
    CLIPS_FOLDER,
    IDENTITY_KEY,
    REJECTED_SCHEMA,
    check_clip_files,
    clip_files,
    clip_schema,
    clip_sizes,
    decode_row,
    file_name,
    read_info,
    rejected_files,
)
from pipelines.dataset_index import READ_THREADS, index_problems, read_index
from pipelines.preprocess.assembly import assign_split
from pipelines.preprocess.shards import read_contents
from tcan.crop import Size
from tcan.errors import UserError

MAX_PRINTED = 20  # problems


def print_info(dataset: str) -> None:
    """Print counts, duration, buckets, rejection reasons and settings.

    Raises:
        UserError: the dataset is missing or incomplete.
    """
    info, folder = _read_complete(dataset)
    contents = read_contents(folder, info["identity"])
    index = read_index(folder)
    splits = Counter(index.group_by(["video_id", "split"]).aggregate([])["split"].to_pylist())
    seconds = float(np.sum(index["num_frames"].to_numpy() / index["fps"].to_numpy()))
    counts = contents.counts
    print(
        f"{dataset}: {counts['videos']} videos ({splits['train']} train, {splits['validation']} validation) in "
        f"{counts['clips']} clips, {counts['frames']} frames, {seconds / 60:.1f} minutes"
    )
    print(
        f"{counts['rejected']} of {counts['sources']} sources rejected, {counts['duplicates']} duplicates; "
        f"{len(contents.files)} files"
    )
    if info.get("buckets"):
        print("\n".join(_bucket_lines(index, clip_sizes(info))))
    for reason, count in contents.histogram().items():
        print(f"  {count:6d}  {reason}")
    settings = {"people": "main"} | info["identity"] | {"mlflow_run_id": info["mlflow_run_id"]}
    print(", ".join(f"{name} {value}" for name, value in settings.items()))


def _bucket_lines(index: pa.Table, buckets: list[Size]) -> list[str]:
    """One line per bucket."""
    videos = index.group_by(["video_id", "height", "width"]).aggregate([("num_frames", "sum")]).to_pylist()
    lines = []
    for height, width in buckets:
        frames = [row["num_frames_sum"] for row in videos if (row["height"], row["width"]) == (height, width)]
        lines.append(f"  {height:>4}x{width:<4}  {len(frames)} videos, {sum(frames)} frames")
    return lines


def print_rejected(dataset: str) -> None:
    """Print one line per source without clips: path, step and reason, separated by tabs.

    Raises:
        UserError: the dataset is missing or incomplete.
    """
    info, folder = _read_complete(dataset)
    rejected = read_contents(folder, info["identity"]).rejected
    for (source, _), (step, reason) in sorted(rejected.items(), key=lambda item: item[0][0]):
        print(source, step, reason, sep="\t")


def _read_complete(dataset: str) -> tuple[dict[str, Any], str]:
    """Return the content of dataset.json and the absolute folder of the dataset.

    Raises:
        UserError: the dataset is missing or unfinished, or its files differ from its list.
    """
    info, folder = read_info(dataset), storage.absolute(dataset)
    check_clip_files(dataset, info)
    return info, folder


def _files(folder: str) -> set[str]:
    return {name[len(folder) + 1 :] for name in [*clip_files(folder), *rejected_files(folder)]}


def verify(dataset: str) -> None:
    """Read the complete dataset. Check digest, identity and schema of every file; shapes, values and ids of every row; counts.

    Raises:
        UserError: the dataset is missing or unfinished, or has defects; the defects are printed.
    """
    info = read_info(dataset)
    folder = storage.absolute(dataset)
    existing = _files(folder)
    problems = [f"{name}: missing" for name in sorted(info["files"].keys() - existing)]
    problems += [f"{name}: not listed in dataset.json" for name in sorted(existing - info["files"].keys())]
    videos: dict[str, list[tuple[int, int, str]]] = {}  # video_id -> (start, frames, file)
    names = sorted(existing & info["files"].keys())
    with ThreadPoolExecutor(READ_THREADS) as pool:
        matches = pool.map(lambda name: _digest_matches(folder, name), names)
        for name, digest_matches in zip(names, matches, strict=True):
            if not digest_matches:
                problems.append(f"{name}: digest mismatch: the file was changed after it was written")
                continue
            with storage.open_parquet(f"{folder}/{name}") as file:
                problems += [f"{name}: {problem}" for problem in _file_problems(file, name, info, videos)]
    problems += _video_problems(videos)
    counts = {
        "videos": len(videos),
        "clips": sum(map(len, videos.values())),
        "frames": sum(frames for clips in videos.values() for _, frames, _ in clips),
    }
    if not problems:  # other problems also change the counts
        problems = [
            f"dataset.json: {info['counts'][key]} {key} listed, the files contain {value}"
            for key, value in counts.items()
            if info["counts"][key] != value
        ]
    if not problems:
        clips = {name for name in names if name.startswith(f"{CLIPS_FOLDER}/")}
        problems += index_problems(folder, read_index(folder), clips)
    for problem in problems[:MAX_PRINTED]:
        print(problem)
    if problems:
        raise UserError(
            f"{dataset}: {len(problems)} problems found, the first: {problems[0]}; delete the listed files that still exist, "
            "then rerun the same tcan preprocess command"
        )
    print(f"{dataset}: verified: {len(names)} files, {counts['videos']} videos, {counts['clips']} clips")


def _digest_matches(folder: str, name: str) -> bool:
    part = name.partition("/")[0]
    with storage.open_file(f"{folder}/{name}") as file:
        return name == f"{part}/{file_name(part, file)}"


def _file_problems(
    file: pq.ParquetFile, name: str, info: dict[str, Any], videos: dict[str, list[tuple[int, int, str]]]
) -> Iterator[str]:
    part = name.partition("/")[0]
    schema = clip_schema(info["identity"]) if part == CLIPS_FOLDER else REJECTED_SCHEMA
    if not file.schema_arrow.remove_metadata().equals(schema):
        yield "schema mismatch"
        return
    if json.loads(file.schema_arrow.metadata[IDENTITY_KEY]) != info["identity"]:
        yield "created with other settings or models than dataset.json"
    if file.metadata.num_rows != info["files"][name]:
        yield f"{file.metadata.num_rows} rows, {info['files'][name]} in dataset.json"
    if part != CLIPS_FOLDER:
        return
    for batch in file.iter_batches(batch_size=1):
        (row,) = batch.to_pylist()
        videos.setdefault(row["video_id"], []).append((row["start"], row["num_frames"], name))
        for problem in _row_problems(row, info):
            yield f"clip {row['clip_id']}: {problem}"


def _row_problems(row: dict[str, Any], info: dict[str, Any]) -> Iterator[str]:
    if row["clip_id"] != f"{row['video_id']}-{row['start']:06d}":
        yield "clip_id does not match video_id and start"
    if row["split"] != assign_split(row["video_id"], info["identity"]["validation_fraction"]):
        yield f"wrong split {row['split']}"
    if (row["height"], row["width"]) not in clip_sizes(info):
        yield f"wrong size {row['width']} x {row['height']}"
    try:
        arrays = decode_row(row)
    except ValueError as error:
        yield f"array shape does not match {row['num_frames']} frames ({error})"
        return
    if not all(np.isfinite(array).all() for array in arrays.values()):
        yield "NaN or inf values"
    counts = row["people_per_frame"]
    if len(counts) != row["num_frames"] or sum(counts) != len(arrays["people"]):
        yield "people do not match people_per_frame"
        return
    if any(len(arrays[name]) != len(arrays["people"]) for name in ("hands", "faces") if name in arrays):
        yield "hands or faces do not match the number of people"
    ends = np.cumsum(counts)
    for frame, (main, keypoints) in enumerate(zip(row["main_person"], arrays["keypoints"], strict=True)):
        found = arrays["people"][ends[frame] - counts[frame] : ends[frame]]
        expected = found[main] if 0 <= main < counts[frame] else np.zeros((18, 3))
        first, *others = keypoints.reshape(-1, 18, 3)
        if main >= counts[frame] or not np.array_equal(first, expected):
            yield f"frame {frame}: keypoints differ from those of the main person"
            return
        if not all((body == found).all(axis=(1, 2)).any() for body in others if body.any()):
            yield f"frame {frame}: keypoints of a tracked person are not among the people"
            return


def _video_problems(videos: dict[str, list[tuple[int, int, str]]]) -> Iterator[str]:
    for video, clips in videos.items():
        clips.sort()
        if any(a[0] + a[1] > b[0] for a, b in itertools.pairwise(clips)):
            yield f"video {video}: clips overlap ({', '.join(sorted({clip[2] for clip in clips}))})"


def preview(dataset: str, out: str, config: Config) -> None:
    """Write an image of random clips, chosen by `config.seed`; see `contact_sheet`.

    Raises:
        UserError: the dataset is missing or incomplete, the VAE differs from the dataset's, or `out` cannot be written.
    """
    from pipelines.preprocess.preview import contact_sheet
    from tcan.fingerprint import fingerprint
    from tcan.video import write_image
    from tcan.weights import load_part

    info, folder = _read_complete(dataset)
    vae = load_part("vae", config.pretrained.vae).requires_grad_(False).eval()
    if fingerprint(vae) != info["vae_fingerprint"]:
        raise UserError(
            f"{dataset}: the latents were created with another VAE ({info['vae_fingerprint']}) than {config.pretrained.vae}; "
            "set the dataset's VAE with --pretrained.vae or --config"
        )
    write_image(contact_sheet(folder, vae, config.train.stick_width, seed=config.seed), out)
    print(out)
