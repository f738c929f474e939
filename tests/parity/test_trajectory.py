"""Whole runs of both stages against the same loop written on diffusers' UNet and scheduler."""

import math
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from mtl_anagram.models.configs import UNetConfig
from mtl_anagram.models.unet import UNet
from mtl_anagram.sampling import Recipe, anti_segregation_step, concept_maps, sample_stage1, sample_stage2
from tests.helpers import relative
from tests.parity.references import STAGE_1, STAGE_2, unet

TOKENS, WIDTH = 9, 32
CALM = {3: 0.5, 6: 0.1}  # by channels of the input: stage I, II
SPANS = [(2, 4), (5, 6), (1, 4)]


class View:
    """A view of quarter turns and a sign, the turns clockwise."""

    def __init__(self, turns, sign=1):
        self.turns, self.sign = turns, sign

    def view(self, x):
        return self.sign * torch.rot90(x, -self.turns, (-2, -1))

    def inverse_view(self, prediction):
        noise, variance = torch.rot90(prediction, self.turns, (-2, -1)).split(3, dim=-3)
        return torch.cat([self.sign * noise, variance], dim=-3)

    def inverse_map(self, maps):
        return torch.rot90(maps, self.turns, (-2, -1))


VIEWS = [View(0), View(1), View(2, sign=-1)]


def score(pictures, t):
    """Cosines between 0.1 and 0.9: a fixed random projection of each picture, by time."""
    draws = torch.Generator().manual_seed(42)
    rows = torch.randn(pictures.shape[1], 3 * 64 * 64, generator=draws) / 64
    return 0.5 + 0.4 * torch.tanh((pictures.flatten(2) * rows).sum(-1) / 2 + math.sin(t))


def texts(views):
    draws = torch.Generator().manual_seed(3)
    text = torch.randn(views, TOKENS, WIDTH, generator=draws)
    text[:, 6:] = text[:, 8:]  # padding
    return text, torch.randn(1, TOKENS, WIDTH, generator=draws)


def pair(config, seed=0):
    reference = unet(config, seed)
    # A random network's noise, guided tenfold, answers a change of x more strongly than a trained one's: any
    # rounding would grow a thousandfold in 30 steps. A weaker last layer keeps it in bounds.
    reference.conv_out.weight.mul_(CALM[reference.config.in_channels])
    ours = UNet(UNetConfig.from_dict(dict(reference.config))).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference, ours


# The reference: one image, one thing after another, by the published code's description


