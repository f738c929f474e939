"""Stage III's schedule and its whole way from picture and prompt to picture, against diffusers'."""

import pytest
import torch
import transformers
from diffusers import StableDiffusionUpscalePipeline

from mtl_anagram.files.hub import read_json
from mtl_anagram.models.upscaler import load_upscaler
from mtl_anagram.sampling import LatentSchedule, NoiseLevels, UpscaleRecipe, ddim_step, sample_stage3, split_v
from mtl_anagram.views import get_views
from tests.helpers import relative
from tests.parity import upscaler_references as references

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize("steps", [1, 7, 20, 75, 999])
def test_ddim_equals_the_reference_step_by_step(steps):
    reference = references.ddim()
    reference.set_timesteps(steps)
    ours = LatentSchedule.from_config(reference.config, steps)
    assert ours == LatentSchedule(steps)
    assert list(ours.timesteps) == reference.timesteps.tolist()
    assert torch.equal(ours.alphas_cumprod, reference.alphas_cumprod)
    generator = torch.Generator().manual_seed(steps)
    x = theirs = torch.randn(2, 4, 8, 8, generator=generator)
    for t in ours.timesteps[:100]:
        v = torch.tanh(x) + 0.1 * torch.randn(x.shape, generator=generator)
        clean = reference.step(v, t, theirs).pred_original_sample
        theirs = reference.step(v, t, theirs).prev_sample
        x0, noise = split_v(v, x, t, ours)
        assert relative(x0, clean) < 1e-5
        x = ddim_step(x0, noise, t, ours)
        assert relative(x, theirs) < 1e-5


@pytest.mark.parametrize("level", [0, 20, 350, 999])
def test_noise_on_the_low_resolution_picture_equals_the_reference(level):
    reference = references.low_res_scheduler()
    ours = NoiseLevels.from_config(reference.config)
    x, noise = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 8, 8)
    theirs = reference.add_noise(x, noise, torch.tensor([level]))
    assert relative(ours.add_noise(x, noise, level), theirs) < 1e-6


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """The reference pipeline, and the folder that it wrote."""
    folder = tmp_path_factory.mktemp("upscaler")
    references.write_tokenizer(folder / "own tokenizer")
    pipeline = StableDiffusionUpscalePipeline(
        vae=references.autoencoder(),
        text_encoder=references.text_tower(),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "own tokenizer", pad_token="!"),
        unet=references.unet(),
        low_res_scheduler=references.low_res_scheduler(),
        scheduler=references.ddim(),
        max_noise_level=350,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    references.write_tokenizer(folder / "tokenizer")  # as in the release; transformers 5 does not write it
    return pipeline, folder


@pytest.mark.parametrize("steps, level, scale", [(75, 0, 9.0), (20, 20, 9.0), (3, 350, 2.0)])
def test_the_whole_pipeline_equals_the_reference(release, steps, level, scale):
    pipeline, folder = release
    prompts = ["a duck, wow!", "a cat"]
    low_res = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    theirs = pipeline(
        prompt=[prompts[0]] * 2,
        image=low_res,
        noise_level=level,
        num_inference_steps=steps,
        guidance_scale=scale,
        generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)],
        output_type="pt",
    ).images
    upscaler = load_upscaler(folder)
    schedule = LatentSchedule.from_config(read_json(folder / "scheduler" / "scheduler_config.json"), steps)
    levels = NoiseLevels.from_config(read_json(folder / "low_res_scheduler" / "scheduler_config.json"))
    text, null = upscaler.encode(prompts)
    upscale = UpscaleRecipe(num_inference_steps=steps, guidance_scale=scale, noise_level=level)
    assert upscaler.max_noise_level == 350

    def ours(seeds):
        states = list(
            sample_stage3(
                upscaler.unet,
                low_res[[seed - 7 for seed in seeds]],
                text,
                null,
                get_views(["identity", "rotate_cw"]),
                decode=upscaler.decoder.picture,
                generators=[torch.Generator().manual_seed(seed) for seed in seeds],
                upscale=upscale,
                schedule=schedule,
                noise_levels=levels,
            )
        )
        assert len(states) == states[0].num_steps == steps
        assert all(state.picture is None for state in states[:-1])
        return states[-1].picture

    both = ours([7, 8])
    assert both.shape == (2, 3, 64, 64)
    assert (both / 2 + 0.5 - theirs).abs().max() < 1e-4
    assert (theirs - theirs.mean()).abs().max() > 0.1  # not all one colour
    assert torch.equal(ours([8]), both[1:])  # an image is what it is alone
