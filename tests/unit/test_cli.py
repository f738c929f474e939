"""The command: what its options reach, what it prints, and how it ends."""

import json
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mtl_anagram
from mtl_anagram import InputError, Recipe, UpscaleRecipe
from mtl_anagram.__main__ import main, parse_seeds
from mtl_anagram.files.images import read_picture
from tests.readme import ROOT
from tests.unit.tiny_requests import files
from tests.unit.tiny_upscaler import write_upscaler

READINGS = "'a duck' 'a rabbit' --views identity rotate_ccw"
SMALL = {"size": 16, "steps": 1, "stop_after": 16, "device": "cpu", "out": "out"}


@pytest.fixture
def generate(cascade_folder, tmp_path, monkeypatch):
    """generate(words) runs the command in an empty folder with the tiny cascade, small, on the CPU, quietly."""
    monkeypatch.chdir(tmp_path)

    def call(words="", *, readings=READINGS, quiet=True, **changes):
        options = SMALL | {"model": cascade_folder} | changes
        given = [(f"--{k.replace('_', '-')}", str(v)) for k, v in options.items() if v is not None]
        words = [word for pair in given for word in pair] + shlex.split(words) + ["--quiet"] * quiet
        return main(["generate", *shlex.split(readings), *words])

    return call


def metadata(folder="out"):
    return json.loads(Path(folder, "0000/metadata.json").read_text())


def test_parse_seeds():
    assert parse_seeds(["9", "12", "20-22", "3-3", "007"]) == [9, 12, 20, 21, 22, 3, 7]
    assert parse_seeds([str(2**63 - 1), "0-99999"]) == [2**63 - 1, *range(100_000)]
    for word in ("", "-", "-1", "1-", "1.5", "3-2", "1-2-3", "²", "0-100000", "+1", str(2**63), "9" * 40):
        with pytest.raises(InputError, match="--seed"):
            parse_seeds(["4", word])


def test_seeds_and_ranges(generate, capsys):
    assert generate("--seed 9 12 20-22 12") == 0
    shown = capsys.readouterr()
    pictures = [Path("out", f"{seed:04d}", "sample_16.png") for seed in (9, 12, 20, 21, 22)]
    assert shown.out.splitlines() == [f"{path}  sample_16.views.png" for path in pictures]
    assert shown.err == ""
    assert sorted(Path("out").glob("*/sample_16.png")) == pictures


def test_partners_shows_the_command_that_makes_its_first_pair(generate, capsys):
    Path("my model").symlink_to(ROOT / "weights")
    assert main(["partners", "a duck", "--top", "1", "--model", "my model"]) == 0
    command = capsys.readouterr().out.splitlines()[-1]
    assert ('"a duck"' in command, shlex.split(command)[-2:]) == (True, ["--model", "my model"])
    assert generate(readings=command.removeprefix("mtl-anagram generate")) == 0
    Path("empty.json").write_text('{"rows": []}')
    assert main(["partners", "--table", "empty.json"]) == 0


def test_every_request_has_a_folder_of_its_own_unless_one_is_named(generate, capsys):
    def folder(words="", **options):
        assert generate(words, out=None, **options) == 0
        (line,) = capsys.readouterr().out.splitlines()
        return Path(line.split("  ")[0]).parents[1], line.endswith("(was there)")

    first, there = folder()
    assert (first.parent, there) == (Path("output"), False)
    assert first.name.startswith("duck-rabbit-rotate_ccw-")
    assert folder() == (first, True)
    assert folder("--seed 1 --batch-size 2") == (first, False)
    others = ["--style 'a sketch of'", "--no-balancing", "--negative 'a house'", "--guidance-scale 2"]
    others += ["--dtype bfloat16", "--concepts a a", "--solver ddim", "--views identity flip"]
    others += ["--views identity jigsaw", """--views identity jigsaw --view-args '[null, {"seed": 2}]'"""]
    found = [folder(words) for words in others]
    assert len({first, *(path for path, _ in found)}) == len(found) + 1
    assert not any(there for _, there in found)


def test_the_recipe(generate):
    ddim = Recipe.released(rectification=False, guidance_scale=7, solver="ddim")
    scales = Recipe.released(stage_2_guidance_scale=1, guidance_interval=(0.2, 1))
    for words, recipe in {
        "": Recipe.released(),
        "--recipe corrected": Recipe.corrected(),
        "--recipe plain --balancing": Recipe.plain(balancing=True),
        "--no-rectification --guidance-scale 7 --solver ddim": ddim,
        "--stage-2-guidance-scale 1 --guidance-interval 0.2 1": scales,
    }.items():
        assert generate(words + " --overwrite") == 0
        assert metadata()["request"]["recipe"] == {**recipe.to_dict(), "num_inference_steps": 1}


