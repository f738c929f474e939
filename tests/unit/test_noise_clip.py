"""The noise-aware CLIP against a slow readable restatement, its names and sizes, and its refusals."""

import re

import pytest
import torch

from mtl_anagram.errors import InputError
from mtl_anagram.models import NoiseCLIP
from mtl_anagram.models.noise_clip import ImageEncoder, TextEncoder, image_encoder_from, text_encoder_from
from mtl_anagram.models.tokenizers import CLIPTokenizer
from tests.helpers import facts, relative
from tests.unit.test_attention import slow
from tests.unit.tiny import MERGES


def norm(x, state, name):
    """Layer norm, written out."""
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + 1e-5).sqrt() * state[f"{name}.g"] + state[f"{name}.b"]


def tower(x, state, heads, causal):
    """All blocks, and the projection of every token: x (R, S, D) -> (R, S, E)."""
    layers = 1 + max(int(m[1]) for m in (re.match(r"blocks\.block_(\d+)", name) for name in state) if m)
    for i in range(layers):
        name = f"blocks.block_{i}.f_attn"
        y = norm(x, state, f"{name}.ln")
        q = y @ state[f"{name}.f_q.w"].T + state[f"{name}.f_q.b"]
        k = y @ state[f"{name}.f_k.w"].T
        v = y @ state[f"{name}.f_v.w"].T + state[f"{name}.f_v.b"]
        by_head = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        mixed, _ = slow(*by_head, causal=causal)
        x = x + mixed.transpose(1, 2).flatten(2) @ state[f"{name}.f_c.w"].T + state[f"{name}.f_c.b"]
        name = f"blocks.block_{i}.f_mlp"
        y = norm(x, state, f"{name}.ln") @ state[f"{name}.f_1.w"].T + state[f"{name}.f_1.b"]
        y = y * 0.5 * (1 + torch.erf(y / 2**0.5))
        x = x + y @ state[f"{name}.f_2.w"].T + state[f"{name}.f_2.b"]
    return norm(x, state, "blocks.output.ln") @ state["blocks.output.f.w"].T


def slow_image(state, pictures, t, heads):
    """pictures (R, 3, S, S), t a list of R ints -> unit vectors (R, E)."""
    mean = torch.tensor([122.77093945, 116.74601272, 104.09373519])[:, None, None]
    std = torch.tensor([68.50053285, 66.63215831, 70.32316309])[:, None, None]
    pixels = ((pictures + 1) * 127.5 - mean) / std
    kernel = state["blocks.input.patch_proj"]
    size = kernel.shape[-1]
    tokens = [state["blocks.input.w_t"][t]]
    for top in range(0, pictures.shape[-1], size):
        for left in range(0, pictures.shape[-1], size):
            patch = pixels[:, :, top : top + size, left : left + size]
            tokens.append(torch.einsum("rchw,dchw->rd", patch, kernel))
    x = norm(torch.stack(tokens, 1) + state["blocks.input.w_pos"], state, "blocks.input.ln")
    out = tower(x, state, heads, causal=False)[:, 0]
    return out / out.norm(dim=-1, keepdim=True)


def slow_text(state, ids, length, heads):
    """One text's ids -> unit vector (E,)."""
    x = state["blocks.input.w_voc"][ids] + state["blocks.input.w_pos"][: len(ids)]
    out = tower(x[None], state, heads, causal=True)[0, length - 1]
    return out / out.norm()


