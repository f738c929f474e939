"""The published loop of stage I, written on diffusers and transformers as its code does the work.

Every forward records attention with an explicit softmax; the guided pass runs both halves of the batch and lets
every parameter take a gradient; one image at a time. The tokenizer and the noise-aware CLIP have no
reference to install: ours serve in both.
"""

import math
from itertools import combinations
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import T5EncoderModel

from mtl_anagram.models import load_noise_clip, load_tokenizer
from mtl_anagram.models.prompts import concept_span
from mtl_anagram.views import get_views

STEPS, GUIDANCE, RATE, LAST_GUIDED = 30, 10.0, 5.0, 25


class RecordingAttention:
    """Joint attention whose probabilities are kept, by layer."""

    def __init__(self, name: str, kept: dict[str, Tensor]) -> None:
        self.name, self.kept = name, kept

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        residual = hidden_states
        states = attn.group_norm(hidden_states.flatten(2)).transpose(1, 2)
        words = attn.norm_encoder_hidden_states(encoder_hidden_states)
        query = attn.head_to_batch_dim(attn.to_q(states), out_dim=4)
        key = torch.cat(
            [attn.head_to_batch_dim(p, out_dim=4) for p in (attn.add_k_proj(words), attn.to_k(states))], dim=2
        )
        value = torch.cat(
            [attn.head_to_batch_dim(p, out_dim=4) for p in (attn.add_v_proj(words), attn.to_v(states))], dim=2
        )
        probabilities = (query @ key.transpose(-1, -2) * attn.scale).softmax(-1)
        self.kept[self.name] = probabilities
        out = (probabilities @ value).transpose(1, 2).flatten(2)
        return attn.to_out[0](out).transpose(1, 2).reshape(residual.shape) + residual


def recorded(unet) -> dict[str, Tensor]:
    """Where the network's attention will be, by layer, from its next forward on."""
    kept: dict[str, Tensor] = {}
    unet.set_attn_processor({name: RecordingAttention(name, kept) for name in unet.attn_processors})
    return kept


def load(weights: Path) -> dict:
    """The embedded cascade's folder, read by the reference libraries in float32."""
    stage = weights / "stage_1"
    unet = UNet2DConditionModel.from_pretrained(
        stage / "unet", torch_dtype=torch.float32, low_cpu_mem_usage=False
    )
    return {
        "unet": unet,
        "maps": recorded(unet),
        "t5": T5EncoderModel.from_pretrained(stage / "text_encoder", torch_dtype=torch.float32),
        "tokenizer": load_tokenizer(stage),
        "scheduler": DDPMScheduler.from_pretrained(stage / "scheduler"),
        "clip": load_noise_clip(weights / "noise_clip", dtype=torch.float32),
    }


def sample(models: dict, prompts: list[str], view_names: list[str], seed: int, steps: int = STEPS) -> Tensor:
    """One 64 px anagram with all techniques, (3, 64, 64) in [-1, 1]."""
    ids, mask = models["tokenizer"]([""] * len(prompts) + prompts)
    with torch.no_grad():
        text = models["t5"](ids, attention_mask=mask).last_hidden_state
    spans = [concept_span(models["tokenizer"], prompt) for prompt in prompts]
    *_, x = states(
        models["unet"], models["maps"], models["scheduler"], text, get_views(view_names), spans, seed, steps,
        models["clip"].scorer(prompts),
    )  # fmt: skip
    return x[0]


def states(unet, maps, scheduler, text, views, spans, seed, steps=STEPS, score=None, low_res=None, level=50):
    """The picture after every step, (1, 3, H, W). spans None: without anti-segregation; low_res: a stage II's."""
    count, device, size, more = len(views), text.device, 64, {}
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    generator = torch.Generator().manual_seed(seed)
    if low_res is not None:
        size = 4 * low_res.shape[-1]
    x = torch.randn(1, 3, size, size, generator=generator).to(device)
    if low_res is not None:
        large = torch.nn.functional.interpolate(low_res, (size, size), mode="bilinear", align_corners=True)
        noise = torch.randn(1, 3, size, size, generator=generator).to(device)
        condition = scheduler.add_noise(large, noise, torch.tensor([level], device=device))
        more = {"class_labels": torch.full((2 * count,), level, device=device)}
    for k, t in enumerate(times):
        with torch.no_grad():
            full = x if low_res is None else torch.cat([x, condition], dim=1)
            seen = torch.stack([view.view(full[0]) for view in views])
            rows = torch.cat([seen, seen]).to(text.dtype)
            null, prompt = unet(rows, t, text, **more).sample.float().chunk(2)
            null = torch.stack([view.inverse_view(n) for view, n in zip(views, null, strict=True)])
            prompt = torch.stack([view.inverse_view(p) for view, p in zip(views, prompt, strict=True)])
            eps = null[:, :3] + GUIDANCE * (prompt[:, :3] - null[:, :3])
            a = torch.ones(count, device=device)
            if score is not None:
                cosines = score(seen[None] / 2 + 0.5, t)[0].clamp(min=1e-4)
                a = cosines ** -(1 + k / 30)
            a = a / a.sum()
            power = (a**2).sum()
            for i, j in combinations(range(count), 2):
                power = power + 2 * a[i] * a[j] * (eps[i] * eps[j]).mean()
            noise = (a[:, None, None, None] / power.sqrt() * eps).sum(0)
            variance = (a[:, None, None, None] * prompt[:, 3:]).sum(0)
            x = scheduler.step(torch.cat([noise, variance])[None], t, x, generator=generator).prev_sample
        if spans is not None and k <= LAST_GUIDED and k + 1 < len(times):
            x = separate(unet, maps, x, times[k + 1], text, spans, views)
        yield x


def separate(unet, maps, x, t, text, spans, views) -> Tensor:
    """One gradient step on the overlap of the views' token maps."""
    count = len(views)
    x = x.detach().requires_grad_()
    optimizer = torch.optim.SGD([x], lr=RATE)
    seen = torch.stack([view.view(x[0]) for view in views])
    unet(torch.cat([seen, seen]).to(text.dtype), t, text)
    totals = [0.0] * count
    for name, probabilities in maps.items():
        if name.startswith(("down", "up")) and probabilities.shape[2] == 32 * 32:
            for i, (start, stop) in enumerate(spans):
                columns = probabilities[count + i, :, :, start:stop].float().sum(dim=(0, 2))
                totals[i] = totals[i] + views[i].inverse_map(columns.reshape(32, 32))
    pairs = list(combinations(range(count), 2))
    wanted = 0.5 - 0.05 * (count - 1)
    loss = sum(
        (wanted - torch.min(totals[i], totals[j]).sum() / (totals[i] + totals[j]).sum()).abs()
        for i, j in pairs
    ) / len(pairs)
    loss.backward()
    if not math.isfinite(loss.item()):
        raise SystemExit("the reference's loss is not finite")
    optimizer.step()
    unet.zero_grad()
    return x.detach()
