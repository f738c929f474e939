"""GLIDE's CLIP from where it was published (a server on this machine stands for it), and pickled towers."""

import http.server
import os
import threading
from functools import partial

import huggingface_hub
import pytest
import torch

from mtl_anagram import SourceError
from mtl_anagram.files.hub import POINTER
from mtl_anagram.models import glide, load_noise_clip
from tests.readme import write_glide


class Handler(http.server.SimpleHTTPRequestHandler):
    """A folder's files; the server says how to misbehave: `cut` bytes after which the connection drops, `status`."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.server.status == 200:
            super().do_GET()
        else:
            self.send_error(self.server.status)

    def copyfile(self, source, target):
        target.write(source.read()[: self.server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "clip"))
    made.cut, made.status, made.asked = None, 200, []
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def published(server, tmp_path, monkeypatch):
    """The two files as they are published, small, on the server; the hub gives the merges. Returns the cache."""
    for tower, state in write_glide(tmp_path / "clip").items():
        monkeypatch.setitem(glide.PARAMETERS, tower, sum(t.numel() for t in state.values()))
    monkeypatch.setattr(glide, "URL", f"http://127.0.0.1:{server.server_port}/{{}}.pt")
    monkeypatch.setenv("MTL_ANAGRAM_CACHE", str(tmp_path / "cache"))
    merges = str(tmp_path / "clip" / "merges.txt")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo_id, name, subfolder: merges)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "noise_clip"


def test_glide_is_downloaded_once_and_then_there(published, server, tmp_path, monkeypatch):
    expected = load_noise_clip(tmp_path / "clip").embed_text(["a duck"])
    assert torch.equal(load_noise_clip("glide").embed_text(["a duck"]), expected)
    assert sorted(p.name for p in published.iterdir()) == sorted(glide.FILES)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(load_noise_clip("glide").embed_text(["a duck"]), expected)
    assert len(server.asked) == 2


def test_offline_without_the_files(published, server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"clip_image_enc.pt.*HF_HUB_OFFLINE is set: unset it once"):
        load_noise_clip("glide")
    assert server.asked == []


@pytest.mark.parametrize(
    "cut, status, message", [(3000, 200, "download it again"), (None, 503, "503.*try again later")]
)
def test_a_download_that_fails_leaves_nothing_and_can_be_tried_again(published, server, cut, status, message):
    server.cut, server.status = cut, status
    with pytest.raises(SourceError, match=message):
        load_noise_clip("glide")
    assert list(published.iterdir()) == []
    server.cut, server.status = None, 200
    load_noise_clip("glide")


def test_a_published_file_of_another_size(published, server, monkeypatch):
    monkeypatch.setitem(glide.PARAMETERS, "clip_text_enc", 71_679_488)
    with pytest.raises(SourceError, match=r"clip_text_enc.pt .*cut off or damaged"):
        load_noise_clip("glide")
    assert [path.name for path in published.iterdir()] == ["clip_image_enc.pt"]


def test_a_folder_of_that_name_goes_first(published, server, tmp_path):
    (tmp_path / "clip").rename(tmp_path / "glide")
    load_noise_clip("glide")
    assert server.asked == []


def test_old_pickles_and_views_of_one_storage_load(tmp_path):
    states = write_glide(tmp_path)
    expected = load_noise_clip(tmp_path).embed_text(["a duck"])
    merges = (tmp_path / "merges.txt").rename(tmp_path / "merges of another name")
    state = states["clip_text_enc"]
    name = "blocks.input.w_pos"
    state[name] = torch.cat([state[name], state[name]])[: len(state[name])]
    torch.save(state, tmp_path / "clip_text_enc.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_noise_clip(tmp_path, merges=merges).embed_text(["a duck"]), expected)


class Attack:
    """Makes a folder where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "download it again"),
        (b"PK\x03\x04 cut off", "download it again"),
        (POINTER + b"spec/v1\noid sha256:0\nsize 5\n", "Git LFS pointer.*git lfs pull"),
        (["no", "dict"], "no flat state dict"),
        ({"a": Attack()}, "weights-only unpickler"),
    ],
)
def test_pickles_that_are_none_and_run_no_code(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    write_glide(tmp_path)
    if isinstance(content, bytes):
        (tmp_path / "clip_text_enc.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "clip_text_enc.pt")
    with pytest.raises(SourceError, match=message) as caught:
        load_noise_clip(tmp_path)
    assert "clip_text_enc.pt" in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert caught.value.__cause__ is None  # a traceback does not bring torch's advice either
