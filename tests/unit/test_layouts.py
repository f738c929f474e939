"""Folders as the releases publish them, small: variants, shards, twins, old configs, the schedulers' files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtl_anagram.errors import WeightsError
from mtl_anagram.models import load_t5, load_unet
from mtl_anagram.models.configs import FIXED
from mtl_anagram.models.loading import check_unet_files
from mtl_anagram.sampling import Schedule
from tests.unit import tiny

UNET, T5 = "diffusion_pytorch_model", "model"
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


def lay_out(folder, base, *, variant=None, shards=1, half=lambda name: True):
    """Replace a model's one float32 file by the layout asked for; a pickled twin lies beside each file."""
    path = folder / f"{base}.safetensors"
    state = load_file(path)
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
        (folder / f"{base}.safetensors.index{dot}.json").write_text(json.dumps(index))
    return state


@pytest.mark.parametrize("config", [tiny.STAGE_1, tiny.STAGE_2], ids=["stage I", "stage II"])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_unet_folders(tmp_path, config, variant, shards):
    folder = tmp_path / "unet"
    tiny.write_unet(folder, config)
    state = lay_out(folder, UNET, variant=variant, shards=shards)
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
    path.write_text(
        json.dumps(
            {"_diffusers_version": "0.15.0.dev0"}
            | {name: value for name, value in content.items() if name in kept}
        )
    )
    assert len(content.keys() - kept) >= 7  # some are missing
    unet = load_unet(tmp_path)
    assert unet.config == expected.config
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), expected.parameters(), strict=True))
    assert {name for name in content if name not in kept} <= FIXED.keys()


@pytest.mark.parametrize("name", ["shared.weight", "encoder.embed_tokens.weight"])
def test_a_text_encoders_mixed_shards(tmp_path, name):
    """As published: two fp16 shards with float32 among them, one copy of the embedding, twins that have both."""
    folder = tmp_path / "text_encoder"
    tiny.write_t5(folder)
    full = load_t5(tmp_path)
    path = folder / f"{T5}.safetensors"
    state = load_file(path)
    state[name] = state.pop("shared.weight")
    save_file(state, path)
    state = lay_out(folder, T5, variant="fp16", shards=2, half=lambda key: "DenseReluDense.wo" not in key)
    (folder / "pytorch_model.fp16-00001-of-00002.bin").write_bytes(b"never opened")
    (folder / "pytorch_model.bin.index.fp16.json").write_text("{}")
    encoder = load_t5(tmp_path, variant="fp16")
    kinds = {key: value.dtype for key, value in encoder.state_dict().items()}
    assert {kind for key, kind in kinds.items() if "DenseReluDense.wo" in key} == {torch.float32}
    assert {kind for key, kind in kinds.items() if "DenseReluDense.wo" not in key} == {torch.float16}
    ids = torch.tensor([[5, 9, 30, 1]])
    assert (encoder(ids).float() - full(ids)).abs().max() < 0.05 * full(ids).abs().max()
    assert load_t5(tmp_path, variant="fp16", dtype=torch.float32).dtype == torch.float32


def test_the_check_of_a_unets_files_finds_what_loading_would(tmp_path):
    tiny.write_unet(tmp_path / "unet", tiny.STAGE_1)
    path = tmp_path / "unet" / f"{UNET}.safetensors"
    state = load_file(path)
    for name, tensor in (("conv_in.bias", torch.zeros(9)), ("stray", torch.zeros(1))):
        save_file({**state, name: tensor}, path)
        messages = []
        for check in (check_unet_files, load_unet):
            with pytest.raises(WeightsError, match=name) as caught:
                check(tmp_path)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_the_published_schedulers():
    """Stage I's and II's, and the one that noises stage II's input: it is stage II's table again, not loaded."""
    common = {
        "_class_name": "DDPMScheduler",
        "beta_end": 0.02,
        "beta_schedule": "squaredcos_cap_v2",
        "beta_start": 0.0001,
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "trained_betas": None,
    }
    learned = {
        **common,
        "dynamic_thresholding_ratio": 0.95,
        "thresholding": True,
        "variance_type": "learned_range",
    }
    first = {
        **learned,
        "_diffusers_version": "0.15.0.dev0",
        "sample_max_value": 1.5,
        "lambda_min_clipped": -5.1,
    }
    assert Schedule.from_config(first, 30) == Schedule.stage_1(30)
    assert Schedule.from_config({**learned, "sample_max_value": 1.0}, 30) == Schedule.stage_2(30)
    noising = {**common, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
    noising |= {"thresholding": False, "variance_type": "fixed_small"}
    read = Schedule.from_config(noising, 30)
    assert torch.equal(read.alphas_cumprod, Schedule.stage_2(30).alphas_cumprod)
