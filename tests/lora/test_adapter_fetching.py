"""Adapters from HTTP sources: what is fetched, when the source is asked again, and what the disk cache keeps."""

from __future__ import annotations

import base64
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lora_bases import llama_sites, validate
from msgspec.structs import replace
from source_server import Source, source_server

from truffula.errors import ConfigError
from truffula.lora import stores
from truffula.lora.disk_cache import DiskCache, Stamp, content_id
from truffula.lora.sources import AdapterDirectory
from truffula.lora.worker import LoadLimits, LoadRequest, LoadResponse, Setup, load
from truffula.testing.adapters import write_tiny_adapter
from truffula.types import AdapterRef

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Source]:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with source_server() as made:
        yield made


class Loads:
    """Loads as a worker does them, with a disk cache of the test's."""

    def __init__(self, folder: Path, source: Source, **options: Any) -> None:
        self.folder = folder
        self.source = source
        self.cache = DiskCache(folder / "cache", options.get("adapter_cache_bytes", 1 << 30))
        made: dict[str, Any] = {"adapter_cache": str(folder / "cache"), "adapter_cache_bytes": 1 << 30} | options
        self.setup = Setup(sites=llama_sites(), model="tiny-base", **made)
        self.directory = AdapterDirectory(
            allow_source=(f"{source.url}/*",), allow_credentials=True, recheck_s=10**9, base_names=("base",)
        )
        self.staging = folder / "staging"
        self.staging.mkdir(parents=True, exist_ok=True)

    def put(self, name: str = "a", seed: int = 0) -> str:
        folder = write_tiny_adapter(self.folder / "made" / f"{name}-{seed}", llama_sites(), seed=seed)
        return self.source.put(name, folder)

    def ref(self, url: str, token: str | None = None, fingerprint: str | None = None) -> AdapterRef:
        ref = self.directory.resolve(url, token=token)
        assert ref is not None
        return ref if fingerprint is None else replace(ref, fingerprint=fingerprint)

    def __call__(self, url: str, token: str | None = None, fingerprint: str | None = None, has: str = "") -> Any:
        self.source.asked.clear()
        request = LoadRequest(ticket=1, ref=self.ref(url, token, fingerprint), has=has)
        response = load(request, self.setup, [self.staging])
        for path in self.staging.iterdir():
            path.unlink()
        assert list((self.folder / "cache").glob("scratch/*")) == []
        return response


@pytest.fixture
def loads(tmp_path: Path, source: Source) -> Loads:
    return Loads(tmp_path, source)


def failed(response: LoadResponse, code: str) -> str:
    assert response.error is not None and response.error.code == code, response
    return response.error.message


def test_the_files_of_a_url_are_those_of_the_folder(loads: Loads, tmp_path: Path) -> None:
    response = loads(loads.put())
    assert response.image.generation == validate(tmp_path / "made" / "a-0").generation
    assert len(response.commit) == 64 and loads.cache.nbytes() > 0
    extra = {path.rpartition("/")[2] for path in loads.source.bodies()} - {CONFIG, TENSORS}
    assert extra == set()  # what is not there is asked for by HEAD alone


def test_a_source_is_asked_once_in_a_period_and_its_bytes_are_fetched_once(loads: Loads) -> None:
    url = loads.put()
    first = loads(url, fingerprint="1")
    again = loads(url, fingerprint="1")
    assert again.image == first.image and loads.source.asked == []
    later = loads(url, fingerprint="2")
    assert later.image == first.image and loads.source.bodies() == [] and len(loads.source.asked) == 2
    assert loads(url, fingerprint="2").commit == first.commit and loads.source.asked == []
    loads(url, fingerprint="")  # a caller without periods
    assert len(loads.source.asked) == 2


def test_a_state_that_the_pool_has_is_only_confirmed(loads: Loads) -> None:
    url = loads.put()
    first = loads(url, fingerprint="1")
    same = loads(url, fingerprint="2", has=first.commit)
    assert same.image is None and same.error is None and same.commit == first.commit
    loads.put(seed=1)
    changed = loads(url, fingerprint="3", has=first.commit)
    assert changed.image.generation != first.image.generation and changed.commit != first.commit


