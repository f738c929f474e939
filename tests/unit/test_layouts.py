"""Folders as the releases publish them, small: variants, shards, twins, old configs."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtl_anagram.models import load_unet
from mtl_anagram.models.loading import check_unet_files
from tests.unit import tiny

UNET = "diffusion_pytorch_model"
# What newer programs write into config.json and what it had not yet when the IF models were published.
NEW_FIELDS = {
    "addition_time_embed_dim", "attention_type", "class_embeddings_concat", "dropout", "num_attention_heads",
    "reverse_transformer_layers_per_block", "transformer_layers_per_block",
}  # fmt: skip


def lay_out(folder, base, *, variant=None, shards=1, half=lambda name: True, transformers=True, keep=False):
    """A model's one float32 file in the layout asked for, in its place or (keep) beside it; each has a pickled twin."""
    path = folder / f"{base}.safetensors"
    state = load_file(path)
    if not keep:
        path.unlink()
    dot = "" if variant is None else f".{variant}"
    if variant == "fp16":
        state = {name: value.half() if half(name) else value for name, value in state.items()}
    names, weight_map = list(state), {}
    for i in range(shards):
        part = f"-{i + 1:05d}-of-{shards:05d}" if shards > 1 else ""
        file = f"{base}{dot}{part}.safetensors"
        save_file({name: state[name] for name in names[i::shards]}, folder / file, metadata={"format": "pt"})
        (folder / file.replace(".safetensors", ".bin")).write_bytes(b"pickled twin, never opened")
        weight_map |= dict.fromkeys(names[i::shards], file)
    if shards > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        end = f".safetensors.index{dot}.json" if transformers else f"{dot}.safetensors.index.json"
        (folder / f"{base}{end}").write_text(json.dumps(index))
    return state


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shards, transformers", [(1, True), (3, True), (3, False)])
def test_unet_folders(tmp_path, variant, shards, transformers):
    folder = tmp_path / "unet"
    tiny.write_unet(folder, tiny.STAGE_2)
    state = lay_out(folder, UNET, variant=variant, shards=shards, transformers=transformers)
    check_unet_files(tmp_path, variant=variant)
    unet = load_unet(tmp_path, variant=variant)
    assert unet.dtype == (torch.float32 if variant is None else torch.float16)
    loaded = unet.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize("config", [tiny.STAGE_1, tiny.STAGE_2], ids=["stage I", "stage II"])
@pytest.mark.parametrize("without", [NEW_FIELDS, NEW_FIELDS | {"encoder_hid_dim_type"}])
def test_an_old_config(tmp_path, config, without):
    tiny.write_unet(tmp_path / "unet", config)
    expected = load_unet(tmp_path)
    path = tmp_path / "unet" / "config.json"
    content = json.loads(path.read_text())
    old = {name: content[name] for name in content.keys() - without}
    path.write_text(json.dumps({"_diffusers_version": "0.15.0.dev0", **old}))
    unet = load_unet(tmp_path)
    assert unet.config == expected.config
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), expected.parameters(), strict=True))