def test_the_options_reach_the_picture(generate, cascade_folder):
    readings = "'a big duck' 'a [rabbit]' --views identity patch_permute+flip --style 'a sketch of'"
    words = """--view-args '[null, [{"num_patches": 4, "seed": 11}, null]]' --negative 'a cat' 'a house'"""
    parts = {part: cascade_folder / part for part in ("stage_2", "noise_clip")}
    options = {"model": cascade_folder / "stage_1", "stop_after": 64, "noise_level": 70, "dtype": "bfloat16"}
    assert generate(words, readings=readings, threads=2, **parts, **options) == 0
    assert torch.get_num_threads() == 2
    made = metadata()["request"]
    prompts = ["a sketch of a big duck", "a sketch of a rabbit"]
    assert (made["prompts"], made["concepts"]) == (prompts, [None, "rabbit"])
    assert made["views"][1]["views"][0]["arguments"] == {"num_patches": 4, "seed": 11}
    assert (made["noise_level"], made["negative"]) == (70, ["a cat", "a house"])
    assert (metadata()["sizes"], metadata()["made_with"]["dtype"]) == ([16, 64], "bfloat16")
    assert generate("--concepts big rabbit", readings=READINGS.replace("duck", "big duck"), out="b") == 0
    assert metadata("b")["request"]["concepts"] == ["big", "rabbit"]


def test_a_bar_for_each_stage_and_what_is_printed_is_logged(generate, capsys, caplog):
    with caplog.at_level(logging.INFO, "mtl_anagram"):
        assert generate("--seed 0 1", quiet=False, steps=2, stop_after=64) == 0
    shown = capsys.readouterr()
    lines = shown.err.replace("\r", "\n").splitlines()
    for stage in ("stage I:", "stage II:"):
        assert any(line.startswith(stage) and "4/4" in line for line in lines)
    assert shown.out.splitlines() == [record.getMessage() for record in caplog.records]
    assert (len(caplog.records), logging.getLogger("mtl_anagram").handlers) == (4, [])


def test_best_of_shows_the_scores(generate, capsys):
    assert generate("--best-of 2") == 0
    *scores, picture = capsys.readouterr().out.splitlines()
    assert [line.startswith("seed ") and "score" in line for line in scores] == [True, True]
    assert picture.startswith("out/000")


def test_another_requests_pictures_are_replaced_where_that_is_asked_for(generate, capsys):
    assert generate() == 0
    capsys.readouterr()
    assert generate("--style 'a photo of'") == 2
    shown = capsys.readouterr()
    assert (shown.out, metadata()["request"]["style"]) == ("", "")
    assert "mtl-anagram: error: " in shown.err.partition("--overwrite")[0]
    assert "overwrite=True" not in shown.err
    assert generate("--style 'a photo of' --overwrite") == 0
    assert metadata()["request"]["style"] == "a photo of"


@pytest.mark.parametrize(
    "words, match",
    [
        ("--view-args [1]", "view_args"),
        ("--view-args {", "view_args='{'"),
        ("--size max", "size='max'"),
        ("--threads 0", "--threads=0"),
        ("--model no/where/at/all", "no/where"),
        ("--best-of 2 --seed 1-2", "one --seed"),
        ("--stage-3-steps 3", "--stage-3"),
        (f"--out '{__file__}'", "is a file"),
    ],
)
def test_mistakes_end_with_status_2_and_one_line(generate, capsys, words, match):
    assert generate(words, quiet=False) == 2
    shown = capsys.readouterr()
    assert match in shown.err
    assert (len(shown.err.strip().splitlines()), shown.out, Path("out").exists()) == (1, "", False)


def test_an_interruption_ends_with_status_130(generate, monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("mtl_anagram.models.unet.UNet.forward", interrupt)
    assert generate() == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_a_cascade_without_stage_2_or_clip_says_so(generate, cascade_folder, capsys):
    clip = f"--noise-clip {cascade_folder / 'noise_clip'}"
    assert generate(clip, model=cascade_folder / "stage_1", stop_after=None) == 0
    assert "no stage II" in capsys.readouterr().err
    assert generate(clip, model=cascade_folder / "stage_1", stop_after=64) == 2
    assert "--stage-2" in capsys.readouterr().err
    assert generate(model=cascade_folder / "stage_1", out="b") == 2
    assert "--noise-clip" in capsys.readouterr().err


def test_what_the_cascade_has_not_learnt_is_said_once(generate, own_folder, capsys):
    (own_folder / "cascade.json").write_text(json.dumps({"name": "own", "concepts": ["duck", "cat"]}))
    assert generate(model=own_folder) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "a rabbit" in line)
    assert all(word in line for word in ("mtl-anagram: ", "duck, cat", "--model"))