def test_absent_and_forbidden_are_one_answer(loads: Loads) -> None:
    private, absent = loads.put("private/a"), f"{loads.source.url}/private/b"
    loads.source.tokens["private"] = "right"
    told = [failed(loads(url, token), "adapter_not_found") for url in (private, absent) for token in (None, "wrong")]
    assert {text.replace(private, "X").replace(absent, "X") for text in told} == {
        "There is no model or adapter 'X'; GET /v1/models lists them."
    }
    assert loads(private, "right").error is None
    assert failed(loads(absent, "right"), "adapter_not_found") == told[2]


def test_what_a_token_fetched_serves_only_those_who_prove_the_same_right(loads: Loads) -> None:
    """From the disk cache, too: the source is asked with the credential of the request at every load."""
    url = loads.put("private/a")
    loads.source.tokens["private"] = "right"
    assert loads(url, "right", fingerprint="1").error is None
    for token in (None, "wrong"):
        failed(loads(url, token, fingerprint="1"), "adapter_not_found")
        assert loads.source.asked  # the cache is no answer
    again = loads(url, "right", fingerprint="1")
    assert again.error is None and loads.source.bodies() == [] and loads.source.asked
    loads.source.tokens["private"] = "another"
    failed(loads(url, "right", fingerprint="1"), "adapter_not_found")


