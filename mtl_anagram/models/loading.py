"""From a folder or the hub to a module: config.json and safetensors, strict, nothing built twice."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..checks import flag
from ..devices import resolve_device, resolve_dtype
from ..errors import ConfigError, InputError, SourceError, WeightsError
from .configs import UNetConfig
from .glide import MERGES, open_noise_clip, read_pickle
from .judge import Judge
from .noise_clip import NoiseCLIP, image_encoder_from, text_encoder_from
from .shards import Shards
from .sources import Files, Source, open_source, read_config, read_json, require
from .t5 import T5Encoder
from .t5_config import T5Config
from .t5_streamed import StreamedT5Encoder
from .tokenizers import CLIPTokenizer, T5Tokenizer
from .unet import UNet

M = TypeVar("M", bound=nn.Module)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
T5_ALIASES = {"encoder.embed_tokens.weight": "shared.weight"}


def load_unet(
    source: Source,
    *,
    subfolder: str | None = "unet",
    variant: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
) -> UNet:
    """An IF UNet, stage I or II, in eval mode, its parameters without gradients.

    source: a folder in the published layout (the model's own folder will do too) or a hub id. variant:
    "fp16" takes `diffusion_pytorch_model.fp16.safetensors`. dtype None = the file's (the widest, if it mixes
    several). Raises ConfigError, WeightsError (ValueErrors) and SourceError (an OSError).
    """
    device, dtype = resolve_device(device), resolve_dtype(dtype)
    files = open_source(source, subfolder, "config.json")
    config = read_config(require(files, "config.json"), UNetConfig.from_dict)
    paths = weight_files(files, "diffusion_pytorch_model", variant)
    return assemble(lambda: UNet(config), paths, dtype=dtype, device=device, one_dtype=True)


def load_t5(
    source: Source,
    *,
    subfolder: str | None = "text_encoder",
    variant: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    streamed: bool = False,
) -> T5Encoder:
    """A T5 v1.1 encoder, in eval mode, its parameters without gradients; arguments as `load_unet`'s.

    dtype None keeps every tensor's own: the published fp16 variant stores the feed-forward's output weights
    in float32, because their products overflow in half precision. The files hold one copy of the
    embedding, as `shared.weight` or as its alias `encoder.embed_tokens.weight`; either will do.

    streamed: leave the matrices in the files and read each when a call needs it (`StreamedT5Encoder`), for a
    machine that cannot hold the whole; dtype None is then float32 on the CPU and bfloat16 elsewhere.
    """
    device, dtype = resolve_device(device), resolve_dtype(dtype)
    streamed = flag("streamed", streamed)
    files = open_source(source, subfolder, "config.json")
    config = read_config(require(files, "config.json"), T5Config.from_dict)
    paths = weight_files(files, "model", variant)
    if streamed:
        with torch.device("meta"):
            expected = T5Encoder(config)
        shards = Shards(paths, aliases=T5_ALIASES)
        check_fit(expected, shards, shards.origin)
        return StreamedT5Encoder(config, shards, dtype=dtype, device=device)
    return assemble(lambda: T5Encoder(config), paths, dtype=dtype, device=device, aliases=T5_ALIASES)


def load_tokenizer(source: Source, *, subfolder: str | None = "tokenizer") -> T5Tokenizer:
    """T5's sentencepiece tokenizer from `spiece.model` in a folder or a hub repository."""
    return T5Tokenizer(require(open_source(source, subfolder, "spiece.model"), "spiece.model"))


def load_noise_clip(
    source: Source,
    *,
    subfolder: str | None = None,
    merges: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
) -> NoiseCLIP:
    """The noise-aware CLIP from a folder with clip_image_enc and clip_text_enc, .safetensors or .pt.

    source "glide": GLIDE's own, downloaded once from where they were published. A folder's .pt files are read by
    torch's weights-only unpickler and, where the folder can be written to, made .safetensors beside them at
    the first time. Every size is read off the tensors' shapes. The byte-pair merges are the folder's
    `merges.txt` or `bpe_simple_vocab_16e6.txt.gz` (CLIP's own), or the file that `merges` names.
    """
    device, dtype = resolve_device(device), resolve_dtype(dtype)
    files = open_noise_clip(source, subfolder)

    def tower(name: str, build: Callable[[Mapping[str, Tensor]], M]) -> M:
        state, origin = _clip_state(files, name)
        try:
            module = build(state)
        except WeightsError as error:
            raise WeightsError(f"{origin}: {error}; take the file from a whole release") from error
        return _fill(module, state, origin, dtype=dtype, device=device, one_dtype=True)

    image, text = tower("clip_image_enc", image_encoder_from), tower("clip_text_enc", text_encoder_from)
    if merges is None:
        found = next((path for path in map(files.get, MERGES) if path is not None), None)
        if found is None:
            raise SourceError(
                f"{files} has none of {', '.join(MERGES)}: put CLIP's byte-pair merges there, or name the file "
                "with merges="
            )
        merges = found
    return NoiseCLIP(image, text, CLIPTokenizer(merges))


def load_judge(
    source: Source,
    *,
    subfolder: str | None = "judge",
    dtype: torch.dtype | str | None = torch.float32,
    device: torch.device | str = "cpu",
) -> Judge:
    """A judge from a folder or hub id with judge.safetensors and judge.json (its names), in eval mode.

    Raises SourceError where a file is missing, WeightsError or ConfigError where one does not fit.
    """
    device, dtype = resolve_device(device), resolve_dtype(dtype)
    files = open_source(source, subfolder, "judge.json")

    def names(config: dict[str, Any]) -> list[str]:
        found = config.get("names")
        if not isinstance(found, list) or not found or not all(isinstance(name, str) for name in found):
            raise ConfigError(f"names={found!r} must be a list of names")
        return found

    known = read_config(require(files, "judge.json"), names)
    return assemble(lambda: Judge(known), [require(files, "judge.safetensors")], dtype=dtype, device=device)


