"""Malformed input of every kind, through the public entrances: refused in words, before anything is written.

Each case ends in an error of ours, a ValueError or an OSError, whose message names the value or the file and
what to do about it; no step is sampled, and no file or folder is made, changed or left behind.
"""

import gzip
import json
import math
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtl_anagram import Cascade, Recipe, View, generate_anagram, get_views, repeat_anagram
from mtl_anagram.cli import main
from mtl_anagram.errors import AnagramError, ConfigError, SourceError
from mtl_anagram.models import load_noise_clip, load_t5, load_unet
from tests.unit import tiny

NAN, INF, HUGE = math.nan, math.inf, 10**400
WEIGHTS = "diffusion_pytorch_model.safetensors"
UNET_1, UNET_2 = f"stage_1/unet/{WEIGHTS}", f"stage_2/unet/{WEIGHTS}"
T5 = "stage_1/text_encoder/model.safetensors"
IMAGE, TEXT = "noise_clip/clip_image_enc.safetensors", "noise_clip/clip_text_enc.safetensors"
PIECES, MERGES = "stage_1/tokenizer/spiece.model", "noise_clip/merges.txt"
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.95,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.5,
    "thresholding": True,
    "variance_type": "learned_range",
}
REQUEST = {
    "style": "a sketch of",
    "prompts": ["a duck", "a rabbit"],
    "views": ["identity", "rotate_cw"],
    "num_inference_steps": 2,
    "size": 16,
}


class SamplingBegan(Exception):
    """No error of ours, so that a request which goes through fails its test."""


def sampling_began(*_):
    raise SamplingBegan("the input was taken as valid")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a cascade with nothing wrong; cases damage copies of it."""
    folder = tiny.write_cascade(tmp_path_factory.mktemp("whole") / "cascade")
    for stage in ("stage_1", "stage_2"):
        (folder / stage / "scheduler").mkdir()
        (folder / stage / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return folder


@pytest.fixture(scope="module")
def cascade(whole):
    """The same, its networks loaded once for all requests that are wrong in themselves."""
    return Cascade.from_pretrained(whole, device="cpu")


@pytest.fixture(scope="module")
def finished(cascade, tmp_path_factory):
    """An output folder with one finished seed of stage I."""
    out = tmp_path_factory.mktemp("finished")
    generate_anagram(**REQUEST, save_dir=out, stop_after=16, model=cascade)
    return out


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "cascade"))


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # relative paths of the cases lead here


def tree():
    """All files and folders of a test, with what changes when one is written."""
    found = sorted(Path().rglob("*"))
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in found if path.is_file()} | {
        path: None for path in found if not path.is_file()
    }


def generate(model, **changes):
    defaults = {**REQUEST, "save_dir": "out", "model": model, "device": "cpu", "on_step": sampling_began}
    return generate_anagram(**{**defaults, **changes})


def refused(call, *fragments):
    """call() ends in an error of ours that says all the fragments, and leaves no trace on the disk."""
    before = tree()
    with pytest.raises(AnagramError) as caught:
        call()
    assert isinstance(caught.value, ValueError | OSError)
    message = str(caught.value)
    missing = [fragment for fragment in fragments if fragment not in message]
    assert not missing, f"{missing} not in {message!r}"
    assert len(message) >= 30, f"no limit and no remedy: {message!r}"
    assert len(message) < 3000, "the message is too long to be read"
    assert tree() == before
    return caught.value


def case(name, *values):
    return pytest.param(*values, id=name)


def test_the_undamaged_input_is_taken(whole, cascade, copy, finished):
    """What all cases start from is valid, so that each fails for what was changed in it."""
    for model in (str(whole), cascade):
        with pytest.raises(SamplingBegan):
            generate(model)
    load_all(whole)
    assert repeat_anagram(finished / "0000" / "metadata.json", "again", model=cascade).pictures[16].is_file()
    assert generate_anagram(**REQUEST, save_dir=finished, stop_after=16, model=cascade)[0].skipped


# What a caller asks for ------------------------------------------------------------------------------------


class Unfaithful(View):
    """Its arguments() leaves one out, so that metadata could not make it again."""

    name = "unfaithful"

    def __init__(self, bands=2):
        self.bands = bands


class NotJSON(View):
    name = "not_json"

    def __init__(self, bands=2):
        self.bands = bands

    def arguments(self):
        return {"bands": {1, 2}}


def asked(name, changes, *fragments):
    """A case of ARGUMENTS: what is asked for instead of REQUEST's, and what the message must hold."""
    return pytest.param(changes, fragments, id=name)


def second_view(name, **arguments):
    return {"views": ["identity", name], "view_args": [None, arguments]}


