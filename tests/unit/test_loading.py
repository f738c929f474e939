"""Loading: folders as published, mixed dtypes, and every way in which files can be wrong."""

import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtl_anagram.errors import InputError, SourceError, WeightsError
from mtl_anagram.models import load_noise_clip, load_t5, load_unet
from tests.unit import tiny

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def release(tmp_path):
    tiny.write_unet(tmp_path / "unet", tiny.STAGE_1)
    return tmp_path


def test_loaded_module_is_ready_to_use(release):
    unet = load_unet(release)
    assert not unet.training
    assert not any(p.requires_grad or p.is_meta for p in unet.parameters())
    assert {p.dtype for p in unet.parameters()} == {torch.float32}
    assert load_unet(release / "unet", subfolder=None).config == unet.config


def test_weights_lie_as_others_expect_them(release, tmp_path):
    """safetensors saves no other layout, and optimizers such as L-BFGS look at a weight as a vector."""
    unet = load_unet(release, device="cpu")
    save_file(unet.state_dict(), tmp_path / "again.safetensors")
    torch.nn.utils.parameters_to_vector(unet.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16"])
def test_any_dtype(release, dtype):
    unet = load_unet(release, dtype=dtype)
    assert str(unet.dtype).endswith(str(dtype).removeprefix("torch."))
    assert torch.isfinite(unet(torch.randn(1, 3, 16, 16), 5, torch.randn(1, 4, 16)).float()).all()


def test_mixed_dtypes_become_the_widest(release):
    path = release / "unet" / FILE
    state = {name: value.half() for name, value in load_file(path).items()}
    state["conv_in.weight"] = state["conv_in.weight"].float()
    save_file(state, path)
    assert {p.dtype for p in load_unet(release).parameters()} == {torch.float32}
    assert {p.dtype for p in load_unet(release, dtype=torch.float16).parameters()} == {torch.float16}


def test_overflow_of_the_asked_dtype_is_told_from_damage(release):
    path = release / "unet" / FILE
    save_file({**load_file(path), "conv_in.bias": torch.full((8,), 1e6)}, path)
    with pytest.raises(WeightsError, match="overflow torch.float16: load in float32 or bfloat16"):
        load_unet(release, dtype=torch.float16)
    load_unet(release, dtype=torch.bfloat16)


def test_absent_things_say_what_is_there(release, tmp_path):
    with pytest.raises(SourceError, match="no folder 'text_encoder'"):
        load_t5(release)
    with pytest.raises(SourceError, match="the folder holds config.json"):
        load_unet(release, variant="fp16")
    with pytest.raises(SourceError, match="no folder on this machine and no hub id"):
        load_unet(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="is a file"):
        load_unet(release / "unet" / FILE)
    (release / "unet" / FILE).rename(release / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(SourceError, match="pickled .bin is not read"):
        load_unet(release)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"device": "cuda:99"}, "device='cuda:99'.*CUDA devices: use 'cpu'"),
        ({"dtype": "int8"}, "dtype='int8'.*float32"),
    ],
)
def test_bad_arguments(release, arguments, message):
    with pytest.raises(InputError, match=message):
        load_unet(release, **arguments)


def test_pickles_run_no_code(tmp_path):
    tiny.write_clip(tmp_path)
    (tmp_path / "clip_text_enc.safetensors").unlink()

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"blocks.input.w_voc": Attack()}, tmp_path / "clip_text_enc.pt")
    with pytest.raises(SourceError, match="weights-only"):
        load_noise_clip(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_hub_ids_are_tried_and_an_unreachable_hub_is_explained(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SourceError, match="hub cannot be reached"):
        load_unet("nobody/no-such-model")


@pytest.mark.parametrize(
    "name, message",
    [
        ("GatedRepoError", "accept its licence"),
        ("RepositoryNotFoundError", "no such repository"),
        ("429", "answers 429.*wait some minutes.*give a folder"),
        ("500", "answers 500.*later.*give a folder"),
        ("403", "answers 403.*accept its licence.*give a folder"),
    ],
)
def test_answers_of_the_hub(monkeypatch, name, message):
    """The client raises a server's answer as the cause of a file that is not in the cache."""
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(*_, **__):
        if hasattr(errors, name):
            raise getattr(errors, name).__new__(getattr(errors, name))
        cause = OSError("from the server")
        cause.response = SimpleNamespace(status_code=int(name))
        raise errors.LocalEntryNotFoundError("not in the cache") from cause

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(SourceError, match=message) as caught:
        load_unet("owner/model")
    assert "cannot be reached" not in str(caught.value)


def test_a_hub_repository_loads_through_the_cache(monkeypatch, release):
    import huggingface_hub
    from huggingface_hub import errors

    asked = []

    def fetch(repo_id, name, subfolder=None):
        asked.append(name)
        path = release / subfolder / name
        if not path.is_file():
            raise errors.EntryNotFoundError.__new__(errors.EntryNotFoundError)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    unet = load_unet("owner/model")
    assert asked == ["config.json", FILE]
    assert unet.config == load_unet(release).config
