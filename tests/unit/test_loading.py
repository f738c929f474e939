"""Loading: folders as published, mixed dtypes, and every way in which files can be wrong."""

from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import load_file, save_file

from mtl_anagram.errors import SourceError, WeightsError
from mtl_anagram.models import load_t5, load_unet
from tests.unit import tiny

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def release(tmp_path):
    tiny.write_unet(tmp_path / "unet", tiny.STAGE_1)
    return tmp_path


def test_a_loaded_module_is_ready_to_use_and_its_weights_lie_as_others_expect_them(release, tmp_path):
    """safetensors saves no other layout, and optimizers such as L-BFGS look at a weight as a vector."""
    unet = load_unet(release)
    assert not unet.training
    assert not any(p.requires_grad for p in unet.parameters())
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


def test_hub_ids_are_tried_and_an_unreachable_hub_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SourceError, match="hub cannot be reached"):
        load_unet("nobody/no-such-model")


def hub_error(name):
    """What the hub's client raises: an error of its own, a server's answer as the cause of one, or the network's."""
    if hasattr(errors, name):
        return getattr(errors, name).__new__(getattr(errors, name))
    if not name.isdigit():
        return type(name, (Exception,), {"__module__": "httpx"})("no route")
    error, cause = errors.LocalEntryNotFoundError("not in the cache"), OSError("from the server")
    cause.response = SimpleNamespace(status_code=int(name))
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error, message",
    [
        (hub_error("GatedRepoError"), "accept its licence"),
        (hub_error("RepositoryNotFoundError"), "no such repository"),
        (hub_error("429"), "answers 429.*wait some minutes"),
        (hub_error("500"), "answers 500.*later"),
        (hub_error("403"), "answers 403.*accept its licence"),
        (hub_error("ConnectError"), "no route.*hub cannot be reached.*connection"),
        (OSError(28, "No space left"), "No space left.*hub cannot be reached, or the disk not be written to"),
    ],
)
def test_what_the_hub_does_not_give_is_explained(monkeypatch, error, message):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", Mock(side_effect=error))
    with pytest.raises(SourceError, match=f"owner/model.*config.json.*{message}.*give a folder") as caught:
        load_unet("owner/model")
    assert ("cannot be reached" in str(caught.value)) == ("cannot be reached" in message)
