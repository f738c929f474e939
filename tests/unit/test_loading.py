"""Loading: folders as published, mixed dtypes, and every way in which files can be wrong."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtl_anagram.errors import ConfigError, InputError, SourceError, WeightsError
from mtl_anagram.models import load_noise_clip, load_t5, load_tokenizer, load_unet
from tests.unit import tiny

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def release(tmp_path):
    tiny.write_unet(tmp_path / "unet", tiny.STAGE_1)
    return tmp_path


def change(path, **changes):
    """Rewrite a safetensors file with tensors replaced (a tensor) or taken out (None)."""
    state = load_file(path)
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    save_file(state, path)


def test_loaded_module_is_ready_to_use(release):
    unet = load_unet(release)
    assert not unet.training
    assert not any(p.requires_grad or p.is_meta for p in unet.parameters())
    assert {p.dtype for p in unet.parameters()} == {torch.float32}
    assert load_unet(release / "unet", subfolder=None).config == unet.config


def test_on_a_cpu_the_channels_of_a_pixel_stay_together_up_to_the_result(release):
    """A layer that went back to planes would cost a copy of the whole picture there."""
    unet = load_unet(release, device="cpu")
    x, text = torch.randn(2, 3, 32, 32), torch.randn(2, 4, 16)
    result = unet(x, 5, text)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert not result.is_contiguous()
    assert unet(x.requires_grad_(), 5, text).is_contiguous()  # gradients take longer in that layout
    with torch.no_grad():
        assert torch.equal(unet(x, 5, text), result)


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


def test_mixed_dtypes_become_the_widest_for_a_unet_and_stay_for_t5(release):
    path = release / "unet" / FILE
    state = {name: value.half() for name, value in load_file(path).items()}
    state["conv_in.weight"] = state["conv_in.weight"].float()
    save_file(state, path)
    assert {p.dtype for p in load_unet(release).parameters()} == {torch.float32}
    assert {p.dtype for p in load_unet(release, dtype=torch.float16).parameters()} == {torch.float16}

    tiny.write_t5(release / "text_encoder")
    path = release / "text_encoder" / "model.safetensors"
    full = load_t5(release)
    state = {n: v if "DenseReluDense.wo" in n else v.half() for n, v in load_file(path).items()}
    save_file(state, release / "text_encoder" / "model.fp16.safetensors")
    mixed = load_t5(release, variant="fp16")
    assert {p.dtype for p in mixed.parameters()} == {torch.float16, torch.float32}
    ids = torch.tensor([[5, 9, 30, 1]])
    assert (mixed(ids).float() - full(ids)).abs().max() < 0.05 * full(ids).abs().max()


@pytest.mark.parametrize("keep", ["shared.weight", "encoder.embed_tokens.weight", "both"])
def test_t5_embedding_under_either_name(release, keep):
    tiny.write_t5(release / "text_encoder")
    expected = load_t5(release)(torch.tensor([[5, 9, 1]]))
    path = release / "text_encoder" / "model.safetensors"
    state = load_file(path)
    table = state.pop("shared.weight")
    if keep != "encoder.embed_tokens.weight":
        state["shared.weight"] = table
    if keep != "shared.weight":
        state["encoder.embed_tokens.weight"] = table.clone()
    save_file(state, path)
    assert torch.equal(load_t5(release)(torch.tensor([[5, 9, 1]])), expected)


def test_two_unlike_copies_of_the_embedding_are_refused(release):
    tiny.write_t5(release / "text_encoder")
    path = release / "text_encoder" / "model.safetensors"
    table = load_file(path)["shared.weight"]
    change(path, encoder__embed_tokens__weight=table + 1)
    with pytest.raises(WeightsError, match="second time"):
        load_t5(release)


def test_sharded_with_either_index_name_and_a_bin_twin_beside(release):
    folder = release / "unet"
    expected = load_unet(release)
    state = load_file(folder / FILE)
    (folder / FILE).unlink()
    names = sorted(state)
    shards = {f"diffusion_pytorch_model.fp16-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for shard, members in shards.items():
        save_file({name: state[name] for name in members}, folder / shard)
    (folder / "diffusion_pytorch_model.fp16.bin").write_bytes(b"never opened")
    index = json.dumps({"metadata": {}, "weight_map": {n: s for s, ms in shards.items() for n in ms}})
    for name in ("diffusion_pytorch_model.safetensors.index.fp16.json",
                 "diffusion_pytorch_model.fp16.safetensors.index.json"):  # fmt: skip
        (folder / name).write_text(index)
        loaded = load_unet(release, variant="fp16")
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))
        (folder / name).unlink()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"conv_in__weight": None}, "1 tensors missing: conv_in.weight"),
        ({"stray": torch.zeros(1)}, "1 tensors unexpected: stray"),
        ({"conv_in__bias": torch.zeros(9)}, r"misshapen: conv_in.bias \(9,\), expected \(8,\)"),
        ({"conv_in__bias": torch.full((8,), float("nan"))}, "conv_in.bias is not finite; it is damaged"),
        ({"conv_in__bias": torch.zeros(8, dtype=torch.int64)}, "not floating: conv_in.bias"),
    ],
)
def test_tensors_that_do_not_fit_are_named(release, changes, message):
    change(release / "unet" / FILE, **changes)
    with pytest.raises(WeightsError, match=message):
        load_unet(release)


def test_overflow_of_the_asked_dtype_is_told_from_damage(release):
    change(release / "unet" / FILE, conv_in__bias=torch.full((8,), 1e6))
    with pytest.raises(WeightsError, match="overflow torch.float16: load in float32 or bfloat16"):
        load_unet(release, dtype=torch.float16)
    load_unet(release, dtype=torch.bfloat16)


@pytest.mark.parametrize("keep", [0, 3, 8, 100, 0.5, -1])
def test_truncated_files(release, keep):
    path = release / "unet" / FILE
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(SourceError, match="not a whole safetensors file"):
        load_unet(release)


def test_something_else_than_safetensors(release):
    (release / "unet" / FILE).write_bytes(b"PK\x03\x04 a zip file, say" * 50)
    with pytest.raises(SourceError, match="delete it and download it again"):
        load_unet(release)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"in_channels": 3}', "\x00\xff"])
def test_broken_configs(release, content):
    (release / "unet" / "config.json").write_text(content)
    with pytest.raises((SourceError, ConfigError)):
        load_unet(release)


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
    "weight_map, message",
    [
        ({}, "no weight_map"),
        ({"a": "../../x.safetensors"}, "plain file name"),
        ({"a": "gone"}, "has no gone"),
    ],
)
def test_broken_indexes(release, weight_map, message):
    (release / "unet" / FILE).unlink()
    index = release / "unet" / f"{FILE}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(SourceError, match=message):
        load_unet(release)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"device": "gpu"}, "is no device"),
        ({"device": "cuda:99"}, "CUDA devices"),
        ({"device": 3}, "must be a name"),
        ({"dtype": "int8"}, "not supported"),
        ({"dtype": torch.int64}, "not supported"),
        ({"variant": "../x"}, "must be a word"),
        ({"subfolder": 3}, "must be a name"),
    ],
)
def test_bad_arguments(release, arguments, message):
    with pytest.raises(InputError, match=message):
        load_unet(release, **arguments)


def test_noise_clip_from_safetensors_or_pt(tmp_path):
    tiny.write_clip(tmp_path / "a")
    expected = load_noise_clip(tmp_path / "a").embed_text(["a duck"])
    (tmp_path / "b").mkdir()
    for name in ("clip_image_enc", "clip_text_enc"):
        torch.save(load_file(tmp_path / "a" / f"{name}.safetensors"), tmp_path / "b" / f"{name}.pt")
    with pytest.raises(SourceError, match="byte-pair merges"):
        load_noise_clip(tmp_path / "b")
    clip = load_noise_clip(tmp_path / "b", merges=tmp_path / "a" / "merges.txt")
    assert torch.equal(clip.embed_text(["a duck"]), expected)


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
    torch.save([torch.zeros(3)], tmp_path / "clip_text_enc.pt")
    with pytest.raises(WeightsError, match="no flat state dict"):
        load_noise_clip(tmp_path)


def test_hub_ids_are_tried_and_an_unreachable_hub_is_explained(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
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
        ("EntryNotFoundError", "has no config.json"),
    ],
)
def test_answers_of_the_hub(monkeypatch, name, message):
    import huggingface_hub
    from huggingface_hub import errors

    kind = getattr(errors, name)

    def refuse(*_, **__):
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(SourceError, match=message):
        load_unet("owner/model")


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


def test_tokenizer_file_absent(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(SourceError, match="has no spiece.model"):
        load_tokenizer(tmp_path)