ARGUMENTS = [
    asked("prompts-str", {"prompts": "a duck"}, "prompts='a duck'", "must be a list"),
    asked("prompts-none", {"prompts": None}, "prompts=None", "one per view"),
    asked("prompts-empty", {"prompts": []}, "prompts=[]", "one per view"),
    asked("prompts-set", {"prompts": {"a duck"}}, "prompts={'a duck'}", "must be a list"),
    asked("prompts-too-few", {"prompts": ["a duck"]}, "1 prompts for 2 views", "one prompt for each view"),
    asked("prompts-too-many", {"prompts": ["a duck"] * 3}, "3 prompts for 2 views"),
    asked("prompt-int", {"prompts": [3, "a rabbit"]}, "prompt 3 must be a string"),
    asked("prompt-bytes", {"prompts": ["a duck", b"a rabbit"]}, "prompt b'a rabbit'"),
    asked("prompt-none", {"prompts": ["a duck", None]}, "prompt None must be a string"),
    asked("prompt-blank", {"prompts": ["a duck", " \t "]}, "' \\t '", "not empty"),
    asked("bracket-open", {"prompts": ["a [duck", "a rabbit"]}, "a [duck", "unbalanced", "or no brackets"),
    asked("bracket-order", {"prompts": ["a ]duck[", "a rabbit"]}, "a ]duck[", "unbalanced"),
    asked("bracket-empty", {"prompts": ["a [ ] duck", "a rabbit"]}, "are empty", "put the concept between"),
    asked("bracket-two", {"prompts": ["[a] [duck]", "a rabbit"]}, "2 pairs of brackets", "mark only that"),
    asked("bracket-nested", {"prompts": ["a [[duck]]", "a rabbit"]}, "2 pairs of brackets"),
    asked("surrogate", {"prompts": ["a \ud800 duck", "a rabbit"]}, "\\ud800", "half a character"),
    asked(
        "surrogate-plain", {"prompts": ["a duck", "\udfff"], "recipe": Recipe.plain()}, "\\udfff", "remove"
    ),
    asked("too-long", {"prompts": ["a duck", 99 * "a " + "cat"]}, "'cat'", "first 76", "shorten the prompt"),
    asked("too-long-marked", {"prompts": ["a duck", 99 * "a " + "[cat] a"]}, "'cat'", "an earlier word"),
    asked("style-none", {"style": None}, "style=None", "'' for none"),
    asked("style-int", {"style": 3}, "style=3", "must be a string"),
    asked("style-bracket", {"style": "a [big"}, "a [big a duck", "unbalanced"),
    asked("style-surrogate", {"style": "\ud834"}, "\\ud834", "half a character"),
    asked("concepts-str", {"concepts": "duck"}, "concepts='duck'", "list of 2"),
    asked("concepts-int", {"concepts": 7}, "concepts=7", "list of 2, one per prompt"),
    asked("concepts-count", {"concepts": ["duck"]}, "concepts=['duck']", "list of 2"),
    asked("concepts-dict", {"concepts": {"duck": 1, "rabbit": 2}}, "concepts={", "list of 2"),
    asked("concept-int", {"concepts": ["duck", 3]}, "concept 3", "words of the prompt"),
    asked("concept-blank", {"concepts": [" ", None]}, "concept ' '", "words of the prompt"),
    asked("concept-absent", {"concepts": ["wolf", None]}, "'wolf' is not among the tokens", "with brackets"),
    asked("concept-surrogate", {"concepts": ["\ud800", None]}, "\\ud800", "half a character"),
    asked("views-str", {"views": "identity"}, "views='identity'", "give a list"),
    asked("views-none", {"views": None}, "views=None", "give a list"),
    asked("views-int", {"views": 2}, "views=2", "give a list"),
    asked("views-empty", {"views": []}, "views=[]", "give a list"),
    asked("view-unknown", {"views": ["identity", "mirror"]}, "'mirror'", "The views are identity, flip"),
    asked("view-typo", {"views": ["identity", "rotate_clockwise"]}, "did you mean", "rotate_cw"),
    asked("view-int", {"views": ["identity", 3]}, "view 3 (int)", "must be a name"),
    asked("view-none", {"views": [None, "flip"]}, "view None", "or a View instance"),
    asked("view-half", {"views": ["identity", "flip+"]}, "unknown view ''", "'flip+'"),
    asked("view-class", {"views": ["identity", View]}, "must be a name, or a View instance"),
    asked("view-unfaithful", {"views": ["identity", Unfaithful()]}, "Unfaithful", "it must give them all"),
    asked("view-not-json", {"views": ["identity", NotJSON()]}, "NotJSON.arguments() is not JSON"),
    asked("view-args-int", {"view_args": 3}, "view_args=3", "one entry per view"),
    asked("view-args-count", {"view_args": [None]}, "1 entries for 2 views", "give one per view"),
    asked("view-args-entry", {"view_args": [None, 3]}, "view_args=3", "dict of keyword arguments"),
    asked("view-args-unknown", second_view("skew", angle=90), "'angle'", "'skew' takes factor"),
    asked("view-args-none-taken", second_view("flip", factor=1), "'factor'", "takes no arguments"),
    asked("view-args-nan", second_view("skew", factor=NAN), "factor=nan", "from -64 to 64"),
    asked("view-args-inf", second_view("skew", factor=-INF), "factor=-inf", "from -64 to 64"),
    asked("view-args-str", second_view("skew", factor="1.5"), "factor='1.5'", "must be a number"),
    asked("patches-0", second_view("patch_permute", num_patches=0), "num_patches=0", "from 1 to 256"),
    asked("patches-float", second_view("patch_permute", num_patches=2.0), "num_patches=2.0", "whole number"),
    asked("patches-size", second_view("patch_permute", num_patches=7), "size=16 px", "a multiple of 7"),
    asked("view-seed", second_view("jigsaw", seed=-1), "seed=-1", "from 0 to"),
    asked("permutation-none", second_view("permutation"), "'permutation' is missing"),
    asked("permutation-twice", second_view("permutation", permutation=[0, 1, 1, 2]), "some twice", "S^2"),
    asked("permutation-count", second_view("permutation", permutation=[0, 1, 2]), "3 numbers", "no square"),
    asked("permutation-size", second_view("permutation", permutation=list(range(25))), "a multiple of 5"),
    asked("composition-args", second_view("flip+skew", wave=1), "'wave'", "flip, skew"),
    *(
        asked(f"seed-{name}", {"seed": value}, shown, "from 0 to 9223372036854775807")
        for name, value, shown in [
            ("negative", -1, "seed=-1"),
            ("bool", True, "seed=True"),
            ("float", 1.0, "seed=1.0"),
            ("str", "7", "seed='7'"),
            ("none", None, "seed=None"),
            ("nan", NAN, "seed=nan"),
            ("too-large", 2**63, "seed=9223372036854775808"),
            ("set", {4}, "seed={4}"),
            ("in-a-list", [0, 1, -7], "seed=-7"),
            ("str-in-a-list", [0, "1"], "seed='1'"),
        ]
    ),
    asked("seed-none-at-all", {"seed": []}, "seed=[]", "give at least one"),
    *(
        asked(f"size-{value!r}", {"size": value}, f"size={value!r}", "a multiple of 8 up to 1024")
        for value in (0, -16, 4, 17, 16.0, "16", True, NAN, 1032, 2**70)
    ),
    asked(
        "size-of-maps", {"recipe": Recipe(map_resolution=5)}, "size=16", "attention at 1 px", "choose another"
    ),
    *(
        asked(f"stop-after-{value!r}", {"stop_after": value}, f"stop_after={value!r}", "must be 16 (stage I)")
        for value in (0, -16, 32, "64", 16.5, [16], NAN)
    ),
    *(
        asked(
            f"steps-{value!r:.8}",
            {"num_inference_steps": value},
            f"num_inference_steps={value!r}",
            "1 to 1000",
        )
        for value in (0, -1, 1001, 2.5, "10", True, None, NAN, 2**70)
    ),
    *(
        asked(
            f"guidance-{value!r:.8}", {"guidance_scale": value}, f"guidance_scale={value!r}", "finite number"
        )
        for value in (NAN, INF, -1, "10", None, True, HUGE, [10])
    ),
    *(
        asked(f"noise-level-{value!r}", {"noise_level": value}, f"noise_level={value!r}", "from 0 to 999")
        for value in (-1, 1000, 1.5, "50", True, None)
    ),
    *(
        asked(f"batch-{value!r}", {"batch_size": value}, f"batch_size={value!r}", "of at least 1")
        for value in (0, -4, 1.5, "4", True, None)
    ),
    *(
        asked(f"device-{value!r:.8}", {"device": value}, f"device={value!r}", "'cpu'")
        for value in ("gpu", "", "cpu:1", "cuda:99", "cuda:256", "meta", 3, ["cpu"], "\ud800")
    ),
    asked("recipe-name", {"recipe": "released"}, "recipe='released'", "Recipe.released()"),
    asked("recipe-dict", {"recipe": {"balancing": False}}, "recipe={'balancing'", "must be a Recipe"),
    asked("on-step", {"on_step": 3}, "on_step=3", "must be a function"),
    asked("model-int", {"model": 3}, "source=3", "must be a folder's path or a hub id"),
    asked("model-empty", {"model": ""}, "source=''", "must be a folder's path"),
    asked("model-bytes", {"model": b"cascade"}, "source=b'cascade'", "must be a folder's path"),
    asked("model-null", {"model": "a\0b"}, "\\x00", "null character"),
    asked("model-nowhere", {"model": "no/such/folder"}, "no/such/folder", "check the path"),
    asked("model-surrogate", {"model": "\ud800"}, "\\ud800", "check the path"),
    asked("model-long", {"model": 300 * "x"}, 300 * "x", "cannot be read as a path"),
    asked("model-user", {"model": "~no-such-user-0/x"}, "~no-such-user-0/x", "without '~'"),
    asked("out-empty", {"save_dir": ""}, "save_dir=''", "must be a folder's path"),
    asked("out-none", {"save_dir": None}, "save_dir=None", "must be a folder's path"),
    asked("out-bytes", {"save_dir": b"out"}, "save_dir=b'out'", "must be a folder's path"),
    asked("out-null", {"save_dir": "a\0b"}, "\\x00", "must be a folder's path"),
    asked("out-long", {"save_dir": 300 * "x"}, 300 * "x", "choose another"),
    asked("out-surrogate", {"save_dir": "a\ud800"}, "\\ud800", "choose another folder"),
    asked("out-user", {"save_dir": "~no-such-user-0/x"}, "~no-such-user-0/x", "choose another folder"),
]


