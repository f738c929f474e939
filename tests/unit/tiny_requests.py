"""A small request for the tiny cascade, in files and in memory, and what tests look at in what it becomes."""

import io
import json

import torch
from PIL import Image

from mtl_anagram import Cascade, Recipe, generate_anagram
from mtl_anagram.sampling import Combined

REQUEST = {
    "style": "a sketch of",
    "prompts": ["a duck", "a rabbit"],
    "views": ["identity", "rotate_cw"],
    "seed": 9,
    "num_inference_steps": 2,
    "size": 8,
}
PICTURES = ("sample_8.png", "sample_8.views.png", "sample_32.png", "sample_32.views.png")
NAMES = (*PICTURES, "metadata.json")
FAST = Recipe.released(num_inference_steps=2)


def on_cpu(source, **options):
    return Cascade.from_pretrained(source, device="cpu", **options)


def sample(cascade, seeds=0, *, prompts=("a duck", "a rabbit"), views=("identity", "flip"), **changes):
    return cascade.sample(prompts, views, seeds, **{"recipe": FAST, "size": 8, **changes})


def first_takes_all(prediction, index, t):
    """A rule of one's own, for combine=."""
    return Combined(prediction.noise[:, 0], prediction.variance[:, 0])


def maker(tmp_path, cascade, **request):
    """make(folder="out", **changes) calls generate_anagram with the small request."""

    def call(folder="out", **changes):
        arguments = {"model": cascade, **REQUEST, **request, **changes}
        return generate_anagram(**arguments, save_dir=tmp_path / folder)

    return call


def files(folder):
    """Every file below a folder, by relative name."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def pictures(made):
    """The PNGs of one seed's folder, by name."""
    (anagram,) = made if isinstance(made, list) else [made]
    return {name: content for name, content in files(anagram.folder).items() if name.endswith(".png")}


def pixels(content):
    """A PNG as (3, H, W) integers."""
    image = Image.open(io.BytesIO(content))
    return torch.tensor(list(image.tobytes())).view(image.height, image.width, 3).permute(2, 0, 1)


def metadata(anagram):
    return json.loads((anagram.folder / "metadata.json").read_text())


def never(*_):
    raise AssertionError("something was sampled")
