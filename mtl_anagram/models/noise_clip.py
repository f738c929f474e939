"""GLIDE's noise-aware CLIP: it reads pictures with diffusion noise on them and is told how much.

Shapes: R rows, B pictures of V views, S the side, D width or embedding; names are those of GLIDE's checkpoints.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import InputError, float_tensor, whole_number
from .attention import multi_head, random_weight
from .tokenizers import CLIPTokenizer, check_texts

HEAD_SIZE = 64
# Mean and standard deviation of CLIP's training pictures, red, green, blue, in 0..255.
PIXEL_MEAN = (122.77093945, 116.74601272, 104.09373519)
PIXEL_STD = (68.50053285, 66.63215831, 70.32316309)


class NoiseCLIP(nn.Module):
    """Both towers and their tokenizer: how well noisy pictures fit prompts (GLIDE, section 4.3)."""

    def __init__(
        self, image_encoder: ImageEncoder, text_encoder: TextEncoder, tokenizer: CLIPTokenizer
    ) -> None:
        super().__init__()
        sizes = image_encoder.embedding, text_encoder.embedding
        if sizes[0] != sizes[1] or tokenizer.vocab_size > text_encoder.vocab:
            said = f"pictures embed in {sizes[0]} numbers, texts in {sizes[1]}; the tokenizer has"
            said += f" {tokenizer.vocab_size} tokens, the text tower {text_encoder.vocab}"
            raise InputError(f"{said}: take all parts from one release")
        self.image_encoder, self.text_encoder, self.tokenizer = image_encoder, text_encoder, tokenizer

    def embed_image(self, pictures: Tensor, t: int | Tensor) -> Tensor:
        """pictures (R, 3, S, S), x_t: [-1, 1] plus noise, at timestep t -> unit vectors (R, D) float32.

        t int or (R,) long, 0..n_timesteps-1 of the squared-cosine schedule (IF's). Any float dtype and
        device, which is the result's too. S = image_size, else InputError.
        """
        size = self.image_encoder.image_size
        float_tensor("pictures", pictures, (None, 3, size, size), f"(R, 3, {size}, {size}), resized to that")
        device = next(self.image_encoder.parameters()).device
        return self.image_encoder(pictures.to(device), t).to(pictures.device)

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """R texts -> unit vectors (R, D) float32. What exceeds the context (77 tokens) is cut."""
        check_texts(texts)
        encoded = [self.tokenizer.encode(text, context=self.text_encoder.context) for text in texts]
        device = next(self.text_encoder.parameters()).device
        ids, lengths = (torch.tensor(part, device=device) for part in zip(*encoded, strict=True))
        return self.text_encoder(ids, lengths)

    def scorer(self, prompts: Sequence[str | Sequence[str]]) -> Callable[[Tensor, int | Tensor], Tensor]:
        """A function score(pictures (B, V, 3, S, S), t) -> (B, V) float32: view v's cosine with prompt v.

        The V prompts, or B lists of V, one for each image, are embedded here, once. The pictures are the viewed x_t, t
        an int or (B,) long; the score is differentiable in them. Raises InputError for another B or V, another size or
        a t that the model does not know.
        """
        each: Sequence[Any] = prompts if prompts and not isinstance(prompts[0], str) else [prompts]
        if len({len(own) for own in each}) > 1:
            raise InputError(f"prompts={prompts!r} must be as many for each image")
        with torch.no_grad():
            texts = torch.stack([self.embed_text(own) for own in each])  # (1 or B, V, D)

        def score(pictures: Tensor, t: int | Tensor) -> Tensor:
            size = self.image_encoder.image_size
            shape = (None if len(each) == 1 else len(each), texts.shape[1], 3, size, size)
            float_tensor("pictures", pictures, shape, "(B, V, 3, S, S), one view per prompt of the scorer")
            batch, views = pictures.shape[:2]
            if isinstance(t, Tensor) and t.ndim == 1 and len(t) == batch:
                t = t.repeat_interleave(views)
            images = self.embed_image(rearrange(pictures, "b v c h w -> (b v) c h w"), t)
            images = rearrange(images, "(b v) d -> b v d", v=views)
            return (images * texts.to(images.device)).sum(dim=-1)

        return score


class Tower(nn.Module):
    """A transformer on what its entry makes of the input, and its projection to the shared space."""

    def __init__(self, entry: nn.Module, width: int, layers: int, embedding: int, *, causal: bool) -> None:
        super().__init__()
        if width < HEAD_SIZE or width % HEAD_SIZE or layers < 1:
            wanted = f"a tower has a multiple of {HEAD_SIZE} channels, a head's size, and a layer or more"
            raise InputError(f"width={width}, layers={layers}: {wanted}")
        self.embedding = embedding
        blocks = {f"block_{i}": Block(width, layers, causal=causal) for i in range(layers)}
        exit_ = nn.Sequential(OrderedDict(ln=LayerNorm(width), f=Linear(width, embedding, bias=False)))
        self.blocks = nn.ModuleDict({"input": entry, **blocks, "output": exit_})

    def states(self, *inputs: Tensor) -> Tensor:
        """The entry's inputs -> every token's state (R, S, D)."""
        entry, *blocks = self.blocks.values()
        x = entry(*inputs)
        for block in blocks:
            x = block(x)
        return x


class ImageEncoder(Tower):
    """A vision transformer whose first token is the timestep's embedding; GLIDE's `clip_image_enc`."""

    def __init__(
        self, *, image_size: int = 64, patch_size: int = 4, width: int = 768, layers: int = 12,
        embedding: int = 512, n_timesteps: int = 1000,
    ) -> None:  # fmt: skip
        if not 1 <= patch_size <= image_size or image_size % patch_size:
            raise InputError(f"patch_size={patch_size} must divide image_size={image_size}")
        entry = PictureInput(1 + (image_size // patch_size) ** 2, patch_size, width, n_timesteps)
        super().__init__(entry, width, layers, embedding, causal=False)
        self.image_size, self.n_timesteps = image_size, n_timesteps

    def forward(self, pictures: Tensor, t: int | Tensor) -> Tensor:
        """pictures (R, 3, S, S), any float dtype, t int or (R,) long -> unit vectors (R, D) float32."""
        states = self.states(pictures, _timesteps(t, self.n_timesteps, pictures))
        return F.normalize(states[:, 0].float(), dim=-1)


class TextEncoder(Tower):
    """A causal transformer that reads the end token's state; GLIDE's `clip_text_enc`."""

    def __init__(
        self, *, vocab: int = 65536, context: int = 77, width: int = 512, layers: int = 12, embedding: int = 512
    ) -> None:  # fmt: skip
        super().__init__(TextInput(vocab, context, width), width, layers, embedding, causal=True)
        self.vocab, self.context = vocab, context

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids (R, L) long, L up to the context, lengths (R,) with the end token -> (R, D) float32, unit."""
        ends = self.states(ids)[torch.arange(len(ids), device=ids.device), lengths - 1]
        return F.normalize(ends.float(), dim=-1)


class PictureInput(nn.Module):
    """Patches and the timestep's token, with positions, normed."""

    def __init__(self, tokens: int, patch_size: int, width: int, n_timesteps: int) -> None:
        super().__init__()
        self.w_t = random_weight(n_timesteps, width, std=0.02)
        self.patch_proj = random_weight(width, 3, patch_size, patch_size, std=(3 * patch_size**2) ** -0.5)
        self.w_pos = random_weight(tokens, width, std=0.02)
        self.ln = LayerNorm(width)

    def forward(self, pictures: Tensor, t: Tensor) -> Tensor:
        colours = zip(pictures.float().unbind(1), PIXEL_MEAN, PIXEL_STD, strict=True)
        pixels = torch.stack([((plane + 1) * 127.5 - mean) / std for plane, mean, std in colours], dim=1)
        pixels = pixels.to(self.patch_proj.dtype)
        patches = F.conv2d(pixels, self.patch_proj, stride=self.patch_proj.shape[-1])
        x = torch.cat([self.w_t[t][:, None], rearrange(patches, "r d h w -> r (h w) d")], dim=1)
        return self.ln(x + self.w_pos)


class TextInput(nn.Module):
    """Token and position embeddings."""

    def __init__(self, vocab: int, context: int, width: int) -> None:
        super().__init__()
        self.w_voc = random_weight(vocab, width, std=0.02)
        self.w_pos = random_weight(context, width, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.w_voc) + self.w_pos[: ids.shape[1]]


class Block(nn.Module):
    """Self-attention (keys have no bias), then a feed-forward, each with its norm before it and added to its input."""

    def __init__(self, width: int, layers: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal, gain = width // HEAD_SIZE, causal, 1 / math.sqrt(2 * layers)
        q, k, v = Linear(width, width), Linear(width, width, bias=False), Linear(width, width)
        out = Linear(width, width, gain=gain)
        self.f_attn = nn.ModuleDict({"ln": LayerNorm(width), "f_q": q, "f_k": k, "f_v": v, "f_c": out})
        inner, back = Linear(width, 4 * width), Linear(4 * width, width, gain=gain)
        self.f_mlp = nn.Sequential(OrderedDict(ln=LayerNorm(width), f_1=inner, gelu=nn.GELU(), f_2=back))

    def forward(self, x: Tensor) -> Tensor:
        y = self.f_attn["ln"](x)
        q, k, v = (self.f_attn[name](y) for name in ("f_q", "f_k", "f_v"))
        x = x + self.f_attn["f_c"](multi_head(q, k, v, self.heads, causal=self.causal))
        return x + self.f_mlp(x)


class Linear(nn.Module):
    """x w^T + b, under GLIDE's names."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool = True, gain: float = 1.0) -> None:
        super().__init__()
        self.w = random_weight(n_out, n_in, std=gain / math.sqrt(n_in))
        self.b = nn.Parameter(torch.zeros(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w, self.b)


class LayerNorm(nn.Module):
    """Layer norm under GLIDE's names, in float32, the result in x's dtype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(width))
        self.b = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.g.shape, self.g.float(), self.b.float(), eps=1e-5).to(x.dtype)