class ReadableAttention:
    """Joint attention with its softmax spelled out; keeps the last one's probabilities."""

    def __init__(self, kept, name):
        self.kept, self.name = kept, name

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, **_):
        rows, channels, height, width = hidden_states.shape
        pixels = attn.group_norm(hidden_states.reshape(rows, channels, -1)).transpose(1, 2)
        words = attn.norm_encoder_hidden_states(encoder_hidden_states)

        def heads(states):
            return states.reshape(rows, -1, attn.heads, channels // attn.heads).permute(0, 2, 1, 3)

        k = torch.cat([heads(attn.add_k_proj(words)), heads(attn.to_k(pixels))], dim=2)
        v = torch.cat([heads(attn.add_v_proj(words)), heads(attn.to_v(pixels))], dim=2)
        logits = heads(attn.to_q(pixels)) @ k.transpose(2, 3) / math.sqrt(channels // attn.heads)
        self.kept[self.name] = probabilities = logits.softmax(-1)
        mixed = (probabilities @ v).permute(0, 2, 1, 3).reshape(rows, height * width, channels)
        out = attn.to_out[0](mixed).transpose(1, 2).reshape(hidden_states.shape)
        return hidden_states + out


class Reference:
    """The released loop on diffusers' classes, with the corrections where the recipe asks for them."""

    def __init__(self, model, views, recipe, sample_max_value):
        self.model, self.views, self.recipe, self.maps = model, views, recipe, {}
        model.set_attn_processor({name: ReadableAttention(self.maps, name) for name in model.attn_processors})
        self.text, self.null = texts(len(views))
        self.rows = torch.cat([self.null] * len(views) + [self.text])
        self.scheduler = DDPMScheduler(
            beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True,
            dynamic_thresholding_ratio=0.95, sample_max_value=sample_max_value,
        )  # fmt: skip
        self.scheduler.set_timesteps(recipe.num_inference_steps)

    def loss(self, x, t):
        """The anti-segregation loss of one image (1, 3, 64, 64) at time t."""
        seen = torch.cat([view.view(x) for view in self.views] * 2)
        self.model(seen, t, self.rows)
        maps = []
        for i, view in enumerate(self.views):
            total = 0
            for name, probabilities in self.maps.items():
                if probabilities.shape[2] == 1024 and name.startswith(("down", "up")):
                    start, stop = SPANS[i]
                    columns = probabilities[len(self.views) + i, :, :, start:stop]
                    total = total + view.inverse_map(columns.sum(dim=(0, 2)).reshape(1, 32, 32))
            maps.append(total)
        count = len(maps)
        wanted = 0.5 - 0.05 * (count - 1)
        iou = self.recipe.overlap_measure == "iou"
        if iou:
            wanted, maps = wanted / (1 - wanted), [m / m.sum() for m in maps]
        loss = 0
        for a, b in combinations(maps, 2):
            shared = torch.min(a, b).sum()
            loss = loss + (wanted - shared / (torch.max(a, b) if iou else a + b).sum()).abs()
        return 2 / (count * (count - 1)) * loss

    @torch.no_grad()
    def run(self, size, seed, low_res=None, noise_level=50):
        recipe, views, count = self.recipe, self.views, len(self.views)
        draws = torch.Generator().manual_seed(seed)
        x = torch.randn(1, 3, size, size, generator=draws)
        condition, labels = None, None
        if low_res is not None:
            large = F.interpolate(low_res, size, mode="bilinear", align_corners=True)
            noise = torch.randn(1, 3, size, size, generator=draws)
            condition = self.scheduler.add_noise(large, noise, torch.tensor([noise_level]))
            labels = torch.full((2 * count,), noise_level)
        states = []
        timesteps = self.scheduler.timesteps.tolist()
        for k, t in enumerate(timesteps):
            canvas = x if condition is None else torch.cat([x, condition], dim=1)
            seen = [view.view(canvas) for view in views]
            out = self.model(torch.cat(seen * 2), t, self.rows, class_labels=labels).sample
            null = [view.inverse_view(out[i]) for i, view in enumerate(views)]
            prompt = [view.inverse_view(out[count + i]) for i, view in enumerate(views)]
            eps = [n[:3] + recipe.guidance_scale * (p[:3] - n[:3]) for n, p in zip(null, prompt, strict=True)]

            small = torch.cat([s[:, :3] for s in seen])
            if size != 64:
                small = F.interpolate(small, 64, mode="bilinear", align_corners=False)
            half = recipe.scorer_range == "half"
            cosines = score((small / 2 + 0.5 if half else small)[None], t)[0].tolist()
            horizon = 30 if recipe.horizon else len(timesteps)
            powers = [c ** -(1 + k / horizon) for c in cosines]
            a = [p / sum(powers) for p in powers]

            if recipe.rectify_diagonal == "unit":
                power = sum(w**2 for w in a)
                for i, j in combinations(range(count), 2):
                    power += 2 * a[i] * a[j] * (eps[i] * eps[j]).mean().item()
                scale = 1 / math.sqrt(power)
            else:
                mean = sum(w * e.square().mean().item() for w, e in zip(a, eps, strict=True))
                mixed = sum(w * e for w, e in zip(a, eps, strict=True))
                scale = math.sqrt(mean / mixed.square().mean().item())
            combined = sum(w * scale * e for w, e in zip(a, eps, strict=True))
            variance = sum(w * p[3:] for w, p in zip(a, prompt, strict=True))
            both = torch.cat([combined, variance])[None]
            x = self.scheduler.step(both, t, x, generator=draws).prev_sample

            loss = None
            if low_res is None and k <= 25 and k + 1 < len(timesteps):
                with torch.enable_grad():
                    pixels = x.clone().requires_grad_()
                    loss = self.loss(pixels, timesteps[k + 1])
                    descent = torch.optim.SGD([pixels], lr=recipe.guidance_rate)
                    loss.backward()
                    descent.step()
                x, loss = pixels.detach(), loss.item()
            states.append((x, a, scale, loss))
        return states


def compare(states, reference):
    """Every step's weights, scale and loss within 1e-4, the final picture within 1e-3."""
    assert len(states) == len(reference)
    for s, (_, a, scale, loss) in zip(states, reference, strict=True):
        assert (s.weights - torch.tensor([a])).abs().max() < 1e-4, s.index
        assert abs(s.scale.item() - scale) < 1e-4, s.index
        assert (s.loss is None) == (loss is None)
        assert loss is None or abs(s.loss.item() - loss) < 1e-4, s.index
    assert (states[-1].x - reference[-1][0]).abs().max() < 1e-3


RECIPES = {"released": Recipe.released(), "corrected": Recipe.corrected()}
SMALL_1 = {"block_out_channels": [16, 32, 32, 48]}
SMALL_2 = {"block_out_channels": [16, 16, 32, 32, 48], "layers_per_block": 1}


@pytest.mark.parametrize("recipe, views", [("released", 2), ("released", 3), ("corrected", 3)])
def test_a_whole_stage_1_run(recipe, views):
    """30 steps, all techniques on, 26 of them with a gradient step."""
    reference, ours = pair({**STAGE_1, **SMALL_1})
    recipe = RECIPES[recipe]
    text, null = texts(views)
    states = sample_stage1(
        ours, text, null, VIEWS[:views], score=score, spans=SPANS[:views],
        generators=[torch.Generator().manual_seed(5)], recipe=recipe,
    )  # fmt: skip
    expected = Reference(reference, VIEWS[:views], recipe, 1.5).run(64, 5)
    assert sum(loss is not None for *_, loss in expected) == 26
    compare(list(states), expected)


@pytest.mark.parametrize("recipe, views, size", [("released", 2, 128), ("corrected", 3, 128)])
def test_a_whole_stage_2_run(recipe, views, size):
    reference, ours = pair({**STAGE_2, **SMALL_2}, seed=1)
    recipe = RECIPES[recipe]
    low_res = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(6)) * 2 - 1
    text, null = texts(views)
    states = sample_stage2(
        ours, low_res, text, null, VIEWS[:views], score=score,
        generators=[torch.Generator().manual_seed(7)], recipe=recipe, size=size,
    )  # fmt: skip
    compare(list(states), Reference(reference, VIEWS[:views], recipe, 1.0).run(size, 7, low_res))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_gradient_step_equals_autograd_through_the_reference(recipe):
    model, ours = pair(STAGE_1)
    model.requires_grad_(True)
    ours.requires_grad_(True)
    recipe, t = RECIPES[recipe], 600
    reference = Reference(model, VIEWS, recipe, 1.5)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(8))
    pixels = x.clone().requires_grad_()
    loss = reference.loss(pixels, t)
    loss.backward()

    text, _ = texts(3)

    def maps_of(pictures):
        seen = torch.cat([view.view(pictures) for view in VIEWS])
        return concept_maps(ours.text_maps(seen, t, text, SPANS), VIEWS)

    # A rate so large that the step is not lost in x's own rounding.
    stepped, value = anti_segregation_step(x, maps_of, rate=1e6, measure=recipe.overlap_measure)
    assert abs(value.item() - loss.item()) < 1e-6
    assert relative((x - stepped) / 1e6, pixels.grad) < 1e-4
    assert all(parameter.grad is None for parameter in ours.parameters())
