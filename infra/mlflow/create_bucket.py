"""Create the bucket of the artifacts if it does not exist: `create_bucket.py BUCKET`.

The endpoint is MLFLOW_S3_ENDPOINT_URL; credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
"""

import os
import sys

import boto3


def create_bucket(name: str) -> bool:
    """Returns whether the bucket is new."""
    client = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
    if name in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
        return False
    client.create_bucket(Bucket=name)
    return True


if __name__ == "__main__":
    print(f"{sys.argv[1]}: {'created' if create_bucket(sys.argv[1]) else 'exists'}", flush=True)
