"""Time to open a dataset, by the number of clips, with a synthetic index without clips.

python -m tests.benchmarks.dataset [CLIPS]
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.dataset_index import INDEX_FILE, INDEX_SCHEMA, POSITIONED
from pipelines.train.clips import ClipStore
from pipelines.train.data import Sampler
from tests.counting_filesystem import counted_reads

CLIPS_PER_VIDEO = 4


def write_index(folder: Path, clips: int) -> None:
    """Index of clips of 64 frames of 512 x 512 pixels, four per video, 60 per file."""
    number = np.arange(clips)
    columns = {
        "video_id": [f"{i // CLIPS_PER_VIDEO * 2654435761 % 2**64:016x}" for i in range(clips)],
        "split": ["train"] * clips, "start": number % CLIPS_PER_VIDEO * 64, "num_frames": np.full(clips, 64),
        "fps": np.full(clips, 30.0), "height": np.full(clips, 512), "width": np.full(clips, 512),
        "channels": np.full(clips, 4), "tracked_people": np.ones(clips), "file": [f"clips/clips-{i // 60:032x}.parquet" for i in range(clips)],
        "row_group": number % 60, "row": np.zeros(clips, int), **dict.fromkeys(POSITIONED, number % 60 * 4_200_000),
    }  # fmt: skip
    table = pa.table(columns).cast(INDEX_SCHEMA)
    table = table.sort_by([("video_id", "ascending"), ("start", "ascending")])
    pq.write_table(table, folder / INDEX_FILE, compression="zstd")


def main(clips: int) -> None:
    with tempfile.TemporaryDirectory() as name, counted_reads() as counts:
        write_index(Path(name), clips)
        began = time.perf_counter()
        sampler = Sampler(
            ClipStore(name), 1, seed=0, batch_size=16, size=512, vae_scaling_factor=0.18215, stick_width=4, frames=16,
            drop_reference=0.1,
        )  # fmt: skip
        sampler.video(0, 0)
        seconds = time.perf_counter() - began
    print(f"{clips} clips: {seconds:.2f} s, {counts.files} file, {counts.bytes / 1e6:.1f} MB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500_000)