@pytest.mark.parametrize("changes, fragments", ARGUMENTS)
def test_arguments(cascade, changes, fragments):
    changes = dict(changes)
    refused(lambda: generate(changes.pop("model", cascade), **changes), *fragments)


@pytest.mark.parametrize("blocked, save_dir", [("out", "out"), ("out", "out/deeper"), ("out/0000", "out")])
def test_a_file_where_a_folder_is_to_be_made(cascade, blocked, save_dir):
    Path(blocked).parent.mkdir(exist_ok=True)
    Path(blocked).write_text("in the way")
    refused(lambda: generate(cascade, save_dir=save_dir), f"{blocked} is a file", "choose another")


@pytest.mark.parametrize("name", ["sample_16.png", "sample_16.views.png", "sample_64.png", "metadata.json"])
def test_a_folder_where_a_file_is_to_be_written(cascade, name):
    Path("out", "0003", name).mkdir(parents=True)
    refused(
        lambda: generate(cascade, seed=[2, 3]), f"0003/{name} is a folder", "remove it, or choose another"
    )


def test_a_folder_without_the_right_to_write(cascade, monkeypatch):
    Path("out").mkdir()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    refused(lambda: generate(cascade), "out cannot be written to", "that you can write to")


def test_the_model_is_a_file_or_an_empty_folder(cascade):
    Path("file").write_text("x")
    Path("empty").mkdir()
    assert isinstance(
        refused(lambda: generate("file"), "file is a file", "the folder that holds it"), OSError
    )
    assert isinstance(refused(lambda: generate("empty"), "empty is no cascade", "give the folder"), OSError)


@pytest.mark.parametrize("dtype", ["int8", "double", torch.int64, 16, ["float32"], ""])
def test_dtypes(whole, dtype):
    for call in (Cascade.from_pretrained, lambda f, dtype: load_t5(f / "stage_1", dtype=dtype)):
        refused(lambda call=call: call(whole, dtype=dtype), f"dtype={dtype!r}", "use one of float32")


@pytest.mark.parametrize("variant", ["fp 16", "../fp16", 3, "", "fp16", 300 * "x"])
def test_variants(whole, variant):
    model = Cascade.from_pretrained(whole, variant=variant, device="cpu")
    refused(lambda: generate(model), str(variant))


@pytest.mark.parametrize("part", ["stage_2", "noise_clip"])
@pytest.mark.parametrize("source", [3, "nowhere", "", "a\0b"])
def test_other_parts(whole, part, source):
    model = Cascade.from_pretrained(whole, **{part: source}, device="cpu")
    refused(lambda: generate(model), repr(source))


RECIPES = [
    ("num_inference_steps", 0), ("num_inference_steps", "30"), ("guidance_scale", NAN), ("balancing", 1),
    ("rectification", "yes"), ("anti_segregation", None), ("horizon", 0), ("horizon", 1.5), ("floor", 0),
    ("floor", 2), ("scorer_range", "full"), ("rectify_diagonal", []), ("overlap_measure", "IoU"),
    ("overlap_target", 0.6), ("overlap_slope", -INF), ("guidance_rate", HUGE), ("last_guided_step", -1),
    ("map_resolution", 65), ("map_places", "up"), ("map_places", ["up", "up"]), ("map_places", [["up"]]),
    ("balance", True), ("steps", 30), ("", 1),
]  # fmt: skip


@pytest.mark.parametrize("name, value", RECIPES)
def test_recipes(copy, name, value):
    refused(lambda: Recipe.released(**{name: value}), name, "has" if name in ("steps", "") else "")
    refused(lambda: Recipe.from_dict({name: value}), name)
    (copy / "cascade.json").write_text(json.dumps({"name": "tiny", "recipe": {name: value}}))
    refused(lambda: generate(str(copy)), "cascade.json", name, "download the file again")


