"""Adapters are looked for beside the event loop: thousands of folders, or a slow disk, hold up nobody's tokens."""

import os
import shutil
import threading
from pathlib import Path

import pytest
from live_server import ok

from truffula.lora import sources
from truffula.lora.sources import AdapterDirectory


@pytest.fixture
def threads(monkeypatch):
    """Names of the threads that looked at an adapter's files, or listed the folder."""
    seen = []

    def noting(work):
        def noted(*args, **more):
            seen.append(threading.current_thread().name)
            return work(*args, **more)

        return noted

    monkeypatch.setattr(sources, "fingerprint", noting(sources.fingerprint))
    monkeypatch.setattr(sources.os, "scandir", noting(os.scandir))
    return seen


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/models", None),
        ("GET", "/v1/models/in-dir", None),
        ("POST", "/v1/completions", {"prompt": "a", "model": "in-dir", "max_tokens": 1}),
        ("POST", "/v1/completions", {"prompt": "a", "adapter_id": "in-dir", "max_tokens": 1}),
        ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "model": "in-dir"}),
        ("POST", "/generate", {"inputs": "a", "parameters": {"adapter_id": "in-dir", "max_new_tokens": 1}}),
        ("POST", "/tokenize", {"inputs": "a", "model": "in-dir"}),
    ],
    ids=lambda v: str(v)[:40],
)
def test_no_look_up_on_the_loop(live, threads, method, path, body):
    live.service.core.directory._listing = None  # as after a second
    ok(live.client.request(method, path, json=body))
    assert threads
    assert all(name.startswith("truffula-lookup") for name in threads), threads


def test_a_listing_is_made_once_a_second_and_when_the_folder_changes(tmp_path, adapter_folders, threads):
    directory = AdapterDirectory(adapter_dir=adapter_folders["in-dir"].parent)
    names = directory.names()
    assert "in-dir" in names
    first = directory._listing
    for _ in range(20):
        assert directory.names() == names
    assert threads.count("MainThread") < 20 and first is not None
    folder = tmp_path / "served"
    folder.mkdir()
    directory = AdapterDirectory(adapter_dir=folder)
    assert directory.names() == []
    os.utime(folder, ns=(0, 0))
    (folder / "new").symlink_to(adapter_folders["in-dir"])  # leaves the folder, so it is no adapter
    assert directory.names() == []
    Path(shutil.copytree(adapter_folders["in-dir"], tmp_path / "copy")).rename(folder / "moved")
    assert directory.names() == ["moved"], "the folder itself has changed"
