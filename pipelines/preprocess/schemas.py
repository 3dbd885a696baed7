"""Schemas of the rows that the operators of preprocessing exchange."""

import pyarrow as pa

# From decoding to the models. A row is one of:
# - a clip;
# - the end of a video (no frames): num_clips is set, and the video is complete when that number of clips has arrived; warning
#   names peculiarities of the file;
# - a rejection (no frames): step and reason are set.
DECODED_SCHEMA = pa.schema(
    [
        ("video_id", pa.string()),
        ("source", pa.string()),
        ("num_clips", pa.int32()),
        ("warning", pa.string()),
        ("start", pa.int32()),
        ("num_frames", pa.int32()),
        ("fps", pa.float32()),
        ("height", pa.int32()),  # frame size in pixels
        ("width", pa.int32()),
        ("canvas", pa.list_(pa.int32())),  # height and width to which the frames are cropped
        ("crop", pa.list_(pa.float32())),  # x0, y0, x1, y1 of the frames in source pixels
        ("frames", pa.large_binary()),  # uint8 RGB [num_frames, height, width, 3]
        ("step", pa.string()),
        ("reason", pa.string()),
    ]
)

# From the models to the shards: DECODED_SCHEMA with poses and latents in place of the frames.
ENCODED_SCHEMA = pa.schema(
    [
        ("video_id", pa.string()),
        ("source", pa.string()),
        ("num_clips", pa.int32()),
        ("warning", pa.string()),
        ("start", pa.int32()),
        ("num_frames", pa.int32()),
        ("fps", pa.float32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("canvas", pa.list_(pa.int32())),
        ("crop", pa.list_(pa.float32())),
        ("people_per_frame", pa.list_(pa.int32())),
        ("people", pa.large_binary()),  # float32 [sum(people_per_frame), 18, 3]
        ("hands", pa.large_binary()),  # float32 [sum(people_per_frame), 2, 21, 3]; null if disabled
        ("faces", pa.large_binary()),  # float32 [sum(people_per_frame), 70, 3]; null if disabled
        ("latent_mean", pa.large_binary()),  # float16 [F, 4, h, w]
        ("latent_logvar", pa.large_binary()),
        ("step", pa.string()),
        ("reason", pa.string()),
    ]
)