@pytest.mark.parametrize(
    "names, arguments, seed, fragment",
    [
        (["flip", "flop"], None, 0, "'flop'"),
        (("flip", b"flip"), None, 0, "b'flip'"),
        (iter(["flip"]), None, 0, "give a list"),
        ({"flip": 1}, None, 0, "give a list"),
        (["skew"], {"factor": 1}, 0, "one entry per view"),
        (["skew"], [[{"factor": 1}]], 0, "dict of keyword arguments"),
        (["skew+skew"], [{"skew": {}}], 0, "give a list, one per component"),
        (["skew+flip"], [[{}]], 0, "list of 2 entries"),
        (["skew"], [{3: 1}], 0, "unknown view argument 3"),
        (["skew"], [{"factor": HUGE}], 0, "from -64 to 64"),
        (["flip"], None, -1, "seed=-1"),
        (["flip"], None, True, "seed=True"),
        (["permutation"], [{"permutation": {"size": 2, "base64": "!"}}], 0, "little-endian"),
        (["permutation"], [{"permutation": {"size": 10**9, "base64": ""}}], 0, "size=1000000000"),
    ],
)
def test_views_by_name(names, arguments, seed, fragment):
    refused(lambda: get_views(names, arguments, seed), fragment)


# Configs ---------------------------------------------------------------------------------------------------

DELETE = object()
LISTS = ("block_out_channels", "down_block_types", "up_block_types")
# Values that no field of the kind has, whatever the model.
WRONG = {
    "count": ["8", 1.5, True, 0, -3, 2**70, HUGE, [8], {"a": [1]}, NAN, None, ""],
    "number": ["1", True, 0, -1.0, NAN, INF, HUGE, [1.0], {}, None],
    "list": ["abcd", 3, None, {}, [], [[]], 17 * [8], [8, "x", None, {}]],
    "fixed": ["other", 7.5, [0], {"x": {"y": [NAN]}}, -1],
}


def typo(random_state, name):
    """The name with one letter doubled: no field is called so."""
    i = random_state.randrange(len(name))
    return name[: i + 1] + name[i:]


def unet_changes(seed, count):
    """Seeded changes of a UNet's config.json, each certainly wrong: (field, value)."""
    r = random.Random(seed)
    counts = ["cross_attention_dim", "encoder_hid_dim", "in_channels", "out_channels", "attention_head_dim",
              "addition_embed_type_num_heads", "norm_num_groups", "layers_per_block"]  # fmt: skip
    numbers = ["norm_eps", "resnet_out_scale_factor", "mid_block_scale_factor"]
    fixed = ["act_fn", "conv_in_kernel", "time_embedding_type", "cross_attention_norm", "upcast_attention"]
    required = [
        "block_out_channels",
        "layers_per_block",
        "cross_attention_dim",
        "encoder_hid_dim",
        "in_channels",
    ]
    kinds = [
        lambda: (r.choice(required), DELETE),
        lambda: (r.choice(counts), r.choice(WRONG["count"])),
        lambda: (r.choice(numbers), r.choice(WRONG["number"])),
        lambda: (r.choice(LISTS), r.choice(WRONG["list"])),
        lambda: (r.choice(LISTS), tiny.STAGE_1["down_block_types"][: r.randrange(1, 4)]),
        lambda: ("layers_per_block", [1] * r.choice([1, 3, 5, 9])),
        lambda: ("layers_per_block", r.choice([65, 2**20])),  # would build millions of modules
        lambda: (r.choice(fixed), r.choice(WRONG["fixed"])),
        lambda: (typo(r, r.choice(counts)), 8),
        lambda: (r.choice(["class_embed_type", "time_embedding_act_fn"]), r.choice(["sin", 3, ["gelu"]])),
    ]
    return [kinds[i % len(kinds)]() for i in range(count)]


def t5_changes(seed, count):
    r = random.Random(seed)
    counts = ["vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"]
    kinds = [
        lambda: (r.choice([*counts, "feed_forward_proj"]), DELETE),
        lambda: (r.choice(counts), r.choice(WRONG["count"])),
        lambda: ("layer_norm_epsilon", r.choice(WRONG["number"])),
        lambda: (r.choice(["feed_forward_proj", "model_type", "is_gated_act"]), r.choice(WRONG["fixed"])),
        lambda: (typo(r, r.choice(counts)), 8),
        lambda: ("relative_attention_num_buckets", r.choice([2, 7, 2**20])),
        lambda: ("relative_attention_max_distance", r.choice([1, 8, "128"])),
        lambda: ("num_layers", r.choice([1025, 2**20])),
    ]
    return [kinds[i % len(kinds)]() for i in range(count)]


def scheduler_changes(seed, count):
    r = random.Random(seed)
    kinds = [
        lambda: ("beta_schedule", r.choice([DELETE, "linear", 3, None])),
        lambda: ("num_train_timesteps", r.choice([0, 1.5, "1000", True, 2**70, NAN])),
        lambda: ("dynamic_thresholding_ratio", r.choice([-0.1, 1.5, NAN, "0.9", None])),
        lambda: ("sample_max_value", r.choice([0.5, INF, HUGE, [1], True])),
        lambda: (r.choice(["thresholding", "clip_sample"]), r.choice([0, 1, "true", None, []])),
        lambda: (r.choice(["prediction_type", "timestep_spacing"]), r.choice(WRONG["fixed"])),
        lambda: (r.choice(["variance_type", "_class_name"]), r.choice(["other", 3, None, {}])),
        lambda: (typo(r, "thresholding"), True),
    ]
    return [kinds[i % len(kinds)]() for i in range(count)]


def change_json(path, field, value):
    content = json.loads(path.read_text())
    content.pop(field, None)
    if value is not DELETE:
        content[field] = value
    path.write_text(json.dumps(content))


def config_cases(changes):
    """Each change once, named by its number and field."""
    unique = {repr(change): change for change in changes}.values()
    return [case(f"{i}-{field}", field, value) for i, (field, value) in enumerate(unique)]


@pytest.mark.parametrize("field, value", config_cases(unet_changes(11, 40)))
def test_config_of_a_unet(copy, field, value):
    change_json(copy / "stage_1" / "unet" / "config.json", field, value)
    error = refused(lambda: load_unet(copy / "stage_1"), field, "unet/config.json", "download the file again")
    assert isinstance(error, ConfigError)


