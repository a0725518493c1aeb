"""A real S3 server for the tests: SeaweedFS, on loopback, with a directory and ports of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

ACCESS_KEY, SECRET_KEY = "testing", "testing-secret"
READER = {"AWS_ACCESS_KEY_ID": "reading", "AWS_SECRET_ACCESS_KEY": "reading-secret"}  # who may read, and not write
BUCKET = "wmtp"
FIRST_PORT, LAST_PORT = 20_000, 29_999


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on, from a bounded range, which no outgoing connection takes."""
    found: list[int] = []
    start = FIRST_PORT + os.getpid() * 37 % (LAST_PORT - FIRST_PORT)
    for offset in range(LAST_PORT - FIRST_PORT):
        port = FIRST_PORT + (start - FIRST_PORT + offset) % (LAST_PORT - FIRST_PORT)
        with closing(socket.socket()) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"fewer than {count} free ports in {FIRST_PORT}-{LAST_PORT}")


def environment(port: int) -> dict[str, str]:
    """What boto3 reads to find the server and sign in; nothing of the user's own."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


class Server:
    """SeaweedFS as one process: master, volume, filer and S3 gateway. `stop` and `start` keep its data and ports."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._ports = free_ports(8)
        self.port = self._ports[0]
        self._process: subprocess.Popen | None = None

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.port)

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Starts it and waits until it answers."""
        self.directory.mkdir(parents=True, exist_ok=True)
        identities = self.directory / "identities.json"
        credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
        identity = {"name": "testing", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        keys = [{"accessKey": READER["AWS_ACCESS_KEY_ID"], "secretKey": READER["AWS_SECRET_ACCESS_KEY"]}]
        reader = {"name": "reading", "credentials": keys, "actions": ["Read", "List"]}
        identities.write_text(json.dumps({"identities": [identity, reader]}))
        s3, s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc = self._ports
        data = self.directory / "data"
        data.mkdir(exist_ok=True)
        self._log = (self.directory / "log").open("ab")
        self._process = subprocess.Popen(
            [
                Path(sys.executable).with_name("weed"), "server", "-s3", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
                f"-s3.port={s3}", f"-s3.port.grpc={s3_grpc}", f"-master.port={master}", f"-master.port.grpc={master_grpc}",
                f"-volume.port={volume}", f"-volume.port.grpc={volume_grpc}", f"-filer.port={filer}",
                f"-filer.port.grpc={filer_grpc}", f"-s3.config={identities}", "-s3.port.iceberg=0", "-s3.port.lance=0",
                "-master.volumeSizeLimitMB=512", "-volume.max=100", "-s3.iam=false", "-s3.autoCreateBucket=false",
            ],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, cwd=self.directory,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while True:
            try:
                client(self.port).list_buckets()
                break
            except Exception:  # whatever it is, it counts only if it lasts
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise
                time.sleep(0.1)

    def stop(self) -> None:
        """Stops it, its data kept; as a server goes away."""
        if self._process is not None:
            self._process.kill()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._log.close()
            self._process = None


def client(port: int):
    """A client of its own, apart from the code under test."""
    import boto3
    from botocore.config import Config

    return boto3.session.Session().client(
        "s3", endpoint_url=f"http://127.0.0.1:{port}", aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1", config=Config(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=30),
    )  # fmt: skip


@contextmanager
def serving(directory: Path) -> Iterator[Server]:
    """A running server with the bucket `BUCKET`."""
    server = Server(directory)
    try:
        server.start()
        deadline = time.monotonic() + 30
        while True:
            try:
                client(server.port).create_bucket(Bucket=BUCKET)
                client(server.port).put_object(Bucket=BUCKET, Key="ready", Body=b"yes")
                break
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        yield server
    finally:
        server.stop()
