"""Plans and the commands info and download: what they say of folders, hubs and machines; a machine's memory."""

import json
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch

import mtl_anagram.models.machine as machine
import mtl_anagram.models.planning as planning
from mtl_anagram import Cascade, InputError
from mtl_anagram.__main__ import main
from mtl_anagram.models import load_unet
from mtl_anagram.models.machine import Memory, memory_of
from mtl_anagram.models.planning import FITS, OVERHEAD, STREAMED, TIGHT, TOO_LARGE, UNKNOWN, describe, plan

CPU = torch.device("cpu")


def plan_of(source, dtype=torch.float32, variant=None, **options):
    cascade = Cascade.from_pretrained(source, device="cpu", variant=variant)
    return plan(cascade.sources, cascade.variants, dtype=dtype, device=CPU, name=cascade.name, **options)


def has(monkeypatch, total, free=None):
    found = None if total is None else Memory(total, total if free is None else free)
    monkeypatch.setattr(planning, "memory_of", lambda device: found)


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No file is here and no hub is asked."""
    refuse = Mock(side_effect=AssertionError("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MTL_ANAGRAM_CACHE", str(tmp_path / "ours"))
    return tmp_path


def test_a_folders_plan_is_what_its_files_hold(cascade_folder):
    found = plan_of(cascade_folder, size=16)
    networks = {network.name: network for network in found.networks}
    assert list(networks) == ["text_encoder", "unet_1", "unet_2", "noise_clip"]
    assert all(network.here for network in found.networks)
    unet = networks["unet_1"]
    assert unet.parameters == sum(p.numel() for p in load_unet(cascade_folder / "stage_1").parameters())
    assert unet.memory == 4 * unet.parameters
    weights = cascade_folder / "stage_1" / "unet" / "diffusion_pytorch_model.safetensors"
    assert unet.disk == weights.stat().st_size
    for stage in found.stages:
        members = [networks[name] for name in stage.networks]
        step = max(network.step for network in members)
        assert stage.needed == OVERHEAD["cpu"] + step + sum(network.memory for network in members)
    assert [stage.name for stage in found.stages] == ["text", "stage I", "stage II"]


def test_a_step_grows_as_the_work_does(cascade_folder):
    def steps(**changes):
        return {n.name: n.step for n in plan_of(cascade_folder, **changes).networks if n.step}

    one = steps(size=16)
    assert steps(size=16, views=4) == steps(size=16, batch_size=2) == {n: 2 * step for n, step in one.items()}
    assert steps(size=32) == {name: 4 * step for name, step in one.items()}
    assert steps(size=16, dtype=torch.float16) == {name: step // 2 for name, step in one.items()}
    single, half = (plan_of(cascade_folder, dtype).networks for dtype in (torch.float32, torch.float16))
    for one, other in zip(single, half, strict=True):  # the noise-aware CLIP stays in float32
        assert other.memory == one.memory / (1 if one.name == "noise_clip" else 2)
    for changes in ({"views": 0}, {"batch_size": "2"}, {"size": 0}):
        with pytest.raises(InputError, match=next(iter(changes))):
            plan_of(cascade_folder, **changes)


@pytest.mark.parametrize(
    "total, free, verdict",
    [(1 << 40, None, FITS), (1 << 40, 1000, TIGHT), (1000, None, TOO_LARGE), (None, None, UNKNOWN)],
)
def test_verdicts(cascade_folder, monkeypatch, total, free, verdict):
    has(monkeypatch, total, free)
    assert {stage.verdict for stage in plan_of(cascade_folder).stages[1:]} == {verdict}


def test_a_releases_plan_needs_no_hub(nowhere, monkeypatch):
    has(monkeypatch, 1 << 40)
    full, half = plan_of("IF-M", variant="fp32"), plan_of("IF-M", torch.float16)
    assert {n.name: n.parameters for n in full.networks} == {
        "text_encoder": 4_762_310_656, "unet_1": 371_605_830, "unet_2": 461_064_198,
        "text_encoder_3": 340_387_840, "unet_3": 473_398_020, "autoencoder_3": 55_325_927, "noise_clip": 158_123_264,
    }  # fmt: skip
    assert not any(network.here for network in full.networks)
    assert [stage.name for stage in full.stages] == ["text", "stage I", "stage II", "text III", "stage III"]
    text, unet = full.networks[0], full.networks[1]
    assert round(text.disk / 1e9, 2) == round(9.99 + 9.06, 2)  # the shards' published sizes
    assert round(half.networks[0].disk / 1e9, 2) == round(9.96 + 1.58, 2)
    assert (half.networks[1].disk, unet.disk) == (2 * unet.parameters, 4 * unet.parameters)
    decoder = half.networks[5]
    assert decoder.memory == 4 * decoder.parameters  # half precision overflows there
    assert 1.0e9 < unet.step < 1.3e9  # counted tensor by tensor: 1145 MB with the gradient
    assert list(nowhere.iterdir()) == []


def test_t5_runs_from_its_files_where_it_does_not_fit(nowhere, monkeypatch):
    for free, verdict in ((8 << 30, STREAMED), (24 << 30, FITS)):
        has(monkeypatch, free)
        assert plan_of("IF-M").stages[0].verdict == verdict


def test_a_hub_id_that_is_no_release_is_unknown_until_it_is_here(nowhere):
    found = plan_of("owner/model")
    assert [(n.here, n.parameters, n.memory) for n in found.networks] == 2 * [(False, None, None)]
    assert {(stage.needed, stage.verdict) for stage in found.stages} == {(None, UNKNOWN)}
    assert " ? " in "\n".join(describe(found))


def test_info(cascade_folder, capsys, monkeypatch):
    command = ["info", "--model", str(cascade_folder), "--device", "cpu", "--size", "16"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("tiny, float32 on cpu\n")
    assert {"text_encoder", "unet_1", "noise_clip", "unet_2", "fits"} <= set(shown.replace(",", "").split())
    assert "this machine has" in shown
    assert main([*command, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["networks"][1]["parameters"] == plan_of(cascade_folder).networks[1].parameters
    has(monkeypatch, None)
    assert "this machine has" not in "\n".join(describe(plan_of(cascade_folder)))


def test_a_containers_limit_and_an_unknown_system(monkeypatch, tmp_path):
    found = memory_of(CPU)
    assert 0 < found.free <= found.total < 1 << 50
    limit, used = tmp_path / "max", tmp_path / "current"
    monkeypatch.setattr(machine, "_system", lambda: Memory(16_000, 9_000))
    monkeypatch.setattr(machine, "CONTROL_GROUPS", [(str(limit), str(used))])
    assert memory_of(CPU) == Memory(16_000, 9_000)
    for said, found in (("max", (16_000, 9_000)), (str(1 << 62), (16_000, 9_000)), ("8000", (8_000, 5_000))):
        limit.write_text(said)
        used.write_text("3000")
        assert memory_of(CPU) == Memory(*found)
    (tmp_path / "memory.stat").write_text("anon 1500\ninactive_file 500\n")  # of what is used, kept files
    assert memory_of(CPU) == Memory(8_000, 5_500)
    monkeypatch.setattr(machine, "_system", lambda: None)
    assert memory_of(CPU) is None
