"""GLIDE's noise-aware CLIP: it reads pictures with diffusion noise on them and is told how much."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..cosine import cosine_alpha_bar
from ..errors import InputError, WeightsError
from .attention import attention

if TYPE_CHECKING:
    from .tokenizers import CLIPTokenizer

HEAD_SIZE = 64
# Of embed_finished: where each look is shifted to, in 32nds of the side, and the looks' timestep as a share of all.
LOOKS = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (0, 0))
LOOKS_NOISE = 0.15
# Mean and standard deviation of CLIP's training pictures, red, green, blue, in 0..255.
PIXEL_MEAN = (122.77093945, 116.74601272, 104.09373519)
PIXEL_STD = (68.50053285, 66.63215831, 70.32316309)


class NoiseCLIP(nn.Module):
    """Both towers and their tokenizer: how well noisy pictures fit prompts (GLIDE, section 4.3)."""

    def __init__(
        self, image_encoder: ImageEncoder, text_encoder: TextEncoder, tokenizer: CLIPTokenizer
    ) -> None:
        super().__init__()
        if image_encoder.embedding != text_encoder.embedding:
            raise InputError(
                f"the towers do not belong together: pictures embed in {image_encoder.embedding} numbers, "
                f"texts in {text_encoder.embedding}; take both from the same release"
            )
        if tokenizer.vocab_size > text_encoder.vocab:
            raise InputError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the text tower only {text_encoder.vocab}: "
                "take the merges that belong to these weights"
            )
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer

    def embed_image(self, pictures: Tensor, t: int | Tensor) -> Tensor:
        """pictures (R, 3, S, S), x_t: [-1, 1] plus noise, at timestep t -> unit vectors (R, D) float32.

        t int or (R,) long, 0..n_timesteps-1 of the squared-cosine schedule (IF's). Any float dtype and
        device; the result lies on the pictures' device. S = image_size, else InputError.
        """
        if not isinstance(pictures, Tensor):
            raise InputError(f"pictures must be a tensor (R, 3, S, S), not {type(pictures).__name__}")
        device = next(self.image_encoder.parameters()).device
        return self.image_encoder(pictures.to(device), t).to(pictures.device)

    def embed_finished(self, pictures: Tensor) -> Tensor:
        """Finished pictures (R, 3, S, S) in [-1, 1] -> unit vectors (R, D) float32, for choosing among them.

        The mean of the LOOKS' embeddings: the picture as it is and shifted by a 32nd of its side to each side, every
        second look mirrored, under a little noise. Samples are not quite what the CLIP has learnt from; what one
        look takes for another thing, all of them seldom do. The noise is the same for every picture and every
        call. For measures that others define on the picture itself take embed_image(pictures, 0).
        """
        size, count = self.image_encoder.image_size, self.image_encoder.n_timesteps
        step, t = max(1, size // 32), round(LOOKS_NOISE * count)
        kept = cosine_alpha_bar(t / count)
        generator = torch.Generator().manual_seed(0)
        around = F.pad(pictures, (step,) * 4, mode="replicate")
        looks = []
        for look, (right, down) in enumerate(LOOKS):
            top, left = step * (1 - down), step * (1 - right)
            seen = around[..., top : top + size, left : left + size]
            seen = seen.flip(-1) if look % 2 else seen
            noise = torch.randn(1, *seen.shape[1:], generator=generator).to(seen)
            noisy = math.sqrt(kept) * seen + math.sqrt(1 - kept) * noise
            looks.append(self.embed_image(noisy, t))
        return F.normalize(torch.stack(looks).mean(0), dim=-1)

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """R texts -> unit vectors (R, D) float32. What exceeds the context (77 tokens) is cut."""
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
            raise InputError(f"texts={texts!r} must be a list of at least one str")
        encoded = [self.tokenizer.encode(text, context=self.text_encoder.context) for text in texts]
        device = next(self.text_encoder.parameters()).device
        ids = torch.tensor([ids for ids, _ in encoded], device=device)
        lengths = torch.tensor([length for _, length in encoded], device=device)
        return self.text_encoder(ids, lengths)

    def scorer(self, prompts: Sequence[str]) -> Callable[[Tensor, int | Tensor], Tensor]:
        """A function score(pictures (B, V, 3, S, S), t) -> (B, V) float32: view v's cosine with prompt v.

        The V prompts are embedded here, once. t is an int or (B,) long. The pictures are the viewed x_t,
        S = image_size; the score is differentiable in them. Raises InputError for another V, another size or
        a t that the model does not know.
        """
        with torch.no_grad():
            texts = self.embed_text(prompts)  # (V, D)

        def score(pictures: Tensor, t: int | Tensor) -> Tensor:
            if not isinstance(pictures, Tensor) or pictures.ndim != 5 or pictures.shape[1] != len(texts):
                shape = tuple(pictures.shape) if isinstance(pictures, Tensor) else type(pictures).__name__
                size = self.image_encoder.image_size
                raise InputError(
                    f"pictures {shape} must be (B, {len(texts)}, 3, {size}, {size}): one view for each of "
                    f"the scorer's {len(texts)} prompts"
                )
            batch, views = pictures.shape[:2]
            if isinstance(t, Tensor) and t.ndim == 1:
                if len(t) != batch:
                    raise InputError(f"t has {len(t)} entries for {batch} pictures: give one each, or an int")
                t = t.repeat_interleave(views)
            images = self.embed_image(rearrange(pictures, "b v c h w -> (b v) c h w"), t)
            images = rearrange(images, "(b v) d -> b v d", v=views)
            return (images * texts.to(images.device)).sum(dim=-1)

        return score


class ImageEncoder(nn.Module):
    """A vision transformer whose first token is the timestep's embedding; GLIDE's `clip_image_enc`."""

    def __init__(
        self,
        *,
        image_size: int = 64,
        patch_size: int = 4,
        width: int = 768,
        layers: int = 12,
        heads: int | None = None,
        embedding: int = 512,
        n_timesteps: int = 1000,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise InputError(f"patch_size={patch_size} does not divide image_size={image_size}")
        self.image_size, self.patch_size = image_size, patch_size
        self.embedding, self.n_timesteps = embedding, n_timesteps
        tokens = 1 + (image_size // patch_size) ** 2
        entry = PictureInput(tokens, patch_size, width, n_timesteps)
        self.blocks = _tower(entry, width, layers, heads, embedding, causal=False)

    def forward(self, pictures: Tensor, t: int | Tensor) -> Tensor:
        """pictures (R, 3, S, S), any float dtype, t int or (R,) long -> unit vectors (R, D) float32."""
        size = self.image_size
        if not isinstance(pictures, Tensor) or not pictures.is_floating_point():
            kind = pictures.dtype if isinstance(pictures, Tensor) else type(pictures).__name__
            raise InputError(f"pictures must be a floating tensor in [-1, 1] plus noise, not {kind}")
        if pictures.ndim != 4 or tuple(pictures.shape[1:]) != (3, size, size):
            raise InputError(
                f"pictures {tuple(pictures.shape)} must be (R, 3, {size}, {size}): resize them to this "
                f"model's {size} pixels first"
            )
        x = self.blocks["input"](pictures, _timesteps(t, self.n_timesteps, pictures))
        return _unit(_run(self.blocks, x)[:, 0])


class TextEncoder(nn.Module):
    """A causal transformer that reads the end token's state; GLIDE's `clip_text_enc`."""

    def __init__(
        self,
        *,
        vocab: int = 65536,
        context: int = 77,
        width: int = 512,
        layers: int = 12,
        heads: int | None = None,
        embedding: int = 512,
    ) -> None:
        super().__init__()
        self.vocab, self.context, self.embedding = vocab, context, embedding
        self.blocks = _tower(TextInput(vocab, context, width), width, layers, heads, embedding, causal=True)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids (R, L) long, L up to the context, lengths (R,) with the end token -> (R, D) float32, unit."""
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= self.context or lengths.shape != ids.shape[:1]:
            raise InputError(
                f"ids {tuple(ids.shape)} and lengths {tuple(lengths.shape)} must be (R, L) and (R,) with L "
                f"from 1 to {self.context}"
            )
        states = _run(self.blocks, self.blocks["input"](ids))
        return _unit(states[torch.arange(len(ids), device=ids.device), lengths - 1])


class PictureInput(nn.Module):
    """Patches and the timestep's token, with positions, normed."""

    def __init__(self, tokens: int, patch_size: int, width: int, n_timesteps: int) -> None:
        super().__init__()
        self.w_t = nn.Parameter(torch.randn(n_timesteps, width) * 0.02)
        self.patch_proj = nn.Parameter(
            torch.randn(width, 3, patch_size, patch_size) / math.sqrt(3 * patch_size**2)
        )
        self.w_pos = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.ln = LayerNorm(width)

    def forward(self, pictures: Tensor, t: Tensor) -> Tensor:
        """pictures (R, 3, S, S), t (R,) long -> (R, 1 + patches, D)."""
        mean, std = torch.tensor([PIXEL_MEAN, PIXEL_STD], device=pictures.device)[:, :, None, None]
        pixels = ((pictures.float() + 1) * 127.5 - mean) / std
        patches = F.conv2d(
            pixels.to(self.patch_proj.dtype), self.patch_proj, stride=self.patch_proj.shape[-1]
        )
        x = torch.cat([self.w_t[t][:, None], rearrange(patches, "r d h w -> r (h w) d")], dim=1)
        return self.ln(x + self.w_pos)


class TextInput(nn.Module):
    """Token and position embeddings."""

    def __init__(self, vocab: int, context: int, width: int) -> None:
        super().__init__()
        self.w_voc = nn.Parameter(torch.randn(vocab, width) * 0.02)
        self.w_pos = nn.Parameter(torch.randn(context, width) * 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (R, L) long -> (R, L, D)."""
        return F.embedding(ids, self.w_voc) + self.w_pos[: ids.shape[1]]


class Block(nn.Module):
    """Self-attention, then a feed-forward, each with its norm before it and added to its input."""

    def __init__(self, width: int, heads: int, layers: int, *, causal: bool) -> None:
        super().__init__()
        self.f_attn = SelfAttention(width, heads, layers, causal=causal)
        self.f_mlp = FeedForward(width, layers)

    def forward(self, x: Tensor) -> Tensor:
        """x (R, S, D) -> (R, S, D)."""
        x = x + self.f_attn(x)
        return x + self.f_mlp(x)


class SelfAttention(nn.Module):
    """Norm and multi-head attention; queries and values have a bias, keys have none."""

    def __init__(self, width: int, heads: int, layers: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.ln = LayerNorm(width)
        self.f_q = Linear(width, width)
        self.f_k = Linear(width, width, bias=False)
        self.f_v = Linear(width, width)
        self.f_c = Linear(width, width, gain=1 / math.sqrt(2 * layers))

    def forward(self, x: Tensor) -> Tensor:
        """x (R, S, D) -> (R, S, D)."""
        y = self.ln(x)
        q, k, v = (
            rearrange(layer(y), "r s (n d) -> r n s d", n=self.heads)
            for layer in (self.f_q, self.f_k, self.f_v)
        )
        return self.f_c(rearrange(attention(q, k, v, causal=self.causal), "r n s d -> r s (n d)"))


class FeedForward(nn.Module):
    """Norm, four times the width, exact GELU, back."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.ln = LayerNorm(width)
        self.f_1 = Linear(width, 4 * width)
        self.f_2 = Linear(4 * width, width, gain=1 / math.sqrt(2 * layers))

    def forward(self, x: Tensor) -> Tensor:
        """x (R, S, D) -> (R, S, D)."""
        return self.f_2(F.gelu(self.f_1(self.ln(x))))


class Output(nn.Module):
    """Norm and the projection to the shared space."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.ln = LayerNorm(width)
        self.f = Linear(width, embedding, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (R, S, D) -> (R, S, embedding)."""
        return self.f(self.ln(x))


class Linear(nn.Module):
    """x w^T + b, under GLIDE's names."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool = True, gain: float = 1.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(n_out, n_in) * (gain / math.sqrt(n_in)))
        self.b = nn.Parameter(torch.zeros(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n_in) -> (..., n_out)."""
        return F.linear(x, self.w, self.b)


class LayerNorm(nn.Module):
    """Layer norm under GLIDE's names, in float32, the result in x's dtype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(width))
        self.b = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        return F.layer_norm(x.float(), self.g.shape, self.g.float(), self.b.float(), eps=1e-5).to(x.dtype)


def image_encoder_from(state: Mapping[str, Tensor]) -> ImageEncoder:
    """The picture tower, on the meta device, that a state dict's shapes describe; heads have 64 channels.

    Raises WeightsError where a tensor that tells a size is missing or cannot belong to such a tower.
    """
    n_timesteps, width = _shape(state, "blocks.input.w_t", 2)
    _, channels, patch_size, _ = _shape(state, "blocks.input.patch_proj", 4)
    tokens, _ = _shape(state, "blocks.input.w_pos", 2)
    side = math.isqrt(max(tokens - 1, 0))
    if side < 1 or side * side != tokens - 1 or channels != 3 or patch_size < 1 or n_timesteps < 1:
        raise WeightsError(
            f"blocks.input.w_pos has {tokens} positions and blocks.input.patch_proj {channels} channels; a "
            "square of patches plus one, and 3, are expected: this is no clip_image_enc"
        )
    layers, embedding = _depth(state, width)
    with torch.device("meta"):
        return ImageEncoder(
            image_size=side * patch_size,
            patch_size=patch_size,
            width=width,
            layers=layers,
            embedding=embedding,
            n_timesteps=n_timesteps,
        )


def text_encoder_from(state: Mapping[str, Tensor]) -> TextEncoder:
    """The text tower, on the meta device, that a state dict's shapes describe; as image_encoder_from."""
    vocab, width = _shape(state, "blocks.input.w_voc", 2)
    context, _ = _shape(state, "blocks.input.w_pos", 2)
    if vocab < 1 or context < 2:
        raise WeightsError(
            f"blocks.input.w_voc has {vocab} tokens, w_pos {context} positions; 1 and 2 at least are needed"
        )
    layers, embedding = _depth(state, width)
    with torch.device("meta"):
        return TextEncoder(vocab=vocab, context=context, width=width, layers=layers, embedding=embedding)


def _shape(state: Mapping[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
    if name not in state:
        raise WeightsError(f"the state dict lacks {name}: this is not the tower of GLIDE's CLIP asked for")
    if state[name].ndim != ndim:
        raise WeightsError(
            f"{name} {tuple(state[name].shape)} must have {ndim} dimensions; download it again"
        )
    return tuple(state[name].shape)


def _depth(state: Mapping[str, Tensor], width: int) -> tuple[int, int]:
    """Number of blocks and width of the embedding; the width is checked too."""
    if width < HEAD_SIZE or width % HEAD_SIZE:
        raise WeightsError(
            f"the tower is {width} channels wide; a multiple of {HEAD_SIZE}, the size of a head, is needed"
        )
    layers = len({m[1] for m in (re.match(r"blocks\.block_(\d+)\.", name) for name in state) if m})
    if not layers:
        raise WeightsError("the state dict has no blocks.block_0...: this is no tower of GLIDE's CLIP")
    return layers, _shape(state, "blocks.output.f.w", 2)[0]


def _tower(
    entry: nn.Module, width: int, layers: int, heads: int | None, embedding: int, *, causal: bool
) -> nn.ModuleDict:
    heads = width // HEAD_SIZE if heads is None else heads
    if heads < 1 or width % heads:
        raise InputError(
            f"heads={heads} must divide width={width} (the default is width // {HEAD_SIZE}, at least 1)"
        )
    blocks = {f"block_{i}": Block(width, heads, layers, causal=causal) for i in range(layers)}
    return nn.ModuleDict({"input": entry, **blocks, "output": Output(width, embedding)})


def _run(blocks: nn.ModuleDict, x: Tensor) -> Tensor:
    """All modules of a tower after its input."""
    for name, block in blocks.items():
        if name != "input":
            x = block(x)
    return x


def _unit(x: Tensor) -> Tensor:
    x = x.float()
    return x / (x.norm(dim=-1, keepdim=True) + 1e-12)


def _timesteps(t: int | Tensor, limit: int, pictures: Tensor) -> Tensor:
    """t as (R,) long on the pictures' device, checked."""
    rows = len(pictures)
    if isinstance(t, Tensor):
        if t.dtype not in (torch.int64, torch.int32) or t.ndim > 1 or (t.ndim == 1 and len(t) != rows):
            raise InputError(
                f"t {tuple(t.shape)} of {t.dtype} must be an integer or {rows} of them, one for each picture"
            )
    elif isinstance(t, bool) or not isinstance(t, int):
        raise InputError(f"t={t!r} must be an int or a (R,) tensor of integers from 0 to {limit - 1}")
    elif not 0 <= t < limit:
        raise InputError(f"t={t} is outside 0..{limit - 1}, the timesteps that this model was trained on")
    steps = torch.as_tensor(t, dtype=torch.int64, device=pictures.device).expand(rows)
    if isinstance(t, Tensor) and rows and t.device.type != "meta":
        low, high = (int(bound) for bound in steps.aminmax())
        if low < 0 or high >= limit:
            raise InputError(
                f"t runs from {low} to {high}, outside 0..{limit - 1}, the timesteps this model knows"
            )
    return steps
