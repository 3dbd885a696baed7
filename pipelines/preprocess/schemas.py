"""The rows that flow between the stages."""

import pyarrow as pa

# What flows from decode to the models: a clip, or, without frames, the end of a video: how many clips it has (it is
# complete when so many have arrived), or the stage and the reason of its rejection.
DECODED_SCHEMA = pa.schema(
    [
        ("video_id", pa.string()),
        ("source", pa.string()),
        ("num_clips", pa.int32()),
        ("start", pa.int32()),
        ("num_frames", pa.int32()),
        ("fps", pa.float32()),
        ("height", pa.int32()),  # of the frames, pixels
        ("width", pa.int32()),
        ("crop", pa.list_(pa.float32())),  # x0, y0, x1, y1 in source pixels: what became the frames
        ("frames", pa.large_binary()),  # uint8 RGB [num_frames, height, width, 3]
        ("stage", pa.string()),
        ("reason", pa.string()),
    ]
)

# What flows from the models to the shards: DECODED_SCHEMA with the frames replaced by what was made of them.
ENCODED_SCHEMA = pa.schema(
    [
        ("video_id", pa.string()),
        ("source", pa.string()),
        ("num_clips", pa.int32()),
        ("start", pa.int32()),
        ("num_frames", pa.int32()),
        ("fps", pa.float32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("crop", pa.list_(pa.float32())),
        ("people_per_frame", pa.list_(pa.int32())),
        ("people", pa.large_binary()),  # float32 [sum, 18, 3]
        ("hands", pa.large_binary()),  # float32 [sum, 2, 21, 3]; null where they are not asked for
        ("faces", pa.large_binary()),  # float32 [sum, 70, 3]
        ("latent_mean", pa.large_binary()),  # float16 [F, 4, h, w]
        ("latent_logvar", pa.large_binary()),
        ("stage", pa.string()),
        ("reason", pa.string()),
    ]
)