@pytest.mark.parametrize("field, value", config_cases(t5_changes(12, 24)))
def test_config_of_t5(copy, field, value):
    change_json(copy / "stage_1" / "text_encoder" / "config.json", field, value)
    error = refused(lambda: load_t5(copy / "stage_1"), field, "text_encoder/config.json")
    assert isinstance(error, ConfigError)


@pytest.mark.parametrize("field, value", config_cases(scheduler_changes(13, 24)))
def test_config_of_a_scheduler(copy, field, value):
    """Stage II's is refused as early as stage I's, not when stage I has been sampled."""
    stage = 1 + len(field) % 2
    change_json(copy / f"stage_{stage}" / "scheduler" / "scheduler_config.json", field, value)
    refused(lambda: Cascade.from_pretrained(copy, device="cpu").schedule(stage, 2), field, f"stage_{stage}")
    refused(lambda: generate(str(copy)), field, "scheduler_config.json", "download the file again")


@pytest.mark.parametrize(
    "content, fragment",
    [
        ({"name": 3}, "name=3"),
        ({"name": None}, "name=None"),
        ({"name": ["tiny"]}, "must be a string"),
        ({"recipe": []}, "not list"),
        ({"recipe": "released"}, "not str"),
        ({"recipe": {"recipe": {}}}, "'recipe'"),
        ([], "JSON list"),
        ("tiny", "JSON str"),
        (None, "JSON NoneType"),
    ],
)
def test_cascade_json(copy, content, fragment):
    (copy / "cascade.json").write_text(json.dumps(content))
    refused(lambda: Cascade.from_pretrained(copy), fragment, "cascade.json")


JSON_FILES = ["stage_1/unet/config.json", "stage_1/text_encoder/config.json",
              "stage_2/scheduler/scheduler_config.json", "cascade.json"]  # fmt: skip
NO_JSON = {
    "empty": b"",
    "cut": b'{"in_channels": 3, "block_out',
    "utf-16": '{"name": "tiny"}'.encode("utf-16"),
    "byte-order-mark": b'\xef\xbb\xbf{"name": "tiny"}',
    "binary": bytes(random.Random(5).randbytes(300)),
    "nested": 200_000 * b'{"a":',
    "digits": b'{"name": ' + 5000 * b"9" + b"}",
    "number": b"3.5",
    "list": b'[{"name": "tiny"}]',
}


@pytest.mark.parametrize("i, kind", [*enumerate(NO_JSON)])
def test_files_that_are_no_json_object(copy, i, kind):
    for name in (JSON_FILES[i % 4], JSON_FILES[(i + 2) % 4]):
        before = (copy / name).read_bytes()
        (copy / name).write_bytes(NO_JSON[kind])
        assert isinstance(refused(lambda: generate(str(copy)), name, "download"), SourceError)
        (copy / name).write_bytes(before)


# Weights and tokenizers ------------------------------------------------------------------------------------


def load_all(folder):
    """Everything that sampling reads, in its order."""
    for load, part in ((load_unet, "stage_1"), (load_unet, "stage_2"), (load_t5, "stage_1")):
        load(folder / part)
    load_noise_clip(folder / "noise_clip")


def truncations():
    r = random.Random(7)
    for name in (UNET_1, UNET_2, T5, IMAGE, TEXT):
        for i, share in enumerate((0.0, r.uniform(0, 0.01), r.uniform(0.01, 0.5), r.uniform(0.5, 1))):
            yield case(f"{Path(name).parts[-2]}-{i}-{Path(name).stem}", name, share)


@pytest.mark.parametrize("name, share", list(truncations()))
def test_truncated_weights(copy, name, share):
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: int(len(content) * share)])
    error = refused(lambda: load_all(copy), name, "not a whole safetensors file", "download it again")
    assert isinstance(error, SourceError)
    if name == T5:
        refused(lambda: generate(str(copy)), name, "download it again")


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_in_the_header(copy, seed):
    """The header is JSON without slack: any flipped bit breaks it, or names, shapes or places in it."""
    r = random.Random(seed)
    name = (UNET_1, UNET_2, T5, IMAGE, TEXT)[seed % 5]
    content = bytearray((copy / name).read_bytes())
    length = int.from_bytes(content[:8], "little")
    content[r.randrange(8 + length)] ^= 1 << r.randrange(8)
    (copy / name).write_bytes(content)
    refused(lambda: load_all(copy), name, "release" if seed in (2, 7) else "download it again")


TENSORS = [
    (UNET_1, "conv_in.bias", lambda t: t.int(), "not floating: conv_in.bias"),
    (UNET_1, "conv_in.bias", lambda t: t > 0, "not floating: conv_in.bias"),
    (UNET_1, "conv_in.weight", lambda t: t.flatten(), "misshapen: conv_in.weight (216,)"),
    (UNET_2, "conv_out.bias", lambda t: t[None], "misshapen: conv_out.bias (1, 6)"),
    (UNET_2, "conv_out.weight", lambda t: t * NAN, "conv_out.weight is not finite"),
    (UNET_2, "conv_norm_out.bias", lambda t: None, "missing: conv_norm_out.bias"),
    (UNET_2, "class_embedding.linear_1.bias", lambda t: t[:0], "misshapen: class_embedding"),
    (T5, "shared.weight", lambda t: None, "missing: shared.weight"),
    (T5, "shared.weight", lambda t: t[:5], "expected (300, 16)"),
    (T5, "encoder.final_layer_norm.weight", lambda t: t + INF, "is not finite"),
    (T5, "encoder.final_layer_norm.weight", lambda t: t.to(torch.float8_e4m3fn), "not floating"),
    (IMAGE, "blocks.input.w_t", lambda t: None, "lacks blocks.input.w_t"),
    (IMAGE, "blocks.input.w_pos", lambda t: t[:-1], "16 positions"),
    (IMAGE, "blocks.input.patch_proj", lambda t: t[:, :2], "2 channels"),
    (IMAGE, "blocks.input.w_t", lambda t: t[:, :63], "63 channels wide"),
    (IMAGE, "blocks.output.f.w", lambda t: t[0], "2 dimensions"),
    (TEXT, "blocks.input.w_voc", lambda t: t[:300], "take the merges that belong"),
    (TEXT, "blocks.output.f.w", lambda t: t[:8], "from the same release"),
    (TEXT, "blocks.input.w_pos", lambda t: t[:, :, None], "2 dimensions"),
    (TEXT, "blocks.block_0.f_mlp.f_1.w", lambda t: t.long(), "not floating"),
    (TEXT, "blocks.input.w_voc", lambda t: t * NAN, "download it again"),
]


