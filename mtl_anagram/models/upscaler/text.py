"""Stage III's tokenizer and text tower: OpenCLIP's ViT-H text transformer, cut before its last layer."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InputError, SourceError
from ...files.hub import Source, open_source, read_json, require
from ..attention import multi_head
from ..configs import CLIPTextConfig
from ..tokenizers import END, START, CLIPTokenizer, check_texts, checked_text, words

PAD = "!"  # the released special_tokens_map.json's, over tokenizer_config.json's end token


class UpscalerTokenizer:
    """Prompts to token ids, from a tokenizer/ on disk or the hub: vocab.json and merges.txt, or a tokenizer.json.

    Other than GLIDE's CLIP tokenizer, which has the same merges: no HTML escapes are resolved and no quotes
    straightened; texts are padded with the token "!", id 0; and since that is a special token, every "!" in a
    prompt is cut out and read as id 0, too. SourceError where the files do not belong together.
    """

    def __init__(self, source: Source) -> None:
        files = open_source(source, "tokenizer", "vocab.json", "tokenizer.json")
        table, merges, path = map(files.get, ("vocab.json", "merges.txt", "special_tokens_map.json"))
        if table is None or merges is None:  # newer libraries save one file; their padding is not read
            table = merges = require(files, "tokenizer.json", remedy="; or give vocab.json and merges.txt")
        pad = PAD if path is None else read_json(path).get("pad_token", PAD)
        pad = pad.get("content") if isinstance(pad, Mapping) else pad
        self.pairs, vocab = CLIPTokenizer(merges), read_json(table)
        vocab = vocab["model"].get("vocab") if table is merges else vocab
        names = self.pairs.ids
        if vocab != names or not isinstance(pad, str) or pad not in names:
            said = "do not belong together; download them again"
            raise SourceError(f"{merges}, its vocabulary and the padding token {pad!r} {said}")
        self.vocab_size, self.pad = len(names), names[pad]
        self.special = {START: names[START], END: names[END], pad: self.pad}

    def __call__(self, texts: Sequence[str], max_length: int = 77) -> Tensor:
        """B texts -> ids (B, max_length) long: the start, at most max_length - 2 tokens, the end, padding."""
        check_texts(texts)
        start, end = self.special[START], self.special[END]
        rows = [[start, *self.encode(text)[: max_length - 2], end] for text in texts]
        return torch.tensor([row + [self.pad] * (max_length - len(row)) for row in rows], device="cpu")

    def encode(self, text: str) -> list[int]:
        """The text's ids, without start and end, neither cut nor padded."""
        ids: list[int] = []
        by_length = sorted(self.special, key=len, reverse=True)
        for part in re.split(f"({'|'.join(map(re.escape, by_length))})", checked_text(text)):
            if part in self.special:
                ids.append(self.special[part])
            else:  # composed characters, single spaces, lower case
                part = re.sub(r"\s+", " ", unicodedata.normalize("NFC", part)).lower()
                ids += [i for word in words(part) for i in self.pairs.word(word)]
        return ids


class Block(nn.Module):
    """Attention of tokens (B, L, D) to those before, then a feed-forward, each added to the stream."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        width, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(width, eps=eps) for _ in range(2))
        projections = ("q_proj", "k_proj", "v_proj", "out_proj")  # all with bias
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in projections})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})
        self.heads = config.num_attention_heads

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer_norm1(x)
        q, k, v = (self.self_attn[name](h) for name in ("q_proj", "k_proj", "v_proj"))
        x = x + self.self_attn["out_proj"](multi_head(q, k, v, self.heads, causal=True))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layer_norm2(x))))


class CLIPTextTower(nn.Module):
    """Token ids to text states: causal pre-norm blocks with exact GELU, a norm after the last.

    The released checkpoint has 23 of ViT-H's 24 layers, so that its last states are the penultimate ones that
    the upscaler was trained on. Padding is attended to like any token (causally, so only by padding): no mask.
    """

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config, width = config, config.hidden_size
        places = nn.Embedding(config.max_position_embeddings, width)
        tokens = nn.Embedding(config.vocab_size, width)
        blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.text_model = nn.ModuleDict(
            {
                "embeddings": nn.ModuleDict({"token_embedding": tokens, "position_embedding": places}),
                "encoder": nn.ModuleDict({"layers": blocks}),
                "final_layer_norm": nn.LayerNorm(width, eps=config.layer_norm_eps),
            }
        )

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, L) token numbers, L at most 77 -> (B, L, D)."""
        limit = self.config.max_position_embeddings
        if ids.ndim != 2 or ids.shape[1] > limit:
            raise InputError(f"ids of shape {tuple(ids.shape)}: give (B, L), L at most {limit}")
        embeddings, encoder, norm = self.text_model.values()
        tokens, places = cast("nn.ModuleDict", embeddings).values()
        x = tokens(ids) + cast("nn.Embedding", places).weight[: ids.shape[1]]
        for block in cast("nn.ModuleList", cast("nn.ModuleDict", encoder)["layers"]):
            x = block(x)
        return norm(x)
