"""Cascade: the layouts it reads, what it loads, where models live, schedules, embedded weights."""

import json
import shutil
import weakref

import pytest
import torch

from mtl_anagram import Cascade, ConfigError, InputError, Recipe
from mtl_anagram.cascade import embedded_folder, models
from mtl_anagram.models import load_t5, load_tokenizer
from tests.helpers import sha256
from tests.unit.tiny_requests import on_cpu, sample

PARTS = ["stage_1", "stage_2", "noise_clip"]
MODELS = ("unet_1", "unet_2", "text_encoder", "tokenizer", "noise_clip")
SCHEDULER = {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range"}
SCHEDULER |= {"thresholding": False, "clip_sample_range": 0.5}


def last_picture(cascade, **changes):
    return list(sample(cascade, **changes).pictures.values())[-1]


# Layouts


def test_a_cascades_folder(cascade_folder):
    cascade = on_cpu(cascade_folder)
    assert (cascade.name, cascade.device, cascade.dtype) == ("tiny", torch.device("cpu"), torch.float32)
    assert [part for part, source in cascade.sources.items() if source] == PARTS
    assert cascade.recipe == Recipe.released()
    assert cascade.unet_2.config.in_channels == 6
    for name in ("unet_1", "unet_2", "text_encoder", "noise_clip"):
        found = {(p.dtype, p.device.type, p.requires_grad) for p in getattr(cascade, name).parameters()}
        assert found == {(torch.float32, "cpu", False)}


def test_parts_of_a_folder_may_be_missing(own_folder):
    shutil.rmtree(own_folder / "stage_2")
    shutil.rmtree(own_folder / "noise_clip")
    (own_folder / "cascade.json").unlink()
    cascade = on_cpu(str(own_folder))
    assert cascade.name == "own"
    for part, model in (("stage_2", "unet_2"), ("noise_clip", "noise_clip")):
        with pytest.raises(InputError, match=f"own has no {part}.*{part}="):
            getattr(cascade, model)
    assert {name.split("/")[0] for name in cascade.checksums()} == {"stage_1"}


@pytest.mark.parametrize("inside", ["", "unet"])
def test_parts_by_themselves(cascade_folder, cascade, inside):
    parts = {"stage_2": cascade_folder / "stage_2" / inside, "noise_clip": cascade_folder / "noise_clip"}
    apart = on_cpu(str(cascade_folder / "stage_1"), **parts)
    assert apart.name == str(cascade_folder / "stage_1")
    assert apart.checksums() == cascade.checksums()
    assert torch.equal(last_picture(apart), last_picture(cascade))


def test_a_recipe_of_cascade_json_that_is_none(own_folder):
    (own_folder / "cascade.json").write_text(json.dumps({"recipe": {"balance": True}}))
    with pytest.raises(ConfigError, match=f"cascade.json of {own_folder}.*'balance'"):
        on_cpu(own_folder)


# What is loaded


def test_nothing_is_loaded_before_it_is_used_then_once_and_again_after_release(cascade_folder):
    cascade = on_cpu(cascade_folder)
    assert not set(MODELS) & set(vars(cascade))
    first = {name: getattr(cascade, name) for name in MODELS}
    assert all(getattr(cascade, name) is first[name] for name in MODELS)
    cascade.release("unet_1", "noise_clip")
    again = {name: getattr(cascade, name) for name in MODELS}
    assert {name for name in MODELS if first[name] is not again[name]} == {"unet_1", "noise_clip"}
    kept = weakref.ref(again.pop("unet_2"))
    del first
    cascade.release()
    assert kept() is None  # the memory is given back
    cascade.release("unet_1")  # nothing to forget is no error


def test_the_default_dtype_depends_on_the_device(cascade_folder, monkeypatch):
    monkeypatch.setattr(models, "resolve_device", lambda device: torch.device(device or "cuda"))
    assert Cascade.from_pretrained(cascade_folder).dtype == torch.float16
    assert Cascade.from_pretrained(cascade_folder, dtype="bfloat16").dtype == torch.bfloat16
    assert Cascade.from_pretrained(cascade_folder, device="mps").dtype == torch.float32
    assert on_cpu(cascade_folder, dtype=torch.float16).dtype == torch.float16


def test_t5_is_kept_out_of_half_precision(cascade_folder):
    cascade = on_cpu(cascade_folder, dtype="float16")
    assert {p.dtype for p in cascade.text_encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in cascade.unet_1.parameters()} == {torch.float16}
    assert {p.dtype for p in cascade.noise_clip.parameters()} == {torch.float32}
    text, null = cascade.encode(["a duck"])
    assert text.dtype == null.dtype == torch.float16


def test_encode(cascade_folder, cascade):
    text, null = cascade.encode(["a duck", "a rabbit"])
    assert not text.requires_grad
    ids, mask = load_tokenizer(cascade_folder / "stage_1")(["a rabbit", ""], max_length=77)
    expected = load_t5(cascade_folder / "stage_1")(ids, mask)
    torch.testing.assert_close(torch.stack([text[1], null[0]]), expected, rtol=0, atol=1e-5)


def test_models_loaded_in_inference_mode_can_be_guided(cascade_folder, cascade):
    """Tensors made in inference mode would break the anti-segregation's gradient, now or in a later call."""
    expected = last_picture(cascade)
    fresh = on_cpu(cascade_folder)
    with torch.inference_mode():
        assert torch.equal(last_picture(fresh), expected)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(last_picture(fresh), expected)


# Schedules


@pytest.mark.parametrize("place", ["scheduler", "."])
def test_schedules_come_from_the_release(own_folder, cascade, place):
    for stage in ("stage_1", "stage_2"):
        (own_folder / stage / place).mkdir(exist_ok=True)
        (own_folder / stage / place / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    own = on_cpu(own_folder)
    for stage, stop in ((1, 8), (2, 32)):
        schedule = own.schedule(stage, 5)
        assert (schedule.thresholding, schedule.clip_sample_range) == (False, 0.5)
        assert f"stage_{stage}/scheduler/scheduler_config.json" in own.checksums()
        assert not torch.equal(last_picture(own, stop_after=stop), last_picture(cascade, stop_after=stop))


# The embedded cascade


def test_embedded_files_are_those_of_cascade_json():
    folder = embedded_folder()
    listed = json.loads((folder / "cascade.json").read_text())["files"]
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert set(files) - set(listed) == {"README.md", "cascade.json"}
    assert {name: sha256(files[name]) for name in listed} == listed
    used = {name: value for name, value in listed.items() if not name.startswith(("judge/", "partners"))}
    assert on_cpu(None).checksums() == used
    assert sum(path.stat().st_size for path in files.values()) < 30e6