def test_a_token_is_nowhere_but_in_the_request(loads: Loads, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = loads.put("private/a")
    loads.source.tokens["private"] = "s3cret-token"
    with caplog.at_level(logging.DEBUG):
        good, bad = loads(url, "s3cret-token"), loads(f"{url}x", "s3cret-token")
    ref = loads.ref(url, "s3cret-token")
    assert loads.source.seen[-1] == "Bearer s3cret-token"
    assert "s3cret" not in f"{ref!r} {ref.credential!r} {good!r} {bad!r} {caplog.text}"
    assert ref.credential is not None and ref.credential.id not in repr(ref)
    for path in (tmp_path / "cache").rglob("*"):
        assert "s3cret" not in str(path) and (path.is_dir() or b"s3cret" not in path.read_bytes())
    other = AdapterDirectory(allow_source=(f"{loads.source.url}/*",), allow_credentials=True)
    theirs = other.resolve(url, token="s3cret-token")
    assert theirs is not None and theirs.credential is not None
    assert theirs.credential.id != ref.credential.id  # salted: it cannot be compared with that of another server


def test_a_token_has_no_effect_unless_the_operator_allows_it(loads: Loads) -> None:
    closed = AdapterDirectory({"n": f"{loads.source.url}/a"}, allow_source=("https://host/*", "s3://bucket/*"))
    for name in ("https://host/a", "s3://bucket/a"):
        ref = closed.resolve(name, token="t")
        assert ref is not None and ref.credential is None
    named = AdapterDirectory({"n": f"{loads.source.url}/a"}, allow_source=("s3://b/*",), allow_credentials=True)
    for name in ("n", "s3://b/a"):  # the operator's own; a store with the operator's credentials
        ref = named.resolve(name, token="t")
        assert ref is not None and ref.credential is None


def test_the_operators_login_is_not_sent_beside_a_clients(loads: Loads, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password word\n")
    (tmp_path / ".netrc").chmod(0o600)
    url = loads.put("private/a")
    loads.source.tokens["private"] = base64.b64encode(b"me:word").decode()
    assert loads(url).error is None
    failed(loads(url, "wrong"), "adapter_not_found")
    assert set(loads.source.seen[-2:]) == {"Bearer wrong"}


def test_redirects_stay_below_what_is_allowed(loads: Loads, source: Source) -> None:
    url = loads.put("real/a")
    for name in (CONFIG, TENSORS):
        source.redirects[f"/a/{name}"] = f"{url}/{name}?signed=1"
        source.files[f"/real/a/{name}?signed=1"] = source.files[f"/real/a/{name}"]
    assert loads(f"{source.url}/a").error is None
    with source_server() as other:
        leads = (f"{other.url}/a/x", "http://169.254.169.254/latest", "file:///etc/passwd", "//[", "/x%2fy")
        for location in leads:
            source.redirects[f"/b/{CONFIG}"] = location
            message = failed(loads(f"{source.url}/b"), "adapter_load_failed")
            assert "redirects to a URL that the operator does not allow" in message and location not in message
        assert other.asked == []
    source.redirects[f"/b/{CONFIG}"] = f"/b/{CONFIG}"
    assert "redirects more than 5 times" in failed(loads(f"{source.url}/b"), "adapter_load_failed")
    named = AdapterDirectory({"n": f"{source.url}/a"}).resolve("n")
    assert named is not None
    response = load(LoadRequest(ticket=1, ref=named), loads.setup, [loads.staging])
    assert "does not allow" in failed(response, "adapter_load_failed")  # beside the operator's own URL


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_is_cut_off_continues(loads: Loads, source: Source, ranges: bool) -> None:
    url, path = loads.put(), f"/a/{TENSORS}"
    source.ranges = ranges
    source.cut[path] = 100
    response = loads(url)
    assert response.error is None and source.bodies().count(path) == 2
    assert response.image.generation == validate(loads.folder / "made" / "a-0").generation


@pytest.mark.parametrize("which", [CONFIG, TENSORS])
def test_both_files_are_of_one_state(loads: Loads, source: Source, which: str) -> None:
    """The source is replaced in the middle of a download; then all of it is fetched again."""
    url = loads.put()
    old = dict(source.files)
    loads.put(seed=1)
    config = json.loads(source.files[f"/a/{CONFIG}"])
    source.files[f"/a/{CONFIG}"] = json.dumps(config | {"lora_alpha": 99}).encode()
    new, source.files = dict(source.files), old
    source.then[f"/a/{which}"] = (1, new)  # the second request for it: its body
    response = loads(url)
    for path, body in new.items():
        (loads.folder / "new").mkdir(exist_ok=True)
        (loads.folder / "new" / path.rpartition("/")[2]).write_bytes(body)
    assert response.image.generation == validate(loads.folder / "new").generation


def test_faults_of_a_source_are_errors_that_say_what_and_nothing_of_its_words(
    loads: Loads, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = loads.put()
    for status, text in ((500, "HTTP 500; try again later"), (429, "HTTP 429"), (418, "HTTP 418")):
        source.status[f"/a/{CONFIG}"] = status
        message = failed(loads(url), "adapter_load_failed")
        assert text in message and "secret" not in message
    source.status.clear()
    source.marks = False
    assert "neither ETag nor Last-Modified" in failed(loads(url), "adapter_load_failed")
    source.marks, source.head = True, False
    assert loads(url).error is None
    monkeypatch.setattr(stores, "STALL_S", 0.2)
    source.hangs.add(f"/a/{CONFIG}")
    assert "does not respond in time" in failed(
        loads(f"{source.url}/b") if False else loads(url, "t"), "adapter_load_failed"
    )
    source.hangs.clear()
    source.files[f"/c/{CONFIG}"] = source.files[f"/a/{CONFIG}"]
    assert f"has no {TENSORS}" in failed(loads(f"{source.url}/c"), "adapter_invalid")
    source.files[f"/d/{CONFIG}"] = b"<html>"
    source.files[f"/d/{TENSORS}"] = source.files[f"/a/{TENSORS}"]
    failed(loads(f"{source.url}/d"), "adapter_invalid")


def test_a_file_above_the_limit_is_not_fetched(tmp_path: Path, source: Source) -> None:
    loads = Loads(tmp_path, source, limits=LoadLimits(file_bytes=900))
    message = failed(loads(loads.put()), "adapter_invalid")
    assert "the limit is 900 (--max-adapter-file)" in message and loads.source.bodies() == []


def test_a_source_that_is_down_leaves_what_is_cached(loads: Loads, source: Source) -> None:
    url = loads.put()
    first = loads(url, fingerprint="1")
    source.status[f"/a/{CONFIG}"] = 503
    response = loads(url, fingerprint="2")
    assert response.image == first.image and "cannot be asked for changes" in response.warnings[0]
    failed(loads(url, "t", fingerprint="2"), "adapter_load_failed")  # a right that cannot be proven is none
    source.status.clear()
    private = loads.put("private/a")
    source.tokens["private"] = "right"
    assert loads(private, "right").error is None
    source.status[f"/private/a/{CONFIG}"] = 503
    failed(loads(private, fingerprint="1"), "adapter_load_failed")  # nor is one that only a client has proven
    loads.setup = replace(loads.setup, offline=True)
    assert "offline" in failed(loads(private, fingerprint="1"), "adapter_load_failed")
    assert loads(url, fingerprint="3").image == first.image and source.asked == []
    for name, token in ((f"{source.url}/b", None), (url, "t")):
        assert "offline" in failed(loads(name, token), "adapter_load_failed")


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_damaged_entry_is_noticed_and_fetched_again(loads: Loads, name: str) -> None:
    url = loads.put()
    first = loads(url, fingerprint="1")
    (path,) = (loads.folder / "cache" / "entries").glob(f"*/{name}")
    body = bytearray(path.read_bytes())
    body[-3] ^= 1
    path.write_bytes(body)
    again = loads(url, fingerprint="1")
    assert again.image == first.image and "were damaged" in again.warnings[0] and f"/a/{name}" in loads.source.bodies()
    assert loads(url, fingerprint="1").warnings == first.warnings and loads.source.asked == []
    (known,) = (loads.folder / "cache" / "sources").iterdir()
    known.write_text("{")
    assert loads(url, fingerprint="1").image == first.image


def test_the_cache_keeps_what_was_used_last_within_its_limit(tmp_path: Path, source: Source) -> None:
    one = Loads(tmp_path / "one", source)
    one(one.put())
    size = one.cache.nbytes()
    loads = Loads(tmp_path, source, adapter_cache_bytes=3 * size)
    urls = [loads.put(f"a{seed}", seed) for seed in range(4)]
    for number, url in enumerate(urls[:3]):
        entry = loads(url, fingerprint="1").commit
        os.utime(tmp_path / "cache" / "entries" / entry, (number, number))
    loads(urls[0], fingerprint="1")
    loads(urls[3], fingerprint="1")
    assert loads.cache.nbytes() == 3 * size
    fetched = {
        url: bool(loads(url, fingerprint="1") and source.bodies()) for url in (urls[0], urls[2], urls[3], urls[1])
    }
    assert fetched == {urls[0]: False, urls[2]: False, urls[3]: False, urls[1]: True}
    assert len(list((tmp_path / "cache" / "sources").iterdir())) == 3
    none = Loads(tmp_path / "none", source, adapter_cache_bytes=0)
    assert none(urls[0]).error is None and none.cache.nbytes() == 0


def test_an_entry_that_is_read_is_not_evicted(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10)
    entries = []
    for number in range(3):
        with cache.scratch() as scratch:
            (scratch.folder / "file").write_bytes(b"%5d" % number)
            entries.append(cache.store(f"k{number}", {"file": Stamp("e")}, "", scratch)[0])
            assert content_id(tmp_path / "entries" / entries[-1]) == entries[-1]
        if number == 0:
            with cache.open(entries[0]) as folder:
                assert folder is not None
                with cache.scratch() as scratch:
                    (scratch.folder / "file").write_bytes(b"1234567890")
                    big, _ = cache.store("big", {}, "", scratch)
                assert (folder / "file").read_bytes() == b"    0"
    assert cache.find("big") is None or not (tmp_path / "entries" / big).exists()
    assert cache.nbytes() <= 10


def test_unfinished_downloads_count_with_their_full_size(tmp_path: Path, source: Source) -> None:
    loads = Loads(tmp_path / "sized", source)
    loads(loads.put())
    size = loads.cache.nbytes()
    loads = Loads(tmp_path, source, adapter_cache_bytes=3 * size)
    kept = [loads(loads.put(f"a{seed}", seed), fingerprint="1").commit for seed in range(2)]
    entries = tmp_path / "cache" / "entries"
    os.utime(entries / kept[0], (1, 1))
    with loads.cache.scratch() as scratch:  # of another process: a byte of what it will have
        with (scratch.folder / "adapter_model.safetensors").open("wb") as file:
            file.truncate(2 * size)
            file.write(b"x")
        others = DiskCache(tmp_path / "cache", 3 * size)
        others.make_room()
        assert not (entries / kept[0]).exists() and (entries / kept[1]).exists()
        with (scratch.folder / "adapter_model.safetensors").open("r+b") as file:
            file.truncate(4 * size)
        others.make_room()
        assert (entries / kept[1]).exists(), "what is larger than the cache displaces nothing"


KILLED = """
import sys
from pathlib import Path
from truffula.lora.disk_cache import DiskCache
with DiskCache(Path(sys.argv[1]), 1 << 20).scratch() as scratch:
    (scratch.folder / "half").write_bytes(b"x" * 1000)
    print(scratch.folder, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    cache = DiskCache(tmp_path, 1 << 20)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        with cache.scratch():
            assert left.exists()  # its process lives
        process.kill()
    with cache.scratch():
        assert not left.exists()


STORES = {
    "s3://bucket/team/a": "/bucket/team/a",
    "gs://bucket/team/a": "/bucket/team/a",
    "az://account/container/team/a": "/container/team/a",
}


@pytest.mark.parametrize("url", STORES)
def test_object_stores_are_read_where_their_urls_say(
    loads: Loads, source: Source, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The servers' part is this test's own; ``test_object_stores_slow`` has another's."""
    pytest.importorskip("obstore")
    account = {"gcs_base_url": source.url, "disable_oauth": True, "client_email": "", "private_key": ""}
    (loads.folder / "account.json").write_text(json.dumps(account | {"private_key_id": ""}))
    environment = {
        "AWS_ENDPOINT_URL": source.url,
        "AWS_ACCESS_KEY_ID": "AKIA",
        "AWS_SECRET_ACCESS_KEY": "s3cret",
        "GOOGLE_SERVICE_ACCOUNT": str(loads.folder / "account.json"),
        "AZURE_STORAGE_ENDPOINT": source.url,
        "AZURE_STORAGE_ACCOUNT_KEY": "czNjcmV0",
        "NO_PROXY": "127.0.0.1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    loads.directory = AdapterDirectory(allow_source=(f"{url}*",), allow_credentials=True)
    loads.put(STORES[url].removeprefix("/"))
    first = loads(url, fingerprint="1")
    assert first.image.generation == validate(loads.folder / "made" / f"{STORES[url][1:]}-0").generation
    assert loads(url, fingerprint="2", has=first.commit).image is None
    failed(loads(f"{url}b"), "adapter_not_found")
    source.status[f"{STORES[url]}/{CONFIG}"] = 403
    failed(loads(url, fingerprint=""), "adapter_not_found")
    source.status[f"{STORES[url]}/{CONFIG}"] = 418
    message = failed(loads(url, fingerprint="3"), "adapter_load_failed")
    assert "secret" not in message and source.url not in message


@pytest.mark.parametrize(
    "pattern", ["s3://*/x", "s3://b*/x", "ftp://b/x", "s3://bucket", "https://u:p@host/*", "https://host/a/../*", "x/*"]
)
def test_a_pattern_that_allows_too_much_or_nothing_is_an_error(pattern: str) -> None:
    with pytest.raises(ConfigError, match="allow_source"):
        AdapterDirectory(allow_source=(pattern,))