@pytest.mark.parametrize("name, tensor, change, fragment", TENSORS)
def test_tensors_of_another_make(copy, name, tensor, change, fragment):
    state = load_file(copy / name)
    changed = change(state.pop(tensor))
    save_file(state if changed is None else {**state, tensor: changed.contiguous()}, copy / name)
    assert isinstance(refused(lambda: load_all(copy), fragment), ValueError)
    refused(lambda: generate(str(copy)), fragment)


@pytest.mark.parametrize("name", [UNET_2, T5, IMAGE, TEXT])
def test_tensors_too_many(copy, name):
    save_file({**load_file(copy / name), "stray.weight": torch.zeros(2)}, copy / name)
    refused(lambda: load_all(copy), name, "unexpected: stray.weight", "from the same release")


INDEXES = {
    "no-map": ({"metadata": {}}, "no weight_map"),
    "map-is-a-list": ({"weight_map": ["a"]}, "no weight_map"),
    "numbers": ({"weight_map": {"conv_in.bias": 7}}, "has no 7"),
    "null-character": ({"weight_map": {"conv_in.bias": "a\0b"}}, "has no a"),
    "parent": ({"weight_map": {"conv_in.bias": ".."}}, "has no .."),
    "path": ({"weight_map": {"conv_in.bias": "/etc/passwd"}}, "a plain file name is expected"),
    "long-name": ({"weight_map": {"conv_in.bias": 300 * "x"}}, "cannot be looked up"),
    "another-model's": ({"weight_map": {"conv_in.bias": "model.safetensors"}}, "from the same release"),
    "not-an-object": (["weight_map"], "JSON list"),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_indexes_of_shards(copy, kind):
    content, fragment = INDEXES[kind]
    (copy / UNET_1).unlink()
    shutil.copy(copy / T5, copy / "stage_1" / "unet" / "model.safetensors")
    (copy / f"{UNET_1}.index.json").write_text(json.dumps(content))
    refused(lambda: generate(str(copy)), fragment, "stage_1/unet")


@pytest.mark.parametrize("kind", ["empty", "cut-early", "cut-late", "binary", "json", "ids", "text"])
def test_sentencepiece_files(copy, kind):
    content = (copy / PIECES).read_bytes()
    (copy / PIECES).write_bytes(
        {
            "empty": b"",
            "cut-early": content[:101],
            "cut-late": content[: len(content) // 3],
            "binary": random.Random(3).randbytes(2000),
            "json": b'{"model": "t5"}',
            "ids": content.replace(b"<pad>", b"<bad>", 1)[:-40],
            "text": b"the duck\nthe rabbit\n",
        }[kind]
    )
    refused(lambda: generate(str(copy)), PIECES, "download")


@pytest.mark.parametrize(
    "content, fragment",
    [
        (b"", "holds no merges"),
        (b"#version: 0.2\n", "holds no merges"),
        (b"#version: 0.2\nd u\nd u\n", "stands there twice"),
        (b"#version: 0.2\nd u c\n", "merge 0 is 'd u c'"),
        (b"#version: 0.2\nd u\nduck\n", "merge 1 is 'duck'"),
        (gzip.compress(b"#version: 0.2\nd u\n")[:-9], "download it again"),
        (b"\xff\xfe\x00", "download it again"),
        ("\n".join(f"d {chr(0x4E00 + i)}" for i in range(9)).encode(), "the tokenizer has 523 tokens"),
    ],
)
def test_merges(copy, content, fragment):
    (copy / MERGES).write_bytes(content)
    refused(lambda: generate(str(copy)), fragment)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", random.Random(4).randbytes(500)])
def test_pickles_that_are_none(copy, content):
    (copy / IMAGE).unlink()
    (copy / IMAGE).with_suffix(".pt").write_bytes(content)
    refused(lambda: generate(str(copy)), "clip_image_enc.pt", "download it again")


@pytest.mark.parametrize(
    "name, fragment",
    [
        ("stage_1/unet", "has no folder 'unet'"),
        ("stage_1/unet/config.json", "has no config.json"),
        (UNET_1, f"has no {WEIGHTS}"),
        ("stage_1/text_encoder", "has no folder 'text_encoder'"),
        (T5, "has no model.safetensors"),
        ("stage_1/tokenizer", "has no folder 'tokenizer'"),
        (PIECES, "has no spiece.model"),
        ("stage_2/unet/config.json", "has no config.json"),
        (IMAGE, "has neither clip_image_enc.safetensors nor clip_image_enc.pt"),
        (MERGES, "put CLIP's byte-pair merges there"),
        ("noise_clip", "turn balancing off"),
    ],
)
def test_missing_files(copy, name, fragment):
    path = copy / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused(lambda: generate(str(copy)), fragment)


# Networks that load but do not belong together: refused before stage I is sampled, not after it.


def swap_stages(folder):
    shutil.rmtree(folder / "stage_2" / "unet")
    shutil.copytree(folder / "stage_1" / "unet", folder / "stage_2" / "unet")


def stage_2_first(folder):
    shutil.rmtree(folder / "stage_1" / "unet")
    shutil.copytree(folder / "stage_2" / "unet", folder / "stage_1" / "unet")


def wide_stage_2(folder):
    tiny.write_unet(folder / "stage_2" / "unet", {**tiny.STAGE_2, "encoder_hid_dim": 32})


def no_noise_level(folder):
    tiny.write_unet(folder / "stage_2" / "unet", {**tiny.STAGE_2, "class_embed_type": None})


def no_variance(folder):
    tiny.write_unet(folder / "stage_2" / "unet", {**tiny.STAGE_2, "out_channels": 3})


def few_timesteps(folder):
    change_json(folder / "stage_2" / "scheduler" / "scheduler_config.json", "num_train_timesteps", 40)


def small_clip(folder):
    state = load_file(folder / IMAGE)
    save_file({**state, "blocks.input.w_pos": state["blocks.input.w_pos"][:5].clone()}, folder / IMAGE)


def young_clip(folder):
    state = load_file(folder / IMAGE)
    save_file({**state, "blocks.input.w_t": state["blocks.input.w_t"][:400].clone()}, folder / IMAGE)


def small_vocabulary(folder):
    state = load_file(folder / T5)
    save_file({**state, "shared.weight": state["shared.weight"][:4].clone()}, folder / T5)
    change_json(folder / "stage_1" / "text_encoder" / "config.json", "vocab_size", 4)


def large_sample_size(folder):
    change_json(folder / "stage_1" / "unet" / "config.json", "sample_size", 2**20)


@pytest.mark.parametrize(
    "damage, changes, fragments",
    [
        (swap_stages, {}, ["stage II has in_channels=3, but 6 is needed", "from one release"]),
        (stage_2_first, {}, ["size=16", "attention at 8 px", "choose another size"]),
        (
            stage_2_first,
            {"size": 32, "recipe": Recipe.plain()},
            ["stage I has in_channels=6, but 3 is needed"],
        ),
        (wide_stage_2, {}, ["stage II has encoder_hid_dim=32, but 16 is needed", "from one release"]),
        (no_noise_level, {}, ["stage II has class_embed_type=None, but 'timestep' is needed"]),
        (no_variance, {}, ["stage II has out_channels=3, but 6 is needed"]),
        (few_timesteps, {}, ["noise_level=50 must be below stage II's 40 timesteps"]),
        (few_timesteps, {"num_inference_steps": 50}, ["num_inference_steps=50", "from 1 to 40"]),
        (small_clip, {}, ["for 32 px", "turn balancing off"]),
        (young_clip, {}, ["400 timesteps", "turn balancing off"]),
        (small_vocabulary, {}, ["the vocabulary has 4 entries", "use the tokenizer that belongs"]),
        (large_sample_size, {"size": None}, ["size=1048576", "up to 1024"]),
    ],
)
def test_networks_that_do_not_belong_together(copy, damage, changes, fragments):
    damage(copy)
    refused(lambda: generate(str(copy), **changes), *fragments)


def test_stage_2_asked_of_a_cascade_without(copy):
    shutil.rmtree(copy / "stage_2")
    refused(lambda: generate(str(copy), stop_after=64), "stop_after=64", "has no stage II", "stage_2=")


# metadata.json ---------------------------------------------------------------------------------------------


def put(content, place, value):
    """Set or delete what a path such as "request/views/0" leads to."""
    *parents, last = [int(key) if key.isdigit() else key for key in place.split("/")]
    for key in parents:
        content = content[key]
    if value is DELETE:
        del content[last]
    else:
        content[last] = value


METADATA = [
    ("format", DELETE, "format"), ("format", 2, "format=2"), ("request", DELETE, "request"),
    ("request", [], "TypeError"), ("request", None, "TypeError"), ("request", "text", "TypeError"),
    ("seed", DELETE, "seed"), ("seed", "0", "seed='0'"), ("seed", [0, 1], "seed=[0, 1]"), ("seed", -1, "seed=-1"),
    ("seed", 2**64, "from 0 to"), ("seed", True, "seed=True"), ("sizes", DELETE, "sizes"), ("sizes", [], "sizes=[]"),
    ("sizes", 16, "sizes=16"), ("sizes", ["16"], "sizes=['16']"), ("sizes", [16, 16], "sizes=[16, 16]"),
    ("sizes", [16, 64, 256], "tiny has no stage III"), ("sizes", [16.0], "sizes=[16.0]"),
    ("sizes", [INF], "sizes=[inf]"), ("sizes", [17], "a multiple of 8"), ("sizes", [2**40], "up to 1024"),
    ("request/style", 3, "style=3"), ("request/style", DELETE, "style"), ("request/prompts", "ab", "prompts='ab'"),
    ("request/prompts", {"a duck": 1, "a rabbit": 2}, "must be a list"), ("request/prompts", ["a duck"], "1 prompts"),
    ("request/prompts", ["a duck", 3], "prompts="), ("request/prompts/0", " ", "prompts[0]=' '"),
    ("request/prompts/0", "\ud800", "half a character"), ("request/concepts", ["duck"], "a list of 2"),
    ("request/concepts", None, "concepts=None"), ("request/concepts", [1, 2], "each str or null"),
    ("request/concepts/0", "wolf", "with brackets"), ("request/concept_positions", [None], "a list of 2"),
    ("request/concept_positions", ["3", None], "each int or null"), ("request/views", [], "views=[]"),
    ("request/views", {}, "views={}"), ("request/views/0", "flip", "must be a list"),
    ("request/views/0", {"name": "mirror"}, "'mirror'"), ("request/views/0", {"name": 3}, "with a name"),
    ("request/views/0/angle", 90, "angle"), ("request/views/0", {"name": "flip+skew", "views": 3}, "list of views"),
    ("request/views/0", {"name": "x", "class": "os.system"}, "import its module"),
    ("request/views/0", {"name": "skew", "arguments": {"factor": NAN}}, "factor=nan"),
    ("request/recipe", DELETE, "recipe"), ("request/recipe", [], "not list"),
    ("request/recipe/floor", -1, "floor=-1"), ("request/recipe/wave", 1, "'wave'"),
    ("request/noise_level", 1000, "from 0 to 999"), ("request/noise_level", "50", "noise_level='50'"),
    ("request/weights_sha256", "0" * 64, "name the same weights"), ("request/weights_sha256", None, "sha256 None"),
]  # fmt: skip


@pytest.mark.parametrize("i, place, value, fragment", [(i, *row) for i, row in enumerate(METADATA)])
def test_metadata_to_repeat(cascade, finished, i, place, value, fragment):
    content = json.loads((finished / "0000" / "metadata.json").read_text())
    put(content, place, value)
    Path("metadata.json").write_text(json.dumps(content))
    refused(lambda: repeat_anagram("metadata.json", "out", model=cascade), fragment)


@pytest.mark.parametrize("path", [None, 3, b"metadata.json", "", "nowhere.json", ".", "a\0b", "\ud800"])
def test_metadata_that_is_not_there(cascade, path):
    refused(lambda: repeat_anagram(path, "out", model=cascade), "metadata" if path in (None, 3) else "")


@pytest.mark.parametrize("kind", NO_JSON)
def test_metadata_that_is_no_json_object(cascade, finished, kind):
    """To repeat from, and in the way of a new run, which also says how to replace it."""
    Path("metadata.json").write_bytes(NO_JSON[kind])
    refused(lambda: repeat_anagram("metadata.json", "out", model=cascade), "metadata.json", "write")
    shutil.copytree(finished, "out")
    Path("out", "0000", "metadata.json").write_bytes(NO_JSON[kind])
    refused(lambda: generate(cascade, stop_after=16), "0000/metadata.json", "--overwrite")


@pytest.mark.parametrize(
    "place, value, differs",
    [
        ("request", DELETE, "style, prompts"),
        ("request", 3, "style, prompts"),
        ("request/prompts/0", "a cat", "(different: prompts)"),
        ("request/views", None, "(different: views)"),
        ("request/recipe/floor", 0.5, "(different: recipe)"),
        ("request/weights_sha256", "", "(different: weights_sha256)"),
        ("request/wave", 1, "does not know"),
    ],
)
def test_metadata_of_another_request_in_the_output_folder(cascade, finished, place, value, differs):
    shutil.copytree(finished, "out")
    content = json.loads(Path("out", "0000", "metadata.json").read_text())
    put(content, place, value)
    Path("out", "0000", "metadata.json").write_text(json.dumps(content))
    refused(lambda: generate(cascade, stop_after=16), differs, "overwrite=True")


# The command -----------------------------------------------------------------------------------------------

WORDS = ["generate", "a duck", "a rabbit", "--views", "identity", "rotate_cw", "--size", "16", "--quiet"]
COMMANDS = [
    (["--seed", "x"], "--seed 'x'", "such as 4-7"),
    (["--seed", "-1"], "--seed '-1'", "a whole number from 0 up"),
    (["--seed", "1.5"], "--seed '1.5'", "a whole number"),
    (["--seed", "0", "9-3"], "--seed '9-3'", "a range goes upwards"),
    (["--seed", "0-999999999"], "--seed '0-999999999'", "at most 100000"),
    (["--seed", str(2**63)], "seed=9223372036854775808", "from 0 to"),
    (["--seed", 5000 * "9"], "--seed '999", "too large"),
    (["--seed", "²"], "--seed '²'", "a whole number"),
    (["--steps", "0"], "num_inference_steps=0", "from 1 to 1000"),
    (["--steps", "1001"], "num_inference_steps=1001", "from 1 to 1000"),
    (["--guidance-scale", "nan"], "guidance_scale=nan", "finite number"),
    (["--guidance-scale=-1"], "guidance_scale=-1.0", "of at least 0"),
    (["--noise-level", "1000"], "noise_level=1000", "from 0 to 999"),
    (["--batch-size", "0"], "batch_size=0", "of at least 1"),
    (["--size", "20"], "size=20", "a multiple of 8"),
    (["--stop-after", "17"], "stop_after=17", "must be 16"),
    (["--view-args", "[null"], "--view-args '[null'", "one entry per view"),
    (["--view-args", "{}"], "view_args={}", "one entry per view"),
    (["--view-args", '[null, {"factor": NaN}]'], "'factor'", "takes no arguments"),
    (["--view-args", 100_000 * "["], "--view-args", "one entry per view"),
    (["--views", "identity", "mirror"], "'mirror'", "The views are"),
    (["--views", "identity"], "2 prompts for 1 views", "one prompt for each view"),
    (["--concepts", "duck"], "concepts=['duck']", "list of 2"),
    (["--concepts", "wolf", "rabbit"], "'wolf'", "with brackets"),
    (["--style", "a [wide"], "a [wide", "unbalanced"),
    (["--device", "gpu"], "device='gpu'", "use 'cpu'"),
    (["--dtype", "int8"], "dtype='int8'", "float32"),
    (["--variant", "../x"], "variant='../x'", "must be a word"),
    (["--out", ""], "save_dir=''", "a folder's path"),
    (["--out", "cascade/cascade.json"], "cascade.json is a file", "choose another folder"),
    (["--model", "nowhere"], "'nowhere'", "check the path"),
    (["--model", "line\nbreak"], "'line\\nbreak'", "check the path"),
    (["--stage-2", "nowhere"], "'nowhere'", "check the path"),
    (["--noise-clip", "nowhere"], "'nowhere'", "check the path"),
]


def command_refused(words, capsys, *fragments):
    before = tree()
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mtl-anagram: error: ")
    assert err.count("\n") == 1, f"more than a line: {err!r}"
    assert not [fragment for fragment in fragments if fragment not in err], err
    assert len(err) < 3000
    assert tree() == before


@pytest.mark.parametrize("words, fragment, remedy", COMMANDS)
def test_commands(copy, capsys, words, fragment, remedy):
    defaults = [*WORDS, "--model", "cascade", "--device", "cpu", "--out", "out"]
    command_refused([*defaults, *words], capsys, fragment, remedy)


@pytest.mark.parametrize("content", [None, b"{}", b"[]", b'{"format": 1', b'{"format": 1, "seed": 0}'])
def test_commands_to_repeat(copy, capsys, content):
    if content is not None:
        Path("metadata.json").write_bytes(content)
    words = ["repeat", "metadata.json", "--model", "cascade", "--device", "cpu", "--out", "out", "--quiet"]
    command_refused(words, capsys, "metadata.json")


@pytest.mark.parametrize("damaged", [UNET_1, T5, TEXT, "cascade.json"])
def test_commands_with_damaged_files(copy, capsys, damaged):
    (copy / damaged).write_bytes((copy / damaged).read_bytes()[:-5])
    words = [*WORDS, "--model", "cascade", "--device", "cpu", "--out", "out"]
    command_refused(words, capsys, damaged, "download")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["draw"],
        ["generate"],
        ["generate", "a duck"],
        [*WORDS, "--steps", "many"],
        [*WORDS, "--size", "1e2"],
        [*WORDS, "--steps", 5000 * "9"],
        [*WORDS, "--recipe", "perfect"],
        [*WORDS, "--colour"],
        ["repeat"],
        ["repeat", "a.json", "b.json"],
    ],
)
def test_words_that_the_command_does_not_know(capsys, words):
    """These end in argparse's usage and its own error, status 2."""
    before = tree()
    with pytest.raises(SystemExit, match="2"):
        main(words)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: mtl-anagram")
    assert "error: " in err.splitlines()[-1]
    assert "Traceback" not in err
    assert tree() == before