def test_stage_3(generate, cascade_folder, capsys):
    options = {"size": 8, "stop_after": None, "stage_3": write_upscaler(Path("stage_3"))}
    numbers = {"steps": 2, "guidance_scale": 5.0, "noise_level": 3, "views": "all", "exchange_every": 2}
    options |= {f"stage_3_{name}": value for name, value in numbers.items()}
    assert generate(**options) == 0
    assert "sample_128.png  sample_128.views.png" in capsys.readouterr().out
    request = metadata()["request"]["stage_3"]
    assert len(request.pop("weights_sha256")) == 64
    assert request == UpscaleRecipe(*numbers.values()).to_dict()
    words = ["--model", str(cascade_folder), "--stage-3", "stage_3", "--device", "cpu", "--out", "again"]
    assert main(["repeat", "out/0000/metadata.json", *words]) == 0
    assert files(Path("out")) == files(Path("again"))
    assert generate(**options | {"stage_3": None, "out": "c"}) == 2
    assert "no stage III is to run" in capsys.readouterr().err


TABLE = """
8    low_pass high_pass
8    triple_low_pass triple_medium_pass triple_high_pass
8    grayscale rotate_cw+color
8    motion:9,30 motion_res:9,30
8    scale scale:0.25 flip+scale:0.25
8    identity rotate:135 rotate:30,circle reflect:20
8    transpose mirror translate:0.5,0.25 skew:2 jigsaw:2
8x16 low_pass rotate_180+high_pass
8x16 translate skew patch_permute:4
"""


@pytest.mark.parametrize("row", TABLE.strip().splitlines())
def test_views_through_all_stages(generate, row):
    size, *names = row.split()
    prompts = ["'a duck'", "'a rabbit'", "'a cat'", "'a house'", "'the sea'"][: len(names)]
    stage_3 = {"stage_3": write_upscaler(Path("stage_3")), "stage_3_steps": 1, "stage_3_views": "all"}
    readings = " ".join([*prompts, "--views", *names])
    assert generate(readings=readings, size=size, steps=2, stop_after=None, **stage_3) == 0
    for times in (1, 4, 16):
        sides = [times * int(side) for side in size.split("x")]
        made = read_picture(f"out/0000/sample_{'x'.join(map(str, sides))}.png")
        assert made.shape == (3, sides[0], sides[-1])


def test_repeat(generate, cascade_folder, capsys):
    assert generate("--seed 4 --dtype bfloat16") == 0
    capsys.readouterr()
    words = ["repeat", "out/0004/metadata.json", "--model", str(cascade_folder), "--device", "cpu"]
    assert main(words) == 0
    shown = capsys.readouterr()
    again = Path(shown.out.split("  ")[0])
    assert again.parts[0] == "repeated"
    assert "stage I" in shown.err
    assert again.read_bytes() == Path("out/0004/sample_16.png").read_bytes()
    assert main([*words, "--quiet"]) == 0
    assert capsys.readouterr() == (f"{again}  sample_16.views.png  (was there)\n", "")
    assert main([*words, "--quiet", "--dtype", "float32", "--out", "again"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(str(Path("again/0004")))
    assert "the recorded picture" in shown.err


def test_information_and_arguments_that_do_not_parse(capsys):
    def ends(words):
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(words))
        return ended.value.code

    commands = ("generate -h", "repeat -h", "evaluate -h", "info -h", "download -h")
    assert {ends(words) for words in ("--version", "--help", *commands)} == {0}
    assert capsys.readouterr().out.startswith(f"mtl-anagram {mtl_anagram.__version__}\n")
    for words in ("", "paint", "generate 'a duck' --views identity --recipe best", "repeat"):
        assert ends(words) == 2
        assert "usage: mtl-anagram" in capsys.readouterr().err


def process(cascade_folder, tmp_path, words, **streams):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP", "GOMP", "KMP"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "7"}
    words = [*words, "generate", *shlex.split(READINGS), "--model", str(cascade_folder), "--device", "cpu"]
    words += shlex.split("--size 16 --steps 1 --stop-after 16 --out out")
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **streams}
    return subprocess.Popen([sys.executable, *words], cwd=tmp_path, env=environment, **streams)


def test_as_a_process_its_threads_wait_without_spinning(cascade_folder, tmp_path):
    script = """import os, sys; from mtl_anagram.__main__ import main; assert 'torch' not in sys.modules; main()
print(os.environ['OMP_WAIT_POLICY'], os.environ['GOMP_SPINCOUNT'])"""  # the second is the user's
    out, err = process(cascade_folder, tmp_path, ["-c", script]).communicate()
    assert out.splitlines()[-1] == "PASSIVE 7", err
    assert (tmp_path / out.split("  ")[0]).is_file()
    assert "1/1" in err


def test_a_reader_that_goes_away(cascade_folder, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    child = process(cascade_folder, tmp_path, ["-m", "mtl_anagram"], stdout=writer)
    os.close(writer)
    _, err = child.communicate()
    assert child.returncode == 141
    assert "Error" not in err
    assert (tmp_path / "out/0000/sample_16.png").is_file()
