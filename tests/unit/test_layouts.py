"""Folders as the releases publish them, small: variants, shards, twins, old configs, the schedulers' files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtl_anagram.models import load_unet
from mtl_anagram.models.configs import FIXED
from mtl_anagram.models.loading import check_unet_files
from mtl_anagram.sampling import Schedule
from tests.unit import tiny

UNET = "diffusion_pytorch_model"
# What config.json had when the IF models were published; newer programs write more.
OLD_FIELDS = {
    "_class_name", "_diffusers_version", "act_fn", "addition_embed_type", "addition_embed_type_num_heads",
    "attention_head_dim", "block_out_channels", "center_input_sample", "class_embed_type", "conv_in_kernel",
    "conv_out_kernel", "cross_attention_dim", "cross_attention_norm", "down_block_types", "downsample_padding",
    "dual_cross_attention", "encoder_hid_dim", "flip_sin_to_cos", "freq_shift", "in_channels", "layers_per_block",
    "mid_block_only_cross_attention", "mid_block_scale_factor", "mid_block_type", "norm_eps", "norm_num_groups",
    "num_class_embeds", "only_cross_attention", "out_channels", "projection_class_embeddings_input_dim",
    "resnet_out_scale_factor", "resnet_skip_time_act", "resnet_time_scale_shift", "sample_size",
    "time_cond_proj_dim", "time_embedding_act_fn", "time_embedding_dim", "time_embedding_type",
    "timestep_post_act", "up_block_types", "upcast_attention", "use_linear_projection",
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


@pytest.mark.parametrize("config", [tiny.STAGE_1, tiny.STAGE_2], ids=["stage I", "stage II"])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shards, transformers", [(1, True), (3, True), (3, False)])
def test_unet_folders(tmp_path, config, variant, shards, transformers):
    folder = tmp_path / "unet"
    tiny.write_unet(folder, config)
    state = lay_out(folder, UNET, variant=variant, shards=shards, transformers=transformers)
    check_unet_files(tmp_path, variant=variant)
    unet = load_unet(tmp_path, variant=variant)
    assert unet.dtype == (torch.float32 if variant is None else torch.float16)
    loaded = unet.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize("config", [tiny.STAGE_1, tiny.STAGE_2], ids=["stage I", "stage II"])
@pytest.mark.parametrize("without", [{"encoder_hid_dim_type"}, set()])
def test_an_old_config(tmp_path, config, without):
    """Its fields alone, also without the one that a published file is known to lack, mean the same network."""
    tiny.write_unet(tmp_path / "unet", config)
    expected = load_unet(tmp_path)
    path = tmp_path / "unet" / "config.json"
    content = json.loads(path.read_text())
    kept = (OLD_FIELDS | {"encoder_hid_dim_type"}) - without
    old = {name: value for name, value in content.items() if name in kept}
    path.write_text(json.dumps({"_diffusers_version": "0.15.0.dev0", **old}))
    assert len(content.keys() - kept) >= 7  # some are missing
    unet = load_unet(tmp_path)
    assert unet.config == expected.config
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), expected.parameters(), strict=True))
    assert {name for name in content if name not in kept} <= FIXED.keys()


def test_the_published_schedulers():
    """Stage I's and II's, and the one that noises stage II's input: it is stage II's table again, not loaded."""
    common = {
        "_class_name": "DDPMScheduler", "beta_end": 0.02, "beta_schedule": "squaredcos_cap_v2", "beta_start": 0.0001,
        "clip_sample": True, "clip_sample_range": 1.0, "num_train_timesteps": 1000, "prediction_type": "epsilon",
        "trained_betas": None,
    }  # fmt: skip
    clipped = {"dynamic_thresholding_ratio": 0.95, "thresholding": True, "variance_type": "learned_range"}
    learned = {**common, **clipped, "_diffusers_version": "0.15.0.dev0"}
    first = {"sample_max_value": 1.5, "lambda_min_clipped": -5.1}
    assert Schedule.from_config({**learned, **first}, 30) == Schedule.stage_1(30)
    assert Schedule.from_config({**learned, "sample_max_value": 1.0}, 30) == Schedule.stage_2(30)
    noising = {**common, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
    noising |= {"thresholding": False, "variance_type": "fixed_small"}
    read = Schedule.from_config(noising, 30)
    assert torch.equal(read.alphas_cumprod, Schedule.stage_2(30).alphas_cumprod)
