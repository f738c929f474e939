"""What the host has set does not matter, and what it does with a network works: defaults, gradients, export."""

import contextlib

import torch

from mtl_anagram import Recipe, UpscaleRecipe
from mtl_anagram.cascade import embedded_folder
from mtl_anagram.models import UNet, UNetConfig, load_judge, load_noise_clip, load_t5, load_unet
from mtl_anagram.views import get_views
from mtl_anagram.views.motion import Moving
from tests.unit import tiny
from tests.unit.tiny_requests import files, on_cpu
from tests.unit.tiny_upscaler import write_upscaler


@contextlib.contextmanager
def other_defaults():
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def test_the_hosts_defaults_change_no_picture(make, cascade_folder, tmp_path):
    stage_3 = write_upscaler(tmp_path / "stage_3")
    request = {"prompts": ["a duck", "a rabbit", "a cat"], "views": ["jigsaw", "negate", "patch_permute"]}
    request |= {"recipe": Recipe.corrected(), "negative": "a house"}
    request["upscale"] = UpscaleRecipe(num_inference_steps=2, views="all", noise_level=9)
    expected = make("one", model=on_cpu(cascade_folder, stage_3=stage_3), **request)
    with other_defaults():
        own = on_cpu(cascade_folder, stage_3=stage_3, prompt_cache=tmp_path / "cache")
        found = make("two", model=own, **request)
    assert files(found[0].folder) == files(expected[0].folder)
    assert len(found[0].pictures) == 3


def results(folder, x, ids, t):
    """Something of every network, on inputs made before."""
    text = load_t5(folder / "stage_1", device="cpu")(ids)
    streamed = load_t5(folder / "stage_1", device="cpu", streamed=True)(ids)
    unet = load_unet(folder / "stage_1", device="cpu")
    context = unet.prepare(text)
    found = [text, streamed, unet(x, 500, text), unet(x, t, context)]
    found += unet.text_maps(x, t, context, (1, 3), resolution=16).values()
    clip = load_noise_clip(folder / "noise_clip", device="cpu")
    judge, size = load_judge(embedded_folder(), device="cpu"), clip.image_encoder.image_size
    found.append(Moving(get_views(["flip+negate"])[0], x[0]).at(0.3))
    return [*found, clip.embed_image(x[..., :size, :size], 5), clip.embed_text(["a duck"]), judge(x)]


def test_the_hosts_defaults_change_no_network(cascade_folder):
    draws = torch.Generator().manual_seed(0)
    x, ids = torch.randn(2, 3, 64, 64, generator=draws), torch.tensor([[5, 9, 30, 1]] * 2)
    t = torch.tensor(500)
    with torch.no_grad():
        expected = results(cascade_folder, x, ids, t)
    with other_defaults(), torch.inference_mode():
        found = results(cascade_folder, x, ids, t)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))


def test_a_network_loaded_in_inference_mode_takes_part_in_gradients(cascade_folder):
    with torch.inference_mode():
        unet = load_unet(cascade_folder / "stage_1")
        clip = load_noise_clip(cascade_folder / "noise_clip")
    assert not any(p.is_inference() for p in [*unet.parameters(), *clip.parameters()])
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    maps = unet.text_maps(x, 5, torch.randn(1, 4, 16), (0, 2), resolution=16)
    assert torch.autograd.grad(sum(m.sum() for m in maps.values()), x)[0].abs().max() > 0


@torch.no_grad()
def test_an_exported_network_takes_any_number_of_rows():
    wide = {"block_out_channels": [160, 160], "attention_head_dim": 32}  # whose convolutions go by squares
    unet = UNet(UNetConfig.from_dict(tiny.STAGE_2 | tiny.TWO_LEVELS | wide)).eval().requires_grad_(False)
    x, text, labels = torch.randn(3, 6, 16, 16), torch.randn(3, 5, 16), {"class_labels": torch.tensor(50)}
    rows = torch.export.Dim("rows", min=2, max=64)
    shapes = {"x": {0: rows}, "t": None, "text": {0: rows}, **dict.fromkeys(labels)}
    exported = torch.export.export(unet, (x, torch.tensor(5), text), labels, dynamic_shapes=shapes).module()
    for count in (2, 6):
        x, text = torch.randn(count, *x.shape[1:]), torch.randn(count, *text.shape[1:])
        expected = unet(x, 33, text, **labels)
        assert torch.allclose(exported(x, torch.tensor(33), text, **labels), expected, atol=1e-5)
