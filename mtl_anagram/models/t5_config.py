"""The config of a T5 v1.1 encoder: the fields of the published config.json that its arithmetic needs."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import ConfigError

# Fields of which one value is implemented: T5 v1.1's.
FIXED: dict[str, Any] = {
    "model_type": "t5",
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu_new",
    "is_gated_act": True,
}
# Fields that never reach the encoder's arithmetic: training, the decoder, generation, and what the libraries
# that write config.json note about themselves. (n_positions bounds nothing: positions are relative.)
IGNORED = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path",
    "add_cross_attention", "architectures", "attn_implementation", "bad_words_ids", "begin_suppress_tokens",
    "bos_token_id",
    "chunk_size_feed_forward", "classifier_dropout", "cross_attention_hidden_size", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "dropout_rate", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size",
    "eos_token_id", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "gradient_checkpointing", "id2label", "initializer_factor", "is_decoder",
    "is_encoder_decoder", "label2id", "length_penalty", "max_length", "min_length", "n_positions",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_decoder_layers", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_past", "output_scores", "pad_token_id", "prefix",
    "problem_type", "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "scale_decoder_outputs", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings",
    "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version", "typical_p",
    "use_bfloat16", "use_cache",
})  # fmt: skip
_MAX_SIZE = 1 << 20  # no width or count comes near; a larger number is a damaged file
_MAX_LAYERS = 1024  # likewise; a million would take minutes before the file's tensors are looked at


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 v1.1 encoder, by the names of the published config.json.

    d_kv is the size of one head; heads times d_kv need not be d_model. Distances between tokens fall into
    relative_attention_num_buckets buckets (an even number), half of them for each direction, up to
    relative_attention_max_distance tokens.
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "layer_norm_epsilon":
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise ConfigError(f"layer_norm_epsilon={value!r} must be a number above 0, such as 1e-6")
                if not 0 < value <= sys.float_info.max:  # JSON's whole numbers have no end
                    raise ConfigError(f"layer_norm_epsilon={value!r} must be finite and above 0")
                continue
            limit = _MAX_LAYERS if field.name == "num_layers" else _MAX_SIZE
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
                raise ConfigError(f"{field.name}={value!r} must be a whole number from 1 to {limit}")
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets % 2 or buckets < 4:
            raise ConfigError(
                f"relative_attention_num_buckets={buckets} must be even and at least 4: half of the buckets "
                "serve each direction"
            )
        if distance <= buckets // 4:
            raise ConfigError(
                f"relative_attention_max_distance={distance} must be above {buckets // 4}, the distances "
                f"that have a bucket of their own with relative_attention_num_buckets={buckets}"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> T5Config:
        """Read a config.json's content. Raises ConfigError for a field or a value that is not implemented."""
        if not isinstance(config, Mapping):
            raise ConfigError(f"a T5 encoder's config is a JSON object, not {type(config).__name__}")
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {}
        for name, value in config.items():
            if name in FIXED:
                if value != FIXED[name] or isinstance(value, bool) != isinstance(FIXED[name], bool):
                    raise ConfigError(f"{name}={value!r} is not implemented; T5 v1.1 has {FIXED[name]!r}")
            elif name in known:
                values[name] = value
            elif name not in IGNORED:
                close = difflib.get_close_matches(str(name), [*known, *FIXED], n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise ConfigError(
                    f"unknown config field {name!r} = {value!r}{hint}: nothing here implements it, so it is "
                    "refused rather than ignored"
                )
        if "feed_forward_proj" not in config:
            raise ConfigError(
                "the config lacks feed_forward_proj, which means the ReLU of T5 v1.0; only T5 v1.1's "
                "'gated-gelu' is implemented"
            )
        missing = [name for name in _REQUIRED if name not in values]
        if missing:
            raise ConfigError(f"the config lacks {', '.join(missing)}: T5 cannot be built without")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json in the published layout, readable by transformers' T5EncoderModel."""
        notes = {
            "architectures": ["T5EncoderModel"],
            "dropout_rate": 0.0,
            "eos_token_id": 1,
            "is_encoder_decoder": False,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
            "use_cache": False,
        }
        return dict(sorted({**FIXED, **notes, **asdict(self)}.items()))


_REQUIRED = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
