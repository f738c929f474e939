"""What makes the networks fast changes nothing: each form against the plain one, in values, gradients and memory."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.functional import vjp

from mtl_anagram import InputError
from mtl_anagram.models import UNet, UNetConfig
from mtl_anagram.models.attention import attention_with_columns
from mtl_anagram.models.unet_blocks import scaled_norm, upconv
from mtl_anagram.models.winograd import Conv3x3
from tests.helpers import Operations, noise, relative
from tests.readme import ROOT
from tests.unit.tiny import STAGE_1, TWO_LEVELS


def plain(q, k, v, columns):
    """The output and the asked columns from the whole softmax."""
    p = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
    return p @ v, p[..., : columns.shape[1]] @ columns[:, None].to(p)


def compare(form, dtype=torch.float32, queries=70, keys=85, width=20, tolerance=1e-5):
    """Both results and all three gradients of a form, against those of `plain` in float64."""
    draws = torch.Generator().manual_seed(0)
    q, k, v = (
        # As a UNet makes them: heads beside each other in memory.
        torch.randn(2, rows, 3, width, generator=draws).to(dtype).transpose(1, 2).requires_grad_()
        for rows in (queries, keys, keys)
    )
    columns = torch.zeros(2, 66, 3)
    columns[0, [2, 65], [0, 1]] = 1
    columns[1, [0, 9, 10], [0, 1, 2]] = 1
    results = form(q, k, v, columns)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = plain(*exact, columns)
    grads = [torch.randn(x.shape, generator=draws) for x in wanted]
    own = [g.to(x.dtype) for g, x in zip(grads, results, strict=True)]
    results += torch.autograd.grad(results, (q, k, v), own)
    wanted += torch.autograd.grad(wanted, exact, [g.double() for g in grads])
    assert results[1].dtype == torch.float32
    for value, expected in zip(results, wanted, strict=True):
        assert relative(value.double(), expected) < tolerance


@pytest.mark.parametrize("options", [{}, {"queries": 3, "width": 32}])
def test_token_maps_equal_those_of_the_whole_softmax(options):
    compare(attention_with_columns, **options)
    compare(attention_with_columns, torch.bfloat16, tolerance=0.03, **options)


def test_the_softmax_is_never_there_as_a_whole():
    q, k, v = (torch.randn(1, 2, 256, 8, requires_grad=True) for _ in range(3))
    columns, sizes = torch.eye(5)[None, :, :2], []
    with Operations(lambda name, made: sizes.extend(map(torch.numel, made))):
        out, chosen = attention_with_columns(q, k, v, columns)
        torch.autograd.grad(out.sum() + chosen.square().sum(), (q, k, v))
    assert 2 * 256 * 16 <= max(sizes) < 2 * 256 * 256 / 4


INTERPRETED = """
import torch
from mtl_anagram.models.triton_attention import attention_with_columns as form
from tests.unit.test_fast_networks import compare
compare(form)
compare(form, queries=3, keys=66, width=32)
compare(form, torch.float16, tolerance=5e-3)
"""
COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from mtl_anagram.models.triton_attention import _backward, _forward
for kernel, more in ((_forward, {}), (_backward, {"of_keys": False}), (_backward, {"of_keys": True})):
    constants = {"block": 64, "width_block": 64, "asked_block": 16, **more}
    of = {"scale": "fp32", **dict.fromkeys(("heads", "queries", "keys", "tokens", "width", "asked"), "i32")}
    of |= dict.fromkeys(("columns", "chosen", "log_sums", "d_chosen", "shared"), "*fp32")
    of |= dict.fromkeys(constants, "constexpr")
    signature = {name: of.get(name, "*fp16") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constants)
    assert "mma" in triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]
"""


