"""A real S3 server for tests: SeaweedFS, in one process, with its data in a temporary folder."""

import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.job_runner import free_ports

READY_TIMEOUT_S = 60
USERS = {"ci": ["Admin", "Read", "Write", "List", "Tagging"], "ro": ["Read", "List"], "rw": ["Read", "Write", "List"]}

# Ports that SeaweedFS would otherwise take from a fixed list, so that two test runs would meet.
PORT_FLAGS = [
    f"{part}.port{suffix}" for part in ("s3", "master", "volume", "filer", "admin") for suffix in ("", ".grpc")
]

# Ends the server when this process is gone without a word (killed, or out of memory): Linux's PR_SET_PDEATHSIG.
END_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"

ASK = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=1)"


class S3Server:
    """Start it, stop it, start it again on the same data and port; `close` ends it and removes its data."""

    def __init__(self, host: str = "127.0.0.1", within: Sequence[str] = ()) -> None:
        """Serve on an address of this machine, or of a network that only commands after `within` are in."""
        self._host, self._within = host, within
        # Not pytest's own folder: its name is too long for the address of a socket.
        self._folder = Path(tempfile.mkdtemp(prefix="s3-"))
        self._ports = free_ports(len(PORT_FLAGS))
        self._process: subprocess.Popen | None = None
        self.endpoint = f"http://{host}:{self._ports[0]}"
        (self._folder / "data").mkdir()
        identities = [
            {
                "name": user,
                "credentials": [{"accessKey": f"{user}-key", "secretKey": f"{user}-secret"}],
                "actions": actions,
            }
            for user, actions in USERS.items()
        ]
        (self._folder / "s3.json").write_text(json.dumps({"identities": identities}))

    def environment(self, user: str = "ci") -> dict[str, str]:
        """Return the variables with which `user` reaches this server: `ci` may do all, `rw` no admin, `ro` read."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": f"{user}-key",
            "AWS_SECRET_ACCESS_KEY": f"{user}-secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Start the server, unless it runs, and wait until it answers; it ends with the thread that called this.

        Raises:
            RuntimeError: it does not; with the end of its log.
        """
        if self._process is not None:
            return
        weed = Path(sys.executable).with_name("weed")
        flags = [f"-{name}={port}" for name, port in zip(PORT_FLAGS, self._ports, strict=True)]
        log = self._folder / "log.txt"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [
                    *(*self._within, sys.executable, "-c", END_WITH_PARENT),
                    *(weed, "mini", f"-dir={self._folder / 'data'}"),
                    *(f"-ip={self._host}", f"-ip.bind={self._host}", f"-s3.config={self._folder / 's3.json'}"),
                    *("-s3.autoCreateBucket=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
                    *(f"-s3.localSocket={self._folder / 's3.sock'}", f"-filer.localSocket={self._folder / 'f.sock'}"),
                    *("-master.telemetry=false", "-admin.ui=false", "-webdav=false", *flags),
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                env=os.environ | {"TMPDIR": str(self._folder), "HOME": str(self._folder)},
            )
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the S3 server does not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Kill the server, as a crash would; its data stays."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process = None
        # A flag moves two of its sockets to our folder; the others are always left here, named by their port.
        for port in self._ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)

    def close(self) -> None:
        """Stop the server and remove its data."""
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _answers(self) -> bool:
        if self._within:
            asked = [*self._within, sys.executable, "-c", ASK, f"{self.endpoint}/status"]
            return subprocess.run(asked, capture_output=True, check=False).returncode == 0
        connection = http.client.HTTPConnection(self._host, self._ports[0], timeout=1)
        try:
            connection.request("GET", "/status")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
