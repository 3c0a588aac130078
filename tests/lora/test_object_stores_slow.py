"""Adapters from a server of S3 (moto) on this machine, by a loading worker."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from lora_bases import llama_sites, validate
from msgspec.structs import replace

from environments import environment
from truffula.lora.loading import LoadingWorker
from truffula.lora.sources import AdapterDirectory
from truffula.lora.worker import LoadResponse, Setup
from truffula.testing.adapters import write_tiny_adapter

pytestmark = pytest.mark.slow


def _port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _started(command: list[str], url: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        try:
            httpx.get(url, trust_env=False)
            return process
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError(f"{command[0]} did not start")


@pytest.fixture
def servers() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


class Loads:
    def __init__(self, folder: Path, pattern: str) -> None:
        self.directory = AdapterDirectory(allow_source=(pattern,))
        cache = str(folder / "cache")
        setup = Setup(sites=llama_sites(), model="tiny-base", adapter_cache=cache, adapter_cache_bytes=1 << 30)
        (folder / "staging").mkdir()
        self.loader = LoadingWorker(setup, staging_roots=[folder / "staging"])

    def __call__(self, url: str, has: str = "", period: int = 0) -> LoadResponse:
        ref = self.directory.resolve(url)
        assert ref is not None
        self.loader.start(replace(ref, fingerprint=str(period)), has)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            for response in self.loader.poll():
                if response.image_path is not None:
                    Path(response.image_path).unlink()
                return response
            time.sleep(0.01)
        raise AssertionError("no response")


def _walk(loads: Loads, url: str, put, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Load, load again, confirm, change, absent: through one store."""
    put(write_tiny_adapter(tmp_path / "a0", llama_sites(), seed=0))
    first = loads(url)
    assert first.error is None and first.image is not None, first
    assert first.image.generation == validate(tmp_path / "a0").generation
    assert loads(url).image == first.image
    confirmed = loads(url, first.commit, period=1)
    assert confirmed.error is None and confirmed.image is None and confirmed.commit == first.commit
    put(write_tiny_adapter(tmp_path / "a1", llama_sites(), seed=1))
    changed = loads(url, first.commit, period=2)
    assert changed.image is not None and changed.image.generation == validate(tmp_path / "a1").generation
    absent = loads(f"{url}-absent")
    assert absent.error is not None and absent.error.code == "adapter_not_found"
    assert absent.error.message == f"There is no model or adapter '{url}-absent'; GET /v1/models lists them."
    loads.loader.close()


def test_s3(tmp_path: Path, servers: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    programs, port = environment("object-stores", ["moto[server]"]), _port()
    url = f"http://127.0.0.1:{port}"
    servers.append(_started([str(programs / "moto_server"), "-p", str(port)], url))
    secrets = {"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": "s3cret-key", "AWS_REGION": "us-east-1"}
    for name, value in (secrets | {"AWS_ENDPOINT_URL": url, "NO_PROXY": "127.0.0.1"}).items():
        monkeypatch.setenv(name, value)
    script = (
        "import boto3, pathlib, sys\n"
        "s3 = boto3.client('s3', endpoint_url=sys.argv[1])\n"
        "s3.create_bucket(Bucket='models')\n"
        "for f in pathlib.Path(sys.argv[2]).iterdir(): s3.upload_file(str(f), 'models', f'team/a/{f.name}')\n"
    )

    def put(folder: Path) -> None:
        subprocess.run([str(programs / "python"), "-c", script, url, str(folder)], check=True, env=os.environ)

    loads = Loads(tmp_path, "s3://models/team/*")
    _walk(loads, "s3://models/team/a", put, tmp_path)
    servers[0].kill()
    servers[0].wait()
    (tmp_path / "down").mkdir()
    other = Loads(tmp_path / "down", "s3://models/team/*")
    error = other("s3://models/team/a").error
    assert error is not None and error.code == "adapter_load_failed"
    for secret in ("s3cret", "AKIA", str(port)):
        assert secret not in error.message
    other.loader.close()