@pytest.mark.parametrize("script, interpret", [(INTERPRETED, "1"), (COMPILED, "0")])
def test_the_triton_kernel(script, interpret, tmp_path):
    """Its numbers by Triton's interpreter; and that it compiles for a GPU, which accepts less and need not be there."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True)


def test_token_maps_are_chosen_by_name():
    unet = UNet(UNetConfig.from_dict(STAGE_1)).eval().requires_grad_(False)
    for name, said in (("triton", "triton"), ("flash", "token_maps='flash'.*'fused', 'triton'")):
        unet.token_maps = name
        with pytest.raises(InputError, match=said):
            unet.text_maps(torch.zeros(1, 3, 16, 16), 1, torch.zeros(1, 5, 16), (0, 1), resolution=8)


def test_a_doubled_maps_convolution():
    conv = torch.nn.Conv2d(3, 5, 3, padding=1).double()
    for height, width in ((16, 24), (2, 3)):  # enough pixels for the short way, and too few
        x = torch.randn(2, 3, height, width, dtype=torch.float64)
        expected, found = conv(F.interpolate(x, scale_factor=2.0)), upconv(conv, x)
        assert relative(found, expected) < 1e-12
        mine, wanted = (torch.autograd.grad(y.sin().sum(), conv.weight)[0] for y in (found, expected))
        assert relative(mine, wanted) < 1e-12


@pytest.mark.parametrize("rows, wide, out, height, width", [(1, 160, 400, 64, 48), (33, 176, 160, 8, 16)])
def test_a_convolution_by_squares(rows, wide, out, height, width):
    """One picture in several bands, several pictures in one; all else is torch's own."""
    conv, made = Conv3x3(wide, out).requires_grad_(False), []
    x, along = noise(rows, wide, height, width), noise(rows, out, height, width, seed=1)
    with Operations(lambda name, _: made.append(name)):
        found, mine = vjp(conv, x, along)
    assert not {"convolution", "convolution_backward"} & {*made}
    exact = conv.weight.double(), conv.bias.double()
    wanted, theirs = vjp(lambda x: F.conv2d(x, *exact, padding=1), x.double(), along.double())
    assert relative(found.double(), wanted) < 2e-6 > relative(mine.double(), theirs)
    for part in (x[:1, :, :8, :8], x[:1, :, 1:, 1:]):  # few pixels, odd sides
        assert torch.equal(conv(part), F.conv2d(part, conv.weight, conv.bias, padding=1))
    conv.requires_grad_(True)
    assert torch.autograd.grad(conv(x).sum(), conv.weight)[0].any()


def test_a_norm_with_scale_and_shift():
    norm, x = torch.nn.GroupNorm(2, 6).double(), torch.randn(3, 6, 4, 5, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    for rows in (1, 3):
        scale, shift = torch.randn(2, rows, 6, 1, 1, dtype=torch.float64)
        expected = norm(x) * scale + shift
        assert relative(scaled_norm(norm, x, scale.flatten(1), shift.flatten(1)), expected) < 1e-12


@torch.no_grad()
def test_rows_go_through_in_blocks_that_do_not_grow():
    unet = UNet(UNetConfig.from_dict({**STAGE_1, **TWO_LEVELS, "block_out_channels": [8, 8]})).eval()
    x, text, t = torch.randn(600, 3, 16, 16), torch.randn(600, 2, 16), torch.arange(600)
    largest, ran, sizes = {}, [], []
    unet.conv_in.register_forward_pre_hook(lambda _, args: ran.append(len(args[0])))
    for rows in (256, 600):
        context = unet.prepare(text[:rows])
        sizes.clear()
        with Operations(lambda name, made: sizes.extend(map(torch.numel, made))):
            found = unet(x[:rows], t[:rows], context)
        largest[rows] = max(sizes)
    assert ran == [256, 200, 200, 200]  # 256 rows of 16 x 16 x 8 values are what goes at once
    assert largest[600] <= largest[256]
    for row in (0, 199, 200, 599):
        alone = unet(x[row, None], t[row], text[row, None])
        assert relative(found[row, None], alone) < 1e-5


def test_rows_side_by_side_give_what_one_after_the_other_give():
    unet = UNet(UNetConfig.from_dict({**STAGE_1, **TWO_LEVELS})).eval().requires_grad_(False)
    x, text, workers, found = torch.randn(6, 3, 16, 16), torch.randn(6, 4, 16), set(), []
    unet.conv_in.register_forward_pre_hook(lambda *_: workers.add(torch.get_num_threads()))
    torch.set_num_threads(4)
    for unet.side_by_side in (False, True):
        picture, spans = x.clone().requires_grad_(), [(0, 1), (1, 3), (1, 2)] * 2
        maps = unet.text_maps(picture, torch.arange(6), text, spans, resolution=8).values()
        found.append(torch.autograd.grad(sum((layer**2).mean() for layer in maps), picture)[0])
        found.append(unet(x, torch.arange(6), text))
    assert relative(found[2], found[0]) < 1e-5 > relative(found[3], found[1])
    assert workers == {4, 1}
    assert torch.get_num_threads() == ThreadPoolExecutor(1).submit(torch.get_num_threads).result() == 4
    alone = text[:1].clone().requires_grad_()  # a text, one row: on the fast way torch crashes
    unet.requires_grad_(False).conv_norm_out.requires_grad_(True)
    unet(x[:1], 1, alone).sum().backward()
    assert all(y.grad.any() for y in (alone, unet.conv_norm_out.weight))
    unet.down_blocks.requires_grad_(True)  # a weight that learns has its gradient
    assert all(y.requires_grad for y in unet.text_maps(x, 1, text, (1, 3), resolution=8).values())
