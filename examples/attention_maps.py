"""Where a picture attends to the words of its prompts, step by step: a plot of token maps, drawn with pillow.

python examples/attention_maps.py attention.png
"""

import sys

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from mtl_anagram import Cascade, Recipe
from mtl_anagram.files.images import to_uint8
from mtl_anagram.models.prompts import concept_span
from mtl_anagram.sampling import concept_maps, to_views

WORDS, VIEWS, STYLE, SEED = ["hat", "house"], ["identity", "rotate_180"], "a poster of", 12
SIDE, LABEL, SHOWN = 112, 16, 6  # px of a tile, px of its text, steps that are shown


def tile(picture: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] as an image of SIDE px."""
    pixels = to_uint8(picture).permute(1, 2, 0).contiguous()
    image = Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), bytes(pixels.flatten().tolist()))
    return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def heat(map_: Tensor) -> Image.Image:
    """(h, w) from its least to its largest value: dark blue, red, yellow."""
    share = (map_ - map_.min()) / (map_.max() - map_.min())
    return tile(2 * torch.stack([share.sqrt(), share.square(), 0.3 * (1 - share)]) - 1)


def main(out: str = "attention.png") -> None:
    cascade = Cascade.from_pretrained(device="cpu")
    prompts, recipe = [f"a {word}" for word in WORDS], Recipe.plain(num_inference_steps=30, guidance_scale=5)
    run = cascade.sample(prompts, VIEWS, SEED, style=STYLE, stop_after=64, recipe=recipe)
    text = cascade.unet_1.prepare(cascade.encode(run.prompts)[0])
    spans = [concept_span(cascade.tokenizer, prompt) for prompt in run.prompts]  # the words' tokens
    schedule, shown = cascade.schedule(1, recipe.num_inference_steps), []
    for _, _, state in run:
        left = state.num_steps - 1 - state.index
        if left % -(-state.num_steps // SHOWN):
            continue
        t = schedule.next_timestep(state.timestep)  # the noise that is left in state.x
        seen = to_views(state.x, run.views)[0]
        with torch.no_grad():
            layers = cascade.unet_1.text_maps(seen, torch.tensor(max(t, 0)), text, spans, resolution=32)
        maps = concept_maps(layers, run.views)[0]  # (V, 32, 32), all in the picture's own frame
        shown.append((f"t = {state.timestep}", [tile(state.x0[0]), *map(heat, maps)]))
    plot = Image.new("RGB", (SIDE * len(shown), (SIDE + LABEL) * (1 + len(WORDS))), "white")
    draw = ImageDraw.Draw(plot)
    for i, (name, tiles) in enumerate(shown):
        for j, (image, label) in enumerate(zip(tiles, [name, *WORDS], strict=True)):
            plot.paste(image, (SIDE * i, (SIDE + LABEL) * j))
            draw.text((SIDE * i + 4, (SIDE + LABEL) * j + SIDE + 2), label, fill="black")
    plot.save(out)
    print(f"{out}: the clean picture that each step predicts, and where it attends to {' and '.join(WORDS)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
