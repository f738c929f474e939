"""From a folder or the hub to a module in eval mode, without gradients: strict, nothing built twice.

What the loaders have in common. source: a folder in the published layout, the model's own folder, or a hub id.
variant: "fp16" takes `NAME.fp16.safetensors` or the shards that its index names. dtype None = the files' own. They
raise ConfigError and WeightsError (ValueErrors) where a file does not fit, SourceError (an OSError) where it is not
there or not whole. Files are memory-mapped; a pickled twin (.bin) is never read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError, InputError, SourceError, WeightsError, flag, read_fields
from ..files.hub import Files, Source, open_source, read_config, read_json, require
from ..files.shards import Shards, read_safetensors
from .configs import Config, UNetConfig
from .glide import clip_files, open_noise_clip, read_pickle
from .judge import Judge
from .noise_clip import NoiseCLIP, image_encoder_from, text_encoder_from
from .t5 import T5Config, T5Encoder
from .t5_streamed import StreamedT5Encoder
from .tokenizers import CLIPTokenizer, T5Tokenizer
from .unet import UNet

C = TypeVar("C", bound=Config)
M = TypeVar("M", bound=nn.Module)
Name = str | None
Dtype = torch.dtype | str | None
Device = torch.device | str
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FLOATS = (*DTYPES.values(), torch.float64)
UNET_BASE, TEXT_BASE = "diffusion_pytorch_model", "model"  # how a network's weight files are called
T5_ALIASES = {"encoder.embed_tokens.weight": "shared.weight"}  # the files hold one copy under either name


def config_of(source: Source, subfolder: Name, kind: type[C]) -> C:
    """A network's config.json, read without its weights."""
    return read_config(require(open_source(source, subfolder, "config.json"), "config.json"), kind.from_dict)


def shards_of(source: Source, subfolder: Name, base: str, variant: Name, **names: Any) -> Shards:
    """A network's weight files, by their headers; names: `Shards`' aliases and ignored."""
    return Shards(weight_files(open_source(source, subfolder, "config.json"), base, variant), **names)


def load_unet(
    source: Source, *, subfolder: Name = "unet", variant: Name = None, dtype: Dtype = None, device: Device = "cpu"
) -> UNet:  # fmt: skip
    """An IF UNet, stage I or II; of a file that mixes dtypes all is in the widest."""
    device, dtype = resolve_device(device), resolve_dtype(dtype)
    config = config_of(source, subfolder, UNetConfig)
    shards = shards_of(source, subfolder, UNET_BASE, variant)
    return assemble(lambda: UNet(config), shards, dtype=dtype, device=device, one_dtype=True)


def check_unet_files(source: Source, *, subfolder: Name = "unet", variant: Name = None) -> None:
    """Whether `load_unet` would find what it needs: config, names, shapes, whole files. Reads no values."""
    config = config_of(source, subfolder, UNetConfig)
    check_fit(lambda: UNet(config), shards_of(source, subfolder, UNET_BASE, variant))


def load_t5(
    source: Source, *, subfolder: Name = "text_encoder", variant: Name = None, dtype: Dtype = None,
    device: Device = "cpu", streamed: bool = False,
) -> T5Encoder:  # fmt: skip
    """A T5 v1.1 encoder; dtype None keeps every tensor's own.

    The published fp16 variant stores the feed-forward's output weights in float32, because their products overflow
    in half precision. streamed: leave the matrices in the files and read each when a call needs it
    (`StreamedT5Encoder`); dtype None is then float32 on the CPU and bfloat16 elsewhere.
    """
    device, dtype, streamed = resolve_device(device), resolve_dtype(dtype), flag("streamed", streamed)
    config = config_of(source, subfolder, T5Config)
    shards = shards_of(source, subfolder, TEXT_BASE, variant, aliases=T5_ALIASES)
    if streamed:
        check_fit(lambda: T5Encoder(config), shards)
        return StreamedT5Encoder(config, shards, dtype=dtype, device=device)
    return assemble(lambda: T5Encoder(config), shards, dtype=dtype, device=device)


def load_tokenizer(source: Source, *, subfolder: Name = "tokenizer") -> T5Tokenizer:
    """T5's tokenizer from `spiece.model`, else from `tokenizer.json`."""
    files = open_source(source, subfolder, "spiece.model", "tokenizer.json")
    return T5Tokenizer(require(files, "spiece.model", "tokenizer.json"))


def load_noise_clip(
    source: Source, *, subfolder: Name = None, dtype: Dtype = None, device: Device = "cpu"
) -> NoiseCLIP:
    """The noise-aware CLIP from clip_image_enc and clip_text_enc, .safetensors or .pt; sizes are the tensors'.

    source "glide": GLIDE's own, downloaded once from where they were published. .pt files are read by torch's
    weights-only unpickler. The byte-pair merges are the folder's `merges.txt` or CLIP's `bpe_simple_vocab_16e6.txt.gz`.
    """
    device, dtype = resolve_device(device), resolve_dtype(dtype)
    image, text, pairs = clip_files(open_noise_clip(source, subfolder))

    def tower(path: Path, build: Callable[[Mapping[str, Tensor]], M]) -> M:
        state = read_pickle(path) if path.suffix == ".pt" else read_safetensors(path)
        try:
            return assemble(lambda: build(state), state, dtype=dtype, device=device, one_dtype=True)
        except (LookupError, RuntimeError, TypeError, ValueError) as error:  # of what tensors there are
            remedy = "take the file from a whole release"
            raise WeightsError(f"{path} is no such tower ({error}): {remedy}") from error

    return NoiseCLIP(tower(image, image_encoder_from), tower(text, text_encoder_from), CLIPTokenizer(pairs))


