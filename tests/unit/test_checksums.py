"""What identifies weights: small files whole, large ones by a sample, those of the hub's cache by their names."""

import json

import pytest
from safetensors.torch import load_file, save_file

import mtl_anagram.files.checksums as module
from mtl_anagram import InputError, SourceError, generate_anagram
from mtl_anagram.files.checksums import SAMPLED, checksum_of, combined_checksum
from mtl_anagram.generate import repeat_anagram
from tests.helpers import sha256


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file that counts as large: 64 samples of 10 bytes of 10,000."""
    monkeypatch.setattr(module, "WHOLE", 1000)
    monkeypatch.setattr(module, "SAMPLE", 10)
    path = tmp_path / "large.safetensors"
    path.write_bytes(bytes(i % 251 for i in range(10_000)))
    return path


def test_small_files_are_read_whole(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"{}")
    assert checksum_of(path) == sha256(path)
    with pytest.raises(SourceError, match="none"):
        checksum_of(tmp_path / "none")


def test_large_files_are_sampled_and_other_weights_differ(large):
    first = checksum_of(large)
    assert first.startswith(SAMPLED)
    assert checksum_of(large) == first
    content = large.read_bytes()
    one_weight_in_25 = bytes(byte ^ 1 if i % 100 == 0 else byte for i, byte in enumerate(content))
    ends = (b"x" + content[1:], content[:-1] + b"x", content + b"\0", content[:-1])
    for other in (*ends, one_weight_in_25):
        large.write_bytes(other)
        assert checksum_of(large) != first


def test_a_record_of_either_kind_can_be_made_again(large, tmp_path):
    """Metadata of older versions has whole files' sha256; the hub's cache has it for nothing, a folder has not."""
    sampled, whole = checksum_of(large), sha256(large)
    assert checksum_of(large, like=whole) == whole
    blob = tmp_path / "blobs" / whole
    blob.parent.mkdir()
    blob.write_bytes(large.read_bytes())
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    assert checksum_of(link) == whole
    assert checksum_of(link, like=sampled) == sampled
    assert combined_checksum({"a": whole}) != combined_checksum({"a": sampled})


@pytest.mark.parametrize("recorded", ["by samples", "by whole files, as versions before did"])
def test_a_picture_is_repeated_with_the_same_weights_alone(own_folder, tmp_path, monkeypatch, recorded):
    monkeypatch.setattr(module, "WHOLE", 2000)
    request = {"num_inference_steps": 1, "size": 16, "stop_after": 16, "model": own_folder, "device": "cpu"}
    (made,) = generate_anagram("", ["a duck", "a cat"], ["identity", "flip"], tmp_path / "out", **request)
    path = made.folder / "metadata.json"
    metadata = json.loads(path.read_text())
    files = metadata["weights"]["files"]
    assert {value.startswith(SAMPLED) for value in files.values()} == {True, False}
    if recorded != "by samples":
        files = {name: sha256(own_folder / name) for name in files}
        metadata["weights"]["files"] = files
        metadata["request"]["weights_sha256"] = combined_checksum(files)
        path.write_text(json.dumps(metadata))
    again = repeat_anagram(path, tmp_path / "again", "cpu", model=own_folder)
    assert again.pictures[16].read_bytes() == made.pictures[16].read_bytes()
    weights = own_folder / "stage_1" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1e-3 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(InputError, match="name the same weights"):
        repeat_anagram(path, tmp_path / "other", "cpu", model=own_folder)
