"""GLIDE's CLIP from where it was published: a server on this machine stands for it, with all its failures."""

import base64
import hashlib
import http.server
import threading

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from mtl_anagram import CapacityError, Cascade, SourceError, WeightsError
from mtl_anagram.models import fetch as fetching
from mtl_anagram.models import glide, load_noise_clip
from mtl_anagram.models.fetch import fetch
from tests.unit import tiny


class Server:
    """Files by path, and how to misbehave: `cut` bytes after which the connection drops, `status`, `md5`."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.cut: int | None = None
        self.status = 200
        self.version, self.ranges, self.md5 = '"v1"', True, None
        self.asked: list[tuple[str, str | None]] = []
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def handler(self):
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                wanted = self.headers.get("Range")
                server.asked.append((self.path, wanted))
                content = server.files.get(self.path)
                if content is None or server.status != 200:
                    self.send_error(404 if content is None else server.status)
                    return
                start = 0
                if wanted and server.ranges and self.headers.get("If-Range") == server.version:
                    start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                    if start >= len(content):
                        self.send_error(416)
                        return
                body = content[start:]
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", server.version)
                if server.md5 is not None:
                    self.send_header("Content-MD5", server.md5)
                self.end_headers()
                self.wfile.write(body[: server.cut])

            def log_message(self, *_):
                pass

        return Handler


@pytest.fixture
def server():
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


CONTENT = bytes(range(256)) * 9000  # more than one chunk


def test_a_file_arrives_whole_and_once(server, tmp_path):
    server.files["/a.pt"] = CONTENT
    server.md5 = base64.b64encode(hashlib.md5(CONTENT).digest()).decode()
    path = fetch(f"{server.url}/a.pt", tmp_path / "new" / "a.pt")
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["a.pt"]
    fetch(f"{server.url}/a.pt", path)
    assert len(server.asked) == 1


def test_a_broken_download_goes_on_from_where_it_was(server, tmp_path):
    server.files["/a.pt"], server.cut = CONTENT, 1_500_000
    with pytest.raises(
        SourceError, match="broke off after 1,500,000 of 2,304,000 bytes; the same call goes on"
    ):
        fetch(f"{server.url}/a.pt", tmp_path / "a.pt")
    assert not (tmp_path / "a.pt").exists()
    server.cut = None
    assert fetch(f"{server.url}/a.pt", tmp_path / "a.pt").read_bytes() == CONTENT
    assert server.asked[-1] == ("/a.pt", "bytes=1500000-")


@pytest.mark.parametrize("change", ["version", "ranges", "too long"])
def test_what_cannot_be_resumed_starts_anew(server, tmp_path, change):
    server.files["/a.pt"], server.cut = CONTENT, 1_500_000
    with pytest.raises(SourceError):
        fetch(f"{server.url}/a.pt", tmp_path / "a.pt")
    server.cut = None
    server.files["/a.pt"] = expected = CONTENT[::-1][:1_200_000] if change == "too long" else CONTENT[::-1]
    if change == "version":
        server.version = '"v2"'
    elif change == "ranges":
        server.ranges = False
    assert fetch(f"{server.url}/a.pt", tmp_path / "a.pt").read_bytes() == expected
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_wrong_content_and_absent_files(server, tmp_path):
    server.files["/a.pt"], server.md5 = CONTENT, base64.b64encode(b"0" * 16).decode()
    with pytest.raises(SourceError, match="another MD5"):
        fetch(f"{server.url}/a.pt", tmp_path / "a.pt")
    with pytest.raises(SourceError, match="answers 404.*give a folder that holds the file"):
        fetch(f"{server.url}/b.pt", tmp_path / "b.pt")
    server.status = 503
    with pytest.raises(SourceError, match="answers 503"):
        fetch(f"{server.url}/a.pt", tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []


def test_nobody_answers(tmp_path):
    with pytest.raises(SourceError, match="cannot be reached.*check the connection"):
        fetch("http://127.0.0.1:9/a.pt", tmp_path / "a.pt")
    with pytest.raises(SourceError, match="cannot be reached"):
        fetch((tmp_path / "gone").as_uri(), tmp_path / "a.pt")


def test_a_disk_that_is_too_small(server, tmp_path, monkeypatch):
    server.files["/a.pt"] = CONTENT
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: full)
    with pytest.raises(CapacityError, match="1,000 bytes free, but a.pt needs 2,304,000 more"):
        fetch(f"{server.url}/a.pt", tmp_path / "a.pt")


@pytest.fixture
def published(server, tmp_path, monkeypatch):
    """The two files as they are published, small, on the server; the hub gives the merges. Returns the cache."""
    tiny.write_clip(tmp_path / "clip")
    for tower in glide.TOWERS:
        state = load_file(tmp_path / "clip" / f"{tower}.safetensors")
        torch.save(state, tmp_path / f"{tower}.pt")
        server.files[f"/{tower}.pt"] = (tmp_path / f"{tower}.pt").read_bytes()
        monkeypatch.setitem(glide.PARAMETERS, tower, sum(t.numel() for t in state.values()))
    monkeypatch.setattr(glide, "URL", f"{server.url}/{{}}.pt")
    monkeypatch.setenv("MTL_ANAGRAM_CACHE", str(tmp_path / "cache"))
    merges = str(tmp_path / "clip" / "merges.txt")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo_id, name, subfolder: merges)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "noise_clip"


def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_glide_is_downloaded_converted_once_and_then_there(published, server, tmp_path, monkeypatch):
    expected = load_noise_clip(tmp_path / "clip").embed_text(["a duck"])
    assert torch.equal(load_noise_clip("glide").embed_text(["a duck"]), expected)
    names = ["clip_image_enc.safetensors", "clip_text_enc.safetensors", "merges.txt"]
    assert sorted(p.name for p in published.iterdir()) == names
    asked = len(server.asked)
    offline(monkeypatch)
    monkeypatch.setattr(glide, "read_pickle", None)
    assert torch.equal(load_noise_clip("glide").embed_text(["a duck"]), expected)
    assert len(server.asked) == asked == 2


def test_offline_without_the_files(published, server, monkeypatch):
    offline(monkeypatch)
    with pytest.raises(SourceError, match="clip_image_enc.safetensors.*HF_HUB_OFFLINE is set: unset it once"):
        load_noise_clip("glide")
    assert server.asked == []


def test_a_published_file_of_another_size(published, server, monkeypatch):
    monkeypatch.setitem(glide.PARAMETERS, "clip_text_enc", 71_679_488)
    with pytest.raises(WeightsError, match="71,679,488 are expected.*it came from http"):
        load_noise_clip("glide")
    assert not (published / "clip_text_enc.pt").exists()
    assert (published / "clip_image_enc.safetensors").is_file()


def test_a_folder_of_that_name_goes_first(published, server, tmp_path):
    (tmp_path / "clip").rename(tmp_path / "glide")
    load_noise_clip("glide")
    assert server.asked == []


def pickled_folder(folder):
    """A folder as users have it: two .pt files and the merges."""
    tiny.write_clip(folder)
    states = {tower: load_file(folder / f"{tower}.safetensors") for tower in glide.TOWERS}
    for tower, state in states.items():
        torch.save(state, folder / f"{tower}.pt")
        (folder / f"{tower}.safetensors").unlink()
    return folder, states


def test_a_folders_pickles_are_converted_once(tmp_path, monkeypatch):
    folder, states = pickled_folder(tmp_path / "own")
    first = load_noise_clip(folder).embed_text(["a duck"])
    for tower, state in states.items():
        written = load_file(folder / f"{tower}.safetensors")
        assert written.keys() == state.keys()
        assert all(torch.equal(written[name], state[name]) for name in state)
        assert (folder / f"{tower}.pt").is_file()
    monkeypatch.setattr(torch, "load", None)
    assert torch.equal(load_noise_clip(folder).embed_text(["a duck"]), first)


def test_the_conversion_gives_the_same_bytes_for_the_same_numbers(tmp_path):
    state = {"b": torch.arange(6.0), "a": torch.ones(2, 3).t()}
    state["c"] = state["b"][2:4]  # a view: safetensors would refuse the shared storage
    written = []
    for name, order in (("x", "abc"), ("y", "cba")):
        torch.save({key: state[key] for key in order}, tmp_path / f"{name}.pt")
        written.append(glide.convert(tmp_path / f"{name}.pt").read_bytes())
    assert written[0] == written[1]


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    folder, _ = pickled_folder(tmp_path / "own")
    (folder / "clip_text_enc.pt").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(SourceError, match="weights-only unpickler"):
        load_noise_clip(folder)
    names = {"clip_image_enc.pt", "clip_image_enc.safetensors", "clip_text_enc.pt", "merges.txt"}
    assert {p.name for p in folder.iterdir()} == names


def test_a_folder_that_cannot_be_written_to_is_read_as_it_is(tmp_path, monkeypatch):
    folder, _ = pickled_folder(tmp_path / "own")
    before = sorted(folder.iterdir())
    monkeypatch.setattr(glide.os, "access", lambda *_: False)
    load_noise_clip(folder)
    assert sorted(folder.iterdir()) == before


def test_checksums_are_of_the_converted_files(tmp_path, cascade_folder):
    """So that they do not change between the first run and the second."""
    folder, _ = pickled_folder(tmp_path / "own")
    sums = [
        Cascade.from_pretrained(cascade_folder, noise_clip=folder, device="cpu").checksums() for _ in "ab"
    ]
    assert sums[0] == sums[1]
    assert "noise_clip/clip_text_enc.safetensors" in sums[0]


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("MTL_ANAGRAM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert glide.cache_folder() == tmp_path / "mtl_anagram" / "noise_clip"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert glide.cache_folder() == tmp_path / "home" / ".cache" / "mtl_anagram" / "noise_clip"
