"""What the host has set does not matter, and what it does with a network works: defaults, compile, export."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mtl_anagram.models import UNet, UNetConfig, load_judge, load_noise_clip, load_t5, load_unet
from tests.unit import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "weights"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    tiny.write_unet(folder / "unet", tiny.STAGE_1)
    tiny.write_t5(folder / "text_encoder")
    tiny.write_clip(folder / "clip")
    return folder


def results(folder, x, ids, t):
    """Something of every network, on inputs made before."""
    text = load_t5(folder, device="cpu")(ids)
    streamed = load_t5(folder, device="cpu", streamed=True)(ids)
    unet = load_unet(folder, device="cpu")
    context = unet.prepare(text)
    found = [text, streamed, unet(x, 500, text), unet(x, t, context)]
    found += unet.text_maps(x, t, context, (1, 3), resolution=16).values()
    clip, judge = load_noise_clip(folder / "clip", device="cpu"), load_judge(WEIGHTS, device="cpu")
    size = clip.image_encoder.image_size
    return [*found, clip.embed_image(x[..., :size, :size], 5), clip.embed_text(["a duck"]), judge(x)]


def test_the_hosts_defaults_change_nothing(folder):
    draws = torch.Generator().manual_seed(0)
    x, ids, t = (
        torch.randn(2, 3, 64, 64, generator=draws),
        torch.tensor([[5, 9, 30, 1]] * 2),
        torch.tensor(500),
    )
    with torch.no_grad():
        expected = results(folder, x, ids, t)
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            found = results(folder, x, ids, t)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))


def test_a_network_loaded_in_inference_mode_takes_part_in_gradients(folder):
    with torch.inference_mode():
        unet = load_unet(folder)
        clip = load_noise_clip(folder / "clip")
    assert not any(p.is_inference() for p in [*unet.parameters(), *clip.parameters()])
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    maps = unet.text_maps(x, 5, torch.randn(1, 4, 16), (0, 2), resolution=16)
    assert torch.autograd.grad(sum(m.sum() for m in maps.values()), x)[0].abs().max() > 0


SMALL_2 = {
    **tiny.STAGE_2,
    "block_out_channels": [8, 16],
    "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
    "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
}


def network():
    unet = UNet(UNetConfig.from_dict(SMALL_2)).eval().requires_grad_(False)
    return unet, torch.randn(3, 6, 16, 16), torch.randn(3, 5, 16), {"class_labels": torch.tensor(50)}


@torch.no_grad()
def test_one_graph_for_all_steps():
    """No breaks, and no new graph for another timestep, if it is a tensor."""
    unet, x, text, labels = network()
    torch._dynamo.reset()
    compiled, context = torch.compile(unet, backend="eager", fullgraph=True), unet.prepare(text)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t in (957, 500, 0):
            expected = unet(x, t, context, class_labels=50)
            assert torch.equal(compiled(x, torch.tensor(t), context, **labels), expected)


@torch.no_grad()
def test_an_exported_network_takes_any_number_of_rows():
    unet, x, text, labels = network()
    rows = torch.export.Dim("rows", min=2, max=64)
    shapes = {"x": {0: rows}, "t": None, "text": {0: rows}, **dict.fromkeys(labels)}
    exported = torch.export.export(unet, (x, torch.tensor(5), text), labels, dynamic_shapes=shapes).module()
    for count in (2, 6):
        x, text = torch.randn(count, *x.shape[1:]), torch.randn(count, *text.shape[1:])
        expected = unet(x, 33, text, **labels)
        assert torch.allclose(exported(x, torch.tensor(33), text, **labels), expected, atol=1e-5)


def test_everything_loads_where_numpy_is_not_installed(folder, tmp_path):
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    script = f"""
import sys
sys.modules["numpy"] = None
import torch
from mtl_anagram.files.prompt_cache import PromptCache
from mtl_anagram.files.shards import read_safetensors
from mtl_anagram.models import load_judge, load_noise_clip, load_t5, load_unet
for tower in ("clip_image_enc", "clip_text_enc"):
    state = read_safetensors({str(folder / "clip")!r} + f"/{{tower}}.safetensors")
    torch.save(dict(state), f"{pickled}/{{tower}}.pt")
clip = load_noise_clip({str(pickled)!r}, merges={str(folder / "clip" / "merges.txt")!r})
clip.scorer(["a duck"])(torch.zeros(1, 1, 3, *[clip.image_encoder.image_size] * 2), 3)
load_t5({str(folder)!r}, streamed=True)(torch.tensor([[5, 9, 1]]))
load_unet({str(folder)!r}), load_judge({str(WEIGHTS)!r})
made = PromptCache("{tmp_path}/c").states(["a"], {{}}, lambda texts: torch.randn(1, 2, 3))
assert torch.equal(PromptCache("{tmp_path}/c").states(["a"], {{}}, None), made)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, check=True)