def randomise(module):
    """Every parameter random, so that none is at a value that hides it."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        base = 1.0 if name.endswith(".g") else 0.0
        parameter.data = base + torch.randn(parameter.shape) * 0.2
    return module.requires_grad_(False)


def small_clip():
    image = ImageEncoder(image_size=12, patch_size=4, width=128, layers=2, embedding=24, n_timesteps=50)
    text = TextEncoder(vocab=519, context=16, width=64, layers=3, embedding=24)
    return NoiseCLIP(randomise(image), randomise(text), CLIPTokenizer(MERGES))


def test_towers_equal_the_slow_ones():
    clip = small_clip()
    pictures = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    expected = slow_image(clip.image_encoder.state_dict(), pictures, [0, 7, 49], heads=2)
    assert relative(clip.embed_image(pictures, torch.tensor([0, 7, 49])), expected) <= 1e-5
    for text in ("", "a duck", "cat " * 30):
        ids, length = clip.tokenizer.encode(text, 16)
        expected = slow_text(clip.text_encoder.state_dict(), ids, length, heads=1)
        assert relative(clip.embed_text([text])[0], expected) <= 1e-5


def test_real_size_has_the_published_names_and_shapes():
    with torch.device("meta"):
        assert facts(ImageEncoder()) == (188, 86_443_776, "9f79242d087c921c")
        assert facts(TextEncoder()) == (185, 71_679_488, "9d4e78f3d565dbba")


def test_towers_are_read_off_the_shapes():
    clip = small_clip()
    for module, build in ((clip.image_encoder, image_encoder_from), (clip.text_encoder, text_encoder_from)):
        with torch.device("meta"):
            built = build(module.state_dict())
        built.load_state_dict(module.state_dict(), strict=True, assign=True)
        inputs = (torch.randn(2, 3, 12, 12), 3)
        if module is clip.text_encoder:
            inputs = torch.tensor([[517, 4, 518]]), torch.tensor([3])
        assert torch.equal(built(*inputs), module(*inputs))


def test_states_of_another_model_are_refused():
    state = small_clip().image_encoder.state_dict()
    with pytest.raises(InputError, match="width=96.*multiple of 64"):
        image_encoder_from({**state, "blocks.input.w_t": torch.zeros(50, 96)})
    with pytest.raises(KeyError, match=r"blocks\.input\.w_voc"):
        text_encoder_from(state)


def test_scores_are_each_views_cosine_with_its_own_prompt():
    clip = small_clip()
    prompts = ["a duck", "a cat", "ducks"]
    score = clip.scorer(prompts)
    pictures = torch.randn(2, 3, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    scores = score(pictures, 7)
    assert scores.shape == (2, 3)
    assert scores.dtype == torch.float32
    texts = clip.embed_text(prompts)
    for b in range(2):
        for v in range(3):
            expected = torch.dot(clip.embed_image(pictures[b, v][None], 7)[0], texts[v])
            assert abs(scores[b, v] - expected) <= 1e-6
    per_picture = score(pictures, torch.tensor([7, 30]))
    assert relative(per_picture[0], scores[0]) <= 1e-5
    assert relative(per_picture[1], score(pictures[1:], 30)[0]) <= 1e-5
    assert relative(per_picture[1], scores[1]) > 1e-4
    assert torch.allclose(score(pictures, torch.tensor(7)), scores, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes(dtype):
    clip = small_clip()
    pictures = torch.randn(2, 2, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    expected = clip.scorer(["a duck", "a cat"])(pictures, 7)
    scores = clip.to(dtype).scorer(["a duck", "a cat"])(pictures.to(dtype), 7)
    assert scores.dtype == torch.float32
    assert (scores - expected).abs().max() < 0.05


def test_all_parameters_learn():
    clip = small_clip().requires_grad_(True)
    similarity = (clip.embed_image(torch.randn(2, 3, 12, 12), 4) * clip.embed_text(["a duck", "a cat"])).sum()
    similarity.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in clip.parameters())


@pytest.mark.parametrize(
    "shape, t, match",
    [
        ((2, 3, 3, 12, 12), 5, r"here \(any, 2, 3, 12, 12\)"),
        ((1, 2, 3, 12, 12), 50, "t=50 must be a whole number from 0 to 49"),
        ((1, 2, 3, 12, 12), torch.tensor([3, 4, 5]), "one or 2, one for each picture"),
    ],
)
def test_scorer_refuses(shape, t, match):
    with pytest.raises(InputError, match=match):
        small_clip().scorer(["a duck", "a cat"])(torch.zeros(shape), t)


def test_parts_that_do_not_belong_together_are_refused():
    clip = small_clip()
    text = TextEncoder(vocab=519, context=16, width=64, layers=1, embedding=8)
    with pytest.raises(InputError, match="24 numbers, texts in 8"):
        NoiseCLIP(clip.image_encoder, text, clip.tokenizer)
    with pytest.raises(InputError, match="520 tokens, the text tower 519"):
        NoiseCLIP(clip.image_encoder, clip.text_encoder, CLIPTokenizer([*MERGES, "a b"]))
