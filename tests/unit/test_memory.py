"""Memory: the estimate beside what a process really takes, what is counted, and what a machine has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mtl_anagram.memory as module
from mtl_anagram.memory import Machine, machine_of, peak_of, text_activations, unet_activations
from mtl_anagram.models.configs import UNetConfig
from mtl_anagram.models.t5 import T5Encoder
from mtl_anagram.models.t5_config import T5Config
from tests.unit.tiny import STAGE_1, STAGE_2

MIB = 1 << 20
# Wide enough that activations are most of what a step takes, small enough for seconds.
WIDE = {
    **STAGE_1,
    "block_out_channels": [64, 96, 128, 128],
    "attention_head_dim": 32,
    "encoder_hid_dim": 64,
    "norm_num_groups": 32,
}
CHILD = """
import json, sys
import torch
from mtl_anagram.models.configs import UNetConfig
from mtl_anagram.models.unet import UNet

torch.set_num_threads(1)
config, rows, size, guided = json.loads(sys.argv[1])
config = UNetConfig.from_dict(config)
unet = UNet(config).eval().requires_grad_(False)
labels = None if config.class_embed_type is None else 50
# Kernels and their libraries are set up by a first, small step, which is not what is measured.
def step(rows, size, resolution):
    with torch.no_grad():
        context = unet.prepare(torch.randn(2 * rows, 77, config.encoder_hid_dim))
        unet(torch.randn(2 * rows, config.in_channels, size, size), 5, context, labels)
    if guided:
        x = torch.randn(rows, config.in_channels, size, size, requires_grad=True)
        maps = unet.text_maps(x, 5, context[rows:], (0, 1), labels, resolution=resolution)
        torch.autograd.grad(sum(layer.sum() for layer in maps.values()), x)

step(1, 16, 8)
def status(name):  # of this process alone: getrusage's peak begins at the parent's size
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))

before = status("VmRSS")
step(rows, size, size // 2)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="a process's memory is read from Linux's /proc"
)
@pytest.mark.parametrize("rows, size, guided", [(4, 64, False), (4, 64, True)])
def test_the_estimate_is_what_a_process_takes(rows, size, guided):
    """Where the C library gives every buffer back at once; by default it keeps some of the smaller ones."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    argument = json.dumps([WIDE, rows, size, guided])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, argument], capture_output=True, text=True, check=True, env=environment
    )
    measured = int(done.stdout)
    estimate = unet_activations(
        UNetConfig.from_dict(WIDE), rows=rows, size=size, guided=guided, dtype=torch.float32
    )
    assert measured > 80 * MIB
    assert 0.85 < measured / estimate < 1.15, f"measured {measured / MIB:.0f} MiB of {estimate / MIB:.0f}"


def meta(*shape):
    return torch.empty(shape, device="meta")  # float32


def test_what_lives_at_the_same_time_is_counted():
    given = meta(1000)  # 4000 bytes, there before

    def work():
        a = given + 1  # 4000
        b = a.view(10, 100)[:, :50]  # no memory of its own
        c = b * 2  # 2000
        del a, b
        return torch.cat([c, c])  # 4000 with 2000, after 4000 + 2000

    assert peak_of(work) == 6000
    assert peak_of(lambda: given.view(-1)) == 0
    assert peak_of(lambda: [given + 1, given + 2, given + 3]) == 12000


def test_attention_counts_as_the_fused_kernel():
    q = meta(1, 2, 512, 16)
    assert peak_of(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)) == 4 * q.numel()


def test_the_estimate_grows_as_the_work_does():
    tiny_1, tiny_2 = UNetConfig.from_dict(STAGE_1), UNetConfig.from_dict(STAGE_2)

    def needs(config=tiny_1, rows=2, size=64, guided=False, dtype=torch.float32):
        return unet_activations(config, rows=rows, size=size, guided=guided, dtype=dtype)

    assert 1.9 < needs(rows=4) / needs() < 2.1
    assert 3.5 < needs(size=128) / needs() < 4.1
    assert 0.45 < needs(dtype=torch.float16) / needs() < 0.65
    assert needs(guided=True) > 1.5 * needs()
    assert needs(tiny_2, size=256) > 4 * needs()
    t5 = T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    assert 1.9 < text_activations(T5Encoder, t5, rows=8) / text_activations(T5Encoder, t5, rows=4) < 2.1


def test_the_machines_memory():
    found = machine_of(torch.device("cpu"))
    assert found is not None
    assert 0 < found.free <= found.total < 1 << 50


def test_a_containers_limit_and_an_unknown_system(monkeypatch):
    monkeypatch.setattr(module, "_meminfo", lambda: (16_000, 9_000))
    monkeypatch.setattr(module, "_control_group", lambda: iter([(8_000, 3_000)]))
    assert machine_of(torch.device("cpu")) == Machine("cpu", 8_000, 5_000)
    monkeypatch.setattr(
        module, "_control_group", lambda: iter([(1 << 62, 0)])
    )  # how "none" looks in version 1
    assert machine_of(torch.device("cpu")) == Machine("cpu", 16_000, 9_000)
    monkeypatch.setattr(module, "_meminfo", lambda: None)
    monkeypatch.setattr(module, "_sysconf", lambda: None)
    assert machine_of(torch.device("cpu")) is None


def test_memory_of_a_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3, 8))
    assert machine_of(torch.device("cuda:1")) == Machine("cuda:1", 8, 3)