def image_encoder_from(state: Mapping[str, Tensor]) -> ImageEncoder:
    """The picture tower that a state dict's shapes describe; InputError, KeyError or ValueError where they do not."""
    times, patches, places = (state[f"blocks.input.{name}"] for name in ("w_t", "patch_proj", "w_pos"))
    patch, side = patches.shape[3], math.isqrt(max(len(places) - 1, 0))
    (n_timesteps, _), sizes = times.shape, _sizes(state, "w_t")
    return ImageEncoder(image_size=side * patch, patch_size=patch, n_timesteps=n_timesteps, **sizes)


def text_encoder_from(state: Mapping[str, Tensor]) -> TextEncoder:
    """The text tower that a state dict's shapes describe; errors as above."""
    vocab, context = (len(state[f"blocks.input.{name}"]) for name in ("w_voc", "w_pos"))
    return TextEncoder(vocab=vocab, context=context, **_sizes(state, "w_voc"))


def _sizes(state: Mapping[str, Tensor], table: str) -> dict[str, int]:
    layers = {m[1] for m in (re.match(r"blocks\.block_(\d+)\.", name) for name in state) if m}
    (_, width), (embedding, _) = state[f"blocks.input.{table}"].shape, state["blocks.output.f.w"].shape
    return {"width": width, "layers": len(layers), "embedding": embedding}


def _timesteps(t: int | Tensor, limit: int, pictures: Tensor) -> Tensor:
    """t as (R,) long on the pictures' device, checked where that takes no reading back from another device."""
    rows = pictures.shape[0]  # not len(), which would fix the number in a graph
    if not isinstance(t, Tensor):  # filled in: a copy from the host would hold a GPU up
        t = torch.full((), whole_number("t", t, 0, limit - 1), dtype=torch.int64, device=pictures.device)
    seen = t.device.type == "cpu" and not torch.compiler.is_compiling()
    outside = seen and not ((t >= 0) & (t < limit)).all()
    if outside or t.is_floating_point() or t.shape not in ((), (rows,)):
        raise InputError(f"t={t}: give a timestep from 0 to {limit - 1}, one or {rows}, one for each picture")
    return torch.as_tensor(t, dtype=torch.int64, device=pictures.device).expand(rows)
