"""Malformed input of every kind, through the public entrances: refused in words, before anything is written.

Each case ends in an error of ours, a ValueError or an OSError, whose message names the value or the file and
what to do about it; no file or folder is made, changed or left behind.
"""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtl_anagram import Recipe, generate_anagram, repeat_anagram
from mtl_anagram.errors import AnagramError, ConfigError
from mtl_anagram.files.hub import POINTER
from mtl_anagram.models import load_noise_clip, load_t5, load_tokenizer, load_unet
from tests.unit import tiny
from tests.unit.tiny_requests import REQUEST

NAN, INF, HUGE = math.nan, math.inf, 10**400
WEIGHTS = "diffusion_pytorch_model.safetensors"
UNET_1, UNET_2 = f"stage_1/unet/{WEIGHTS}", f"stage_2/unet/{WEIGHTS}"
T5 = "stage_1/text_encoder/model.safetensors"
IMAGE, TEXT = "noise_clip/clip_image_enc.safetensors", "noise_clip/clip_text_enc.safetensors"
PIECES = "stage_1/tokenizer/spiece.model"


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # relative paths of the cases lead here


def tree():
    """All files and folders of a test, with what changes when one is written."""
    found = {path: path.stat() for path in Path().rglob("*")}
    return {path: path.is_file() and (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def load_all(folder):
    """Everything that sampling reads, in its order."""
    for load, part in ((load_unet, "stage_1"), (load_unet, "stage_2"), (load_t5, "stage_1")):
        load(folder / part)
    load_tokenizer(folder / "stage_1")
    load_noise_clip(folder / "noise_clip")


def generate(model, **changes):
    request = {**REQUEST, "save_dir": "out", "model": model, "device": "cpu", "stop_after": 8, **changes}
    return generate_anagram(**request)


def refused(call, *fragments):
    """call() ends in an error of ours that says all the fragments, and leaves no trace on the disk."""
    before = tree()
    with pytest.raises(AnagramError) as caught:
        call()
    assert isinstance(caught.value, ValueError | OSError)
    message = str(caught.value)
    missing = [fragment for fragment in fragments if fragment not in message]
    assert not missing, f"{missing} not in {message!r}"
    assert 30 <= len(message) < 3000, f"no limit and no remedy, or too long to be read: {message!r}"
    assert tree() == before
    return caught.value


def test_the_undamaged_input_is_taken(cascade_folder, cascade):
    load_all(cascade_folder)
    generate(cascade)
    assert generate(cascade)[0].skipped
    repeat_anagram("out/0009/metadata.json", "again", model=cascade)


@pytest.mark.parametrize(
    "changes, fragments",
    [
        ({"prompts": ["a duck", " \t "]}, ["' \\t '"]),
        ({"prompts": ["a \ud800 duck", "a rabbit"]}, ["\\ud800"]),
        ({"views": ["identity", "skew"], "view_args": [None, {"factor": NAN}]}, ["factor=nan"]),
        ({"seed": 2**63}, ["seed=9223372036854775808", "from 0 to"]),
        ({"guidance_scale": HUGE}, ["guidance_scale=1000", "finite number"]),
        ({"recipe": "released"}, ["recipe='released'"]),
        ({"model": 3}, ["source=3", "hub id"]),
        ({"model": "no/such/folder"}, ["no/such/folder", "check the path"]),
        ({"save_dir": "a\0b"}, ["\\x00"]),
        ({"save_dir": "\ud800"}, ["\\ud800"]),
        ({"save_dir": 300 * "x"}, [300 * "x"]),
        ({"concepts": ["duck"]}, ["concepts", "a list of 2"]),
        ({"views": ["identity", "pixel_permute"]}, ["size=8 px", "'pixel_permute'"]),
        ({"stop_after": 100}, ["stop_after=100", "[8, 32]"]),
        ({"stop_after": [8]}, ["stop_after=[8]"]),
        ({"recipe": Recipe.released(map_resolution=7)}, ["attention at 0 px"]),
    ],
)
def test_arguments(cascade, changes, fragments):
    changes = dict(changes)
    refused(lambda: generate(changes.pop("model", cascade), **changes), *fragments)


DELETE = object()


@pytest.mark.parametrize(
    "part, field, values",
    [
        ("unet", "cross_attention_dim", ["8", 1.5, True, 0, 2**70, HUGE, [8], NAN, None, DELETE]),
        ("unet", "norm_eps", ["1", True, 0, -1.0, NAN, INF, HUGE, [1.0], None]),
        ("unet", "block_out_channels", ["abcd", 3, None, [], [[]], 17 * [8], [8, "x", None, {}]]),
        ("unet", "act_fn", ["other", 7.5, [0], {"x": [NAN]}]),
        ("text_encoder", "d_kv", ["8", True, 0, HUGE, DELETE]),
        ("text_encoder", "feed_forward_proj", ["relu", None, DELETE]),
    ],
)
def test_configs(own_folder, part, field, values):
    folder, load = own_folder / "stage_1", {"unet": load_unet, "text_encoder": load_t5}[part]
    path = folder / part / "config.json"
    content = json.loads(path.read_text())
    for value in values:
        changed = {**content, field: value}
        path.write_text(json.dumps({n: v for n, v in changed.items() if v is not DELETE}))
        error = refused(lambda: load(folder), field, f"{part}/config.json", "download the file again")
        assert isinstance(error, ConfigError)


@pytest.mark.parametrize(
    "content",
    [b"", b'{"in_channels": 3,', '{"name": "tiny"}'.encode("utf-16"), 200_000 * b'{"a":', b"3.5", b"[{}]"],
)
def test_files_that_are_no_json_object(own_folder, cascade, content):
    for name in ("stage_1/unet/config.json", "stage_2/unet/config.json"):
        before = (own_folder / name).read_bytes()
        (own_folder / name).write_bytes(content)
        refused(lambda: load_all(own_folder), name, "download")
        (own_folder / name).write_bytes(before)
    metadata = Path("out/0009/metadata.json")
    metadata.parent.mkdir(parents=True)
    metadata.write_bytes(content)
    refused(lambda: repeat_anagram(metadata, "again", model=cascade), "metadata.json")
    refused(lambda: generate(cascade), "metadata.json cannot be read", "overwrite=True")


@pytest.mark.parametrize("name", [UNET_1, UNET_2, T5, PIECES, IMAGE, TEXT, "stage_1/unet/config.json"])
def test_a_git_lfs_pointer_is_named_with_its_remedy(own_folder, name):
    (own_folder / name).write_bytes(POINTER + b"spec/v1\noid sha256:0123\nsize 4567\n")
    refused(lambda: load_all(own_folder), name, "Git LFS pointer", "git lfs pull")
    refused(lambda: generate(str(own_folder)), name, "git lfs pull")


@pytest.mark.parametrize("name", [UNET_1, UNET_2, T5, IMAGE, TEXT])
def test_weights_cut_off_or_with_a_flipped_bit_in_the_header(own_folder, name):
    content, r = (own_folder / name).read_bytes(), random.Random(name)
    length = int.from_bytes(content[:8], "little")
    for share in (0.0, r.uniform(0, 0.01), r.uniform(0.01, 0.5), r.uniform(0.5, 1)):
        (own_folder / name).write_bytes(content[: int(len(content) * share)])
        refused(lambda: load_all(own_folder), name, "download it again")
    for _ in range(3):
        damaged = bytearray(content)
        damaged[r.randrange(8 + length)] ^= 1 << r.randrange(8)
        (own_folder / name).write_bytes(damaged)
        refused(lambda: load_all(own_folder), name)


@pytest.mark.parametrize(
    "name, tensor, change, fragment",
    [
        (UNET_1, "conv_in.bias", lambda t: t.int(), "not floating: conv_in.bias"),
        (UNET_2, "conv_out.weight", lambda t: t * NAN, "conv_out.weight is not finite"),
        (UNET_2, "conv_norm_out.bias", lambda t: None, "missing: conv_norm_out.bias"),
        (T5, "encoder.final_layer_norm.weight", lambda t: t.to(torch.float8_e4m3fn), "not floating"),
        (IMAGE, "blocks.input.w_t", lambda t: None, "blocks.input.w_t"),
        (TEXT, "blocks.output.f.w", lambda t: t[:8], "from one release"),
    ],
)
def test_tensors_of_another_make(own_folder, name, tensor, change, fragment):
    state = load_file(own_folder / name)
    changed = change(state.pop(tensor))
    save_file(state if changed is None else {**state, tensor: changed.contiguous()}, own_folder / name)
    refused(lambda: load_all(own_folder), fragment)
    refused(lambda: generate(str(own_folder), stop_after=None), fragment)


def test_networks_that_do_not_belong_together(own_folder):
    tiny.write_unet(own_folder / "stage_2" / "unet", {**tiny.STAGE_2, "encoder_hid_dim": 32})
    refused(lambda: generate(str(own_folder), stop_after=None, recipe=Recipe.plain()), "encoder_hid_dim=32")
