"""Time to open a dataset as a training does, by the number of clips, with a synthetic index; the clip files are empty.

python -m tests.benchmarks.dataset [CLIPS]          # local
python -m tests.benchmarks.dataset CLIPS bucket     # in a bucket with a latency of 50 ms
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from moto.server import ThreadedMotoServer

from pipelines import storage
from pipelines.dataset import INFO_FILE, SCHEMA_VERSION, check_clip_files, read_info
from pipelines.dataset_index import INDEX_FILE, INDEX_SCHEMA, POSITIONED
from pipelines.train.clips import ClipStore
from pipelines.train.data import Sampler
from tests.benchmarks.delaying_proxy import delaying_proxy
from tests.benchmarks.timing import Row
from tests.counting_filesystem import counted_reads

CLIPS_PER_VIDEO = 4
CLIPS_PER_FILE = 60
LATENCY = 0.05  # seconds
OPEN = "--open"  # argument of the process that opens the dataset


def write_index(folder: Path, clips: int) -> None:
    """Index of clips of 64 frames of 512 x 512 pixels, `CLIPS_PER_VIDEO` per video, `CLIPS_PER_FILE` per file."""
    number = np.arange(clips)
    columns = {
        "video_id": [f"{i // CLIPS_PER_VIDEO * 2654435761 % 2**64:016x}" for i in range(clips)],
        "split": ["train"] * clips, "start": number % CLIPS_PER_VIDEO * 64, "num_frames": np.full(clips, 64),
        "fps": np.full(clips, 30.0), "height": np.full(clips, 512), "width": np.full(clips, 512),
        "channels": np.full(clips, 4), "tracked_people": np.ones(clips),
        "file": [f"clips/clips-{i // CLIPS_PER_FILE:032x}.parquet" for i in range(clips)],
        "row_group": number % CLIPS_PER_FILE, "row": np.zeros(clips, int), **dict.fromkeys(POSITIONED, number % CLIPS_PER_FILE * 4_200_000),
    }  # fmt: skip
    table = pa.table(columns).cast(INDEX_SCHEMA)
    table = table.sort_by([("video_id", "ascending"), ("start", "ascending")])
    pq.write_table(table, folder / INDEX_FILE, compression="zstd")


def open_dataset(name: str) -> None:
    """Choose the first video, after the checks of a training."""
    if storage.is_remote(name):  # the local benchmark has no files
        check_clip_files(name, read_info(name))
    sampler = Sampler(
        ClipStore(name), 1, seed=0, batch_size=16, size=512, vae_scaling_factor=0.18215, stick_width=4, frames=16,
        drop_reference=0.1,
    )  # fmt: skip
    sampler.video(0, 0)


def bucket(clips: int) -> list[Row]:
    """Time and requests to open a dataset in a bucket: moto behind a proxy that delays each request by `LATENCY`."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    s3 = boto3.client(
        "s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1", aws_access_key_id="test",
        aws_secret_access_key="test",
    )  # fmt: skip
    s3.create_bucket(Bucket="corpus")
    files = [f"clips/clips-{i:032x}.parquet" for i in range(-(-clips // CLIPS_PER_FILE))]
    for file in files:
        s3.put_object(Bucket="corpus", Key=f"dataset/{file}", Body=b"")
    info = {"schema_version": SCHEMA_VERSION, "files": dict.fromkeys(files, 0)}
    s3.put_object(Bucket="corpus", Key=f"dataset/{INFO_FILE}", Body=json.dumps(info).encode())
    with tempfile.TemporaryDirectory() as name:
        write_index(Path(name), clips)
        s3.upload_file(f"{name}/{INDEX_FILE}", "corpus", f"dataset/{INDEX_FILE}")
    rows = []
    for latency in (0.001, LATENCY):
        with delaying_proxy(port, latency) as proxy:
            environment = os.environ | keys | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
            command = [sys.executable, "-m", "tests.benchmarks.dataset", OPEN, "s3://corpus/dataset"]
            output = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True
            ).stdout
        what = f"opening a dataset of {clips} clips in {len(files)} files, {1000 * latency:.0f} ms for each request"
        rows.append(Row(what, f"{float(output):.1f} s", f"{proxy.requests} requests"))
    server.stop()
    return rows


def local(clips: int) -> Row:
    with tempfile.TemporaryDirectory() as name, counted_reads() as counts:
        write_index(Path(name), clips)
        began = time.perf_counter()
        open_dataset(name)
        seconds = time.perf_counter() - began
    return Row(f"{clips} clips", f"{seconds:.2f} s", f"{counts.files} file, {counts.bytes / 1e6:.1f} MB")


def main(arguments: list[str]) -> None:
    if arguments and arguments[0] == OPEN:
        began = time.perf_counter()
        open_dataset(arguments[1])
        print(time.perf_counter() - began)
        return
    clips = int(arguments[0]) if arguments else 500_000
    for row in bucket(clips) if "bucket" in arguments else [local(clips)]:
        print(f"{row.what}: {row.value}, {row.note}")


if __name__ == "__main__":
    main(sys.argv[1:])
