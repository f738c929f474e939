"""For a researcher: run the loop yourself, change one idea, and look at the numbers of every step.

    python examples/read_the_steps.py

Compares the released recipe's weights of the views with weights of your own: here, equal ones for the first half.
"""

import torch

from mtl_anagram import Cascade, Recipe, get_views
from mtl_anagram.files.images import save_picture
from mtl_anagram.models.prompts import concept_span
from mtl_anagram.sampling import sample_stage1

prompts = ["a poster of a hat", "a poster of a house"]
views = get_views(["identity", "rotate_180"])
cascade = Cascade.from_pretrained(device="cpu")
text, null = cascade.encode(prompts)
clip_score = cascade.noise_clip.scorer(prompts)


def late_score(pictures, t):
    """Any function of the viewed pictures will do: here, no preference while t is high."""
    return clip_score(pictures, t) if t < 500 else torch.ones(pictures.shape[:2])


for name, score in (("released", clip_score), ("late", late_score)):
    recipe = Recipe.released(num_inference_steps=30, guidance_scale=5)
    for step in sample_stage1(
        cascade.unet_1,
        text,
        null,
        views,
        score=score,
        spans=[concept_span(cascade.tokenizer, prompt) for prompt in prompts],
        generators=[torch.Generator().manual_seed(12)],
        recipe=recipe,
        schedule=cascade.schedule(1, recipe.num_inference_steps),
    ):
        loss = "" if step.loss is None else f"  overlap loss {step.loss.item():.3f}"
        shown = " ".join(f"{weight:.3f}" for weight in step.weights[0].tolist())
        print(f"{name}: t {step.timestep:3d}  weights {shown}  scale {step.scale.item():.3f}{loss}")
    save_picture(f"output/{name}.png", step.x[0])
    print(f"output/{name}.png")