def index_names(base: str, variant: str | None) -> list[str]:
    """What a sharded model's index may be called: transformers' and diffusers' ways."""
    dot = "" if variant is None else f".{variant}"
    return list(dict.fromkeys((f"{base}.safetensors.index{dot}.json", f"{base}{dot}.safetensors.index.json")))


def weight_files(files: Files, base: str, variant: str | None) -> list[Path]:
    """The safetensors files of a model: one, or the shards that an index names.

    Looks for `base.safetensors` or `base.VARIANT.safetensors`, then for the index under the names that
    diffusers and transformers write. A pickled twin (.bin) is never read.
    """
    if variant is not None and (not isinstance(variant, str) or not variant.isidentifier()):
        raise InputError(f"variant={variant!r} must be a word such as 'fp16', or None")
    dot = "" if variant is None else f".{variant}"
    whole = f"{base}{dot}.safetensors"
    path = files.get(whole)
    if path is not None:
        return [path]
    for index_name in index_names(base, variant):
        index = files.get(index_name)
        if index is None:
            continue
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise SourceError(f"{index} has no weight_map that names the shards; download it again")
        shards = sorted({str(shard) for shard in weight_map.values()})
        for shard in shards:
            if Path(shard).name != shard:
                raise SourceError(f"{index} names the shard {shard!r}; a plain file name is expected")
        return [require(files, shard) for shard in shards]
    hint = "" if variant is None else "; for the files without a variant, leave variant out"
    if files.get(f"{base}{dot}.bin") or files.get(f"pytorch_{base}{dot}.bin"):
        hint = "; the pickled .bin is not read: convert it to safetensors"
    raise SourceError(f"{files} has no {whole} and no index of its shards: {files.listing()}{hint}")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, memory-mapped; SourceError where it is truncated or something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise SourceError(
            f"{path} is not a whole safetensors file ({error}); delete it and download it again"
        ) from error


def check_unet_files(source: Source, *, subfolder: str | None = "unet", variant: str | None = None) -> None:
    """Whether `load_unet` would find what it needs: config, names, shapes, whole files. Reads no values."""
    files = open_source(source, subfolder, "config.json")
    with torch.device("meta"):
        unet = UNet(read_config(require(files, "config.json"), UNetConfig.from_dict))
    paths = weight_files(files, "diffusion_pytorch_model", variant)
    shards = Shards(paths)
    check_fit(unet, shards, shards.origin)


def assemble(
    build: Callable[[], M],
    paths: list[Path],
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    aliases: Mapping[str, str] | None = None,
    one_dtype: bool = False,
    ignored: Collection[str] = (),
) -> M:
    """Build a module on the meta device and give it the files' tensors, strictly.

    aliases: other names for the module's tensors. ignored: tensors by name that the files may hold besides.
    """
    state: dict[str, Tensor] = {}
    for path in paths:
        for name, tensor in read_safetensors(path).items():
            name = (aliases or {}).get(name, name)
            if name in ignored:
                continue
            if name in state and not torch.equal(state[name], tensor):
                raise WeightsError(f"{path} holds {name} a second time, with other values; download it again")
            state[name] = tensor
    with torch.device("meta"):
        module = build()
    origin = str(paths[0] if len(paths) == 1 else paths[0].parent)
    return _fill(module, state, origin, dtype=dtype, device=device, one_dtype=one_dtype)


def _fill(
    module: M,
    state: dict[str, Tensor],
    origin: str,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    one_dtype: bool = False,
) -> M:
    check_fit(module, state, origin)
    if dtype is None and one_dtype:
        dtype = next(iter(state.values())).dtype
        for tensor in state.values():
            dtype = torch.promote_types(dtype, tensor.dtype)
    placed = {}
    for name, tensor in state.items():
        cast = tensor.to(device=device, dtype=dtype or tensor.dtype)
        if not torch.isfinite(cast).all():
            reason = "it is damaged: download it again"
            if torch.isfinite(tensor).all():
                reason = f"its values overflow {cast.dtype}: load in float32 or bfloat16"
            raise WeightsError(f"{origin}: {name} is not finite; {reason}")
        placed[name] = cast
    module.load_state_dict(placed, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def check_fit(module: nn.Module, state: Mapping[str, Any], origin: str) -> None:
    """WeightsError unless a state (tensors, or entries of files) has exactly the module's names and shapes."""
    expected = module.state_dict()
    problems = [
        *_listed("missing", [name for name in expected if name not in state]),
        *_listed("unexpected", [name for name in state if name not in expected]),
        *_listed(
            "misshapen",
            [
                f"{name} {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
                for name, tensor in expected.items()
                if name in state and state[name].shape != tensor.shape
            ],
        ),
        *_listed("not floating", [f"{n} {t.dtype}" for n, t in state.items() if t.dtype not in FLOATS]),
    ]
    if problems:
        raise WeightsError(
            f"{origin} does not fit {type(module).__name__} as its config describes it: {'; '.join(problems)}. "
            "Take config and weights from the same release"
        )


def _listed(kind: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return [f"{len(names)} tensors {kind}: {', '.join(names[:4])}{more}"]


def _clip_state(files: Files, name: str) -> tuple[dict[str, Tensor], str]:
    path = files.get(f"{name}.safetensors")
    if path is not None:
        return read_safetensors(path), str(path)
    path = files.get(f"{name}.pt")
    if path is None:
        raise SourceError(f"{files} has neither {name}.safetensors nor {name}.pt: {files.listing()}")
    return read_pickle(path), str(path)