def load_judge(
    source: Source, *, subfolder: Name = "judge", dtype: Dtype = torch.float32, device: Device = "cpu"
) -> Judge:
    """A judge from judge.safetensors and judge.json (its names)."""
    device, dtype = resolve_device(device), resolve_dtype(dtype)
    files = open_source(source, subfolder, "judge.json")
    read: dict[str, Any] = {"names": tuple[str, ...]}
    parse = functools.partial(read_fields, owner="a judge", read=read, required=["names"], unused=None)
    known = read_config(require(files, "judge.json"), parse)["names"]
    if not known:
        raise ConfigError(f"{files}: judge.json has names=[]; take the file from a whole release")
    shards = Shards([require(files, "judge.safetensors")])
    return assemble(lambda: Judge(known), shards, dtype=dtype, device=device)


def weight_names(base: str, variant: Name) -> list[str]:
    """How a model's weight file may be called, then its shards' index: transformers' and diffusers' ways."""
    dot = "" if variant is None else f".{variant}"
    indices = f"{base}.safetensors.index{dot}.json", f"{base}{dot}.safetensors.index.json"
    return [f"{base}{dot}.safetensors", *dict.fromkeys(indices)]


def weight_files(files: Files, base: str, variant: Name) -> list[Path]:
    """The safetensors files of a model: one, or the shards that an index names."""
    if variant is not None and (not isinstance(variant, str) or not variant.isidentifier()):
        raise InputError(f"variant={variant!r} must be a word such as 'fp16', or None")
    whole, *indices = weight_names(base, variant)
    remedy = "; a pickled .bin is not read: convert it; or leave variant out, for the files without one"
    path = require(files, whole, *indices, remedy=remedy)
    if path.name == whole:
        return [path]
    weight_map = read_json(path).get("weight_map")
    shards = {str(shard) for shard in weight_map.values()} if isinstance(weight_map, dict) else set()
    if not shards or any(Path(shard).name != shard for shard in shards):
        raise SourceError(f"{path} has no weight_map of plain file names, the shards'; download it again")
    return [require(files, shard) for shard in sorted(shards)]


@torch.inference_mode(False)
@torch.no_grad()
def assemble(
    build: Callable[[], M], state: Mapping[str, Tensor], *, dtype: torch.dtype | None, device: torch.device,
    one_dtype: bool = False,
) -> M:  # fmt: skip
    """Build a module on the meta device and give it the files' tensors, strictly.

    dtype None = every tensor's own, or with one_dtype the widest of them.
    """
    module = check_fit(build, state)
    if dtype is None and one_dtype:
        dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in state.values()))
    placed = {}
    for name, tensor in state.items():
        cast = placed[name] = tensor.to(device=device, dtype=dtype or tensor.dtype)
        if not cast.isfinite().all():
            overflow = f"its values overflow {cast.dtype}: load in float32 or bfloat16"
            reason = overflow if tensor.isfinite().all() else "it is damaged: download it again"
            raise WeightsError(f"{getattr(state, 'origin', 'the file')}: {name} is not finite; {reason}")
    module.load_state_dict(placed, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def check_fit(build: Callable[[], M], state: Mapping[str, Tensor]) -> M:
    """The module on the meta device; WeightsError unless floating tensors have exactly its names and shapes."""
    with torch.device("meta"):
        module = build()
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = [f"missing: {name}" for name in expected if name not in found]
    wrong += [f"unexpected: {name}" for name in found if name not in expected]
    both = [name for name in found if name in expected]
    wrong += [f"misshapen: {n} {found[n]}, expected {expected[n]}" for n in both if found[n] != expected[n]]
    wrong += [f"not floating: {n} {state[n].dtype}" for n in both if state[n].dtype not in FLOATS]
    if wrong:
        origin, kind = getattr(state, "origin", "the file"), type(module).__name__
        said = f"as its config describes it: {len(wrong)} tensors differ, {'; '.join(wrong[:6])}"
        remedy = "Take config and weights from the same release"
        raise WeightsError(f"{origin} does not fit {kind} {said}. {remedy}")
    return module


def resolve_device(device: str | torch.device | None) -> torch.device:
    """A device that is there. None = the best there is: CUDA, then MPS, then the CPU."""
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ["cuda"] * bool(cuda) + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if device is None:
        return torch.device(there[0])
    # By their names: torch counts modulo 256, cuda:256 would be cuda:0.
    there += [f"cuda:{i}" for i in range(cuda)]
    if str(device) not in (*there, "cpu:0", *["mps:0"] * ("mps" in there)):
        said = f"which has {cuda} CUDA devices: use {', '.join(map(repr, there))}, or None for the best"
        raise InputError(f"device={device!r} is not on this machine, {said}")
    return torch.device(device)


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A floating dtype by name or as it is; None stays None."""
    resolved = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and resolved not in DTYPES.values():
        raise InputError(f"dtype={dtype!r} is not supported; use one of {', '.join(DTYPES)}, or None")
    return resolved
