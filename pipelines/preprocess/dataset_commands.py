"""`tcan dataset info|rejected|verify|preview DATASET`: what a clip dataset holds, whether it is whole, and how it looks."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.config import Config
from pipelines.dataset import (
    CLIPS_FOLDER,
    IDENTITY_KEY,
    REJECTED_SCHEMA,
    clip_files,
    clip_schema,
    decode_row,
    file_name,
    read_info,
    rejected_files,
)
from pipelines.preprocess.shards import FILES_AT_ONCE, read_contents, split_of
from tcan.errors import UserError

SHOWN = 20  # problems printed, of however many


def print_info(dataset: str) -> None:
    """Counts, settings, lengths and the reasons of rejections.

    Raises:
        UserError: no whole dataset there.
    """
    info, folder = _whole(dataset)
    contents = read_contents(folder, info["identity"])
    splits: Counter[str] = Counter()
    videos: set[str] = set()
    seconds = 0.0
    for name in clip_files(folder):
        with storage.open_parquet(name) as file:
            for row in file.read(["video_id", "split", "num_frames", "fps"]).to_pylist():
                seconds += row["num_frames"] / row["fps"]
                splits[row["split"]] += row["video_id"] not in videos
                videos.add(row["video_id"])
    counts = contents.counts
    print(
        f"{dataset}: {counts['videos']} videos ({splits['train']} train, {splits['validation']} validation) in "
        f"{counts['clips']} clips, {counts['frames']} frames, {seconds / 60:.1f} minutes"
    )
    print(
        f"of {counts['sources']} sources {counts['rejected']} rejected, {counts['duplicates']} duplicates; "
        f"{len(contents.files)} files"
    )
    for reason, count in contents.histogram().items():
        print(f"  {count:6d}  {reason}")
    settings = info["identity"] | {"mlflow_run_id": info["mlflow_run_id"]}
    print(", ".join(f"{name} {value}" for name, value in settings.items()))


def print_rejected(dataset: str) -> None:
    """A line for each source that gave no clips: where it lies, the stage and the reason, with tabs between them.

    Raises:
        UserError: no whole dataset there.
    """
    info, folder = _whole(dataset)
    rejected = read_contents(folder, info["identity"]).rejected
    for (source, _), (stage, reason) in sorted(rejected.items(), key=lambda item: item[0][0]):
        print(source, stage, reason, sep="\t")


def _whole(dataset: str) -> tuple[dict[str, Any], str]:
    """What dataset.json says, and the dataset's folder.

    Raises:
        UserError: no finished dataset there, or files of it are missing.
    """
    info, folder = read_info(dataset), storage.absolute(dataset)
    if missing := sorted(info["files"].keys() - _files(folder)):
        raise UserError(
            f"{dataset}: {len(missing)} of its files are missing, such as {missing[0]}; put them back, or run the same tcan "
            "preprocess again"
        )
    return info, folder


def _files(folder: str) -> set[str]:
    return {name[len(folder) + 1 :] for name in [*clip_files(folder), *rejected_files(folder)]}


def verify(dataset: str) -> None:
    """Reads all of the dataset and checks every file's digest, identity and schema, every row's shapes, values and ids,
    and the counts.

    Raises:
        UserError: no finished dataset there, or one with faults, which are printed.
    """
    info = read_info(dataset)
    folder = storage.absolute(dataset)
    there = _files(folder)
    problems = [f"{name}: missing" for name in sorted(info["files"].keys() - there)]
    problems += [f"{name}: not of this dataset" for name in sorted(there - info["files"].keys())]
    videos: dict[str, list[tuple[int, int, str]]] = {}  # video -> (start, frames, file)
    names = sorted(there & info["files"].keys())
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        right = pool.map(lambda name: _has_its_digest(folder, name), names)
        for name, has_its_digest in zip(names, right, strict=True):
            if not has_its_digest:
                problems.append(f"{name}: its bytes are not those that were written: another digest")
                continue
            with storage.open_parquet(f"{folder}/{name}") as file:
                problems += [f"{name}: {problem}" for problem in _file_problems(file, name, info, videos)]
    problems += _video_problems(videos)
    damaged = bool(problems)
    counts = {
        "videos": len(videos),
        "clips": sum(map(len, videos.values())),
        "frames": sum(frames for clips in videos.values() for _, frames, _ in clips),
    }
    problems += [
        f"dataset.json: says {info['counts'][key]} {key}, the files hold {value}"
        for key, value in counts.items()
        if info["counts"][key] != value and not damaged  # else it would only follow
    ]
    for problem in problems[:SHOWN]:
        print(problem)
    if problems:
        raise UserError(
            f"{dataset}: not whole ({len(problems)} found), the first: {problems[0]}; delete the files named, where they are "
            "still there, and run the same tcan preprocess again"
        )
    print(f"{dataset}: whole: {len(names)} files, {counts['videos']} videos, {counts['clips']} clips")


def _has_its_digest(folder: str, name: str) -> bool:
    part = name.partition("/")[0]
    with storage.open_file(f"{folder}/{name}") as file:
        return name == f"{part}/{file_name(part, file)}"


def _file_problems(
    file: pq.ParquetFile, name: str, info: dict[str, Any], videos: dict[str, list[tuple[int, int, str]]]
) -> Iterator[str]:
    part = name.partition("/")[0]
    schema = clip_schema(info["identity"]) if part == CLIPS_FOLDER else REJECTED_SCHEMA
    if not file.schema_arrow.remove_metadata().equals(schema):
        yield "another schema"
        return
    if json.loads(file.schema_arrow.metadata[IDENTITY_KEY]) != info["identity"]:
        yield "made with other settings or models than dataset.json says"
    if file.metadata.num_rows != info["files"][name]:
        yield f"{file.metadata.num_rows} rows, dataset.json says {info['files'][name]}"
    if part != CLIPS_FOLDER:
        return
    for batch in file.iter_batches(batch_size=1):
        (row,) = batch.to_pylist()
        videos.setdefault(row["video_id"], []).append((row["start"], row["num_frames"], name))
        for problem in _row_problems(row, info):
            yield f"clip {row['clip_id']}: {problem}"


def _row_problems(row: dict[str, Any], info: dict[str, Any]) -> Iterator[str]:
    if row["clip_id"] != f"{row['video_id']}-{row['start']:06d}":
        yield "an id that is not its video's and start's"
    if row["split"] != split_of(row["video_id"], info["identity"]["validation_fraction"]):
        yield f"in the split {row['split']}"
    if (row["height"], row["width"]) != (info["height"], info["width"]):
        yield f"{row['width']} x {row['height']} pixels"
    try:
        arrays = decode_row(row)
    except ValueError as error:
        yield f"a shape that is not of {row['num_frames']} frames ({error})"
        return
    if not all(np.isfinite(array).all() for array in arrays.values()):
        yield "numbers that are not finite"
    counts = row["people_per_frame"]
    if len(counts) != row["num_frames"] or sum(counts) != len(arrays["people"]):
        yield "people that are not those of its frames"
        return
    if any(len(arrays[name]) != len(arrays["people"]) for name in ("hands", "faces") if name in arrays):
        yield "hands or faces that are not its people's"
    ends = np.cumsum(counts)
    for frame, (which, keypoints) in enumerate(zip(row["main_person"], arrays["keypoints"], strict=True)):
        expected = arrays["people"][ends[frame] - counts[frame] + which] if which >= 0 else np.zeros((18, 3))
        if which >= counts[frame] or not np.array_equal(keypoints, expected):
            yield f"frame {frame}: keypoints that are not the main person's"
            return


def _video_problems(videos: dict[str, list[tuple[int, int, str]]]) -> Iterator[str]:
    for video, clips in videos.items():
        clips.sort()
        if any(a[0] + a[1] > b[0] for a, b in itertools.pairwise(clips)):
            yield f"video {video}: frames that are in two clips ({', '.join(sorted({clip[2] for clip in clips}))})"


def preview(dataset: str, out: str, config: Config) -> None:
    """Writes a PNG of random clips; see `contact_sheet`. `config.seed` chooses them.

    Raises:
        UserError: no whole dataset there, the VAE is another than its latents', or `out` cannot be written.
    """
    from pipelines.preprocess.preview import contact_sheet
    from tcan.fingerprint import fingerprint
    from tcan.video import write_image
    from tcan.weights import load_part

    info, folder = _whole(dataset)
    vae = load_part("vae", config.pretrained.vae).requires_grad_(False).eval()
    if fingerprint(vae) != info["vae_fingerprint"]:
        raise UserError(
            f"{dataset}: its latents are of another VAE ({info['vae_fingerprint']}) than {config.pretrained.vae}; "
            "give its own with --pretrained.vae or --config"
        )
    write_image(contact_sheet(folder, vae, config.train.stick_width, seed=config.seed), out)
    print(out)
