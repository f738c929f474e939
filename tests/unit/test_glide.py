"""GLIDE's CLIP from where it was published (a folder stands for it), and pickled towers."""

import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch

from mtl_anagram import SourceError
from mtl_anagram.files.hub import POINTER
from mtl_anagram.models import glide, load_noise_clip
from tests.readme import write_glide

OURS = Path("ours/noise_clip")  # in a test's folder


def publish(folder, monkeypatch):
    """GLIDE's files in a folder as they are published, small; what is fetched from there goes to `ours` beside it."""
    for tower, state in write_glide(folder).items():
        monkeypatch.setitem(glide.PARAMETERS, tower, sum(t.numel() for t in state.values()))
    monkeypatch.setattr(glide, "URL", folder.as_uri() + "/{}.pt")
    monkeypatch.setenv("MTL_ANAGRAM_CACHE", str(folder.parent / "ours"))


@pytest.fixture
def clip(tmp_path, monkeypatch):
    """The published files' folder; the hub gives the merges."""
    publish(tmp_path / "clip", monkeypatch)
    merges = str(tmp_path / "clip" / "merges.txt")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo_id, name, subfolder: merges)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "clip"


def test_glide_is_downloaded_once_and_then_there(clip, monkeypatch):
    expected = load_noise_clip(clip).embed_text(["a duck"])
    assert torch.equal(load_noise_clip("glide").embed_text(["a duck"]), expected)
    assert sorted(p.name for p in OURS.iterdir()) == sorted(glide.FILES)
    shutil.rmtree(clip)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(load_noise_clip("glide").embed_text(["a duck"]), expected)


def test_offline_without_the_files(clip, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"clip_image_enc.pt.*HF_HUB_OFFLINE is set: unset it once"):
        load_noise_clip("glide")
    assert not OURS.exists()


@pytest.mark.parametrize("damage, message", [("cut", "download it again"), ("gone", "try again later")])
def test_a_download_that_fails_leaves_nothing_and_can_be_tried_again(clip, damage, message):
    path = clip / "clip_image_enc.pt"
    whole = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(whole[:3000])
    with pytest.raises(SourceError, match=message):
        load_noise_clip("glide")
    assert list(OURS.iterdir()) == []
    path.write_bytes(whole)
    load_noise_clip("glide")


def test_a_published_file_of_another_size(clip, monkeypatch):
    monkeypatch.setitem(glide.PARAMETERS, "clip_text_enc", 71_679_488)
    with pytest.raises(SourceError, match=r"clip_text_enc.pt .*cut off or damaged"):
        load_noise_clip("glide")
    assert [path.name for path in OURS.iterdir()] == ["clip_image_enc.pt"]


def test_a_folder_of_that_name_goes_first(clip):
    clip.rename("glide")
    load_noise_clip("glide")
    assert not OURS.exists()


def test_old_pickles_and_views_of_one_storage_load(tmp_path):
    states = write_glide(tmp_path)
    expected = load_noise_clip(tmp_path).embed_text(["a duck"])
    state = states["clip_text_enc"]
    name = "blocks.input.w_pos"
    state[name] = torch.cat([state[name], state[name]])[: len(state[name])]
    torch.save(state, tmp_path / "clip_text_enc.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_noise_clip(tmp_path).embed_text(["a duck"]), expected)


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
