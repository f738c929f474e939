"""Prompts as the sampler needs them: style in front, checked, and which tokens name the concept."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from .errors import InputError, PromptWarning
from .models.tokenizers import T5Tokenizer


class ParsedPrompt(NamedTuple):
    """A prompt without brackets, the concept that they held, and where in it that begins (both or None)."""

    prompt: str
    concept: str | None
    position: int | None


def styled(style: str, prompt: str) -> str:
    """The prompt with the style in front, as in the released code; an empty style leaves it as it is."""
    for name, value in (("style", style), ("prompt", prompt)):
        if not isinstance(value, str):
            raise InputError(f"{name} must be a str, not {type(value).__name__} ({value!r})")
    return f"{style} {prompt}".strip()


def with_article(name: str) -> str:
    """'duck' -> 'a duck', 'apple' -> 'an apple'; a name that begins with an article stays."""
    if name.split(" ")[0] in ("a", "an", "the"):
        return name
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def other_prompts(style: str, prompts: Sequence[str], concepts: Sequence[str]) -> list[str]:
    """What else a picture might show: the style with every concept whose name is in none of the prompts."""
    return [styled(style, with_article(c)) for c in concepts if not any(c in prompt for prompt in prompts)]


def check_learnt(prompts: Sequence[str], concepts: Sequence[str], name: str) -> None:
    """PromptWarning for prompts that have none of these names in them, as words; none are known = no warning.

    concepts: what the cascade `name` has learnt to draw, as its makers say.
    """
    if not concepts:
        return
    known = re.compile(rf"\b({'|'.join(map(re.escape, concepts))})\b", re.IGNORECASE)
    strange = [prompt for prompt in prompts if not known.search(prompt)]
    if strange:
        warnings.warn(
            f"{', '.join(map(repr, strange))}: {name} has not learnt to draw that and will draw something else. It "
            f"draws: {', '.join(concepts)}; for other things name the released weights (model=)",
            PromptWarning,
            stacklevel=3,
        )


def check_prompts(prompts: Sequence[str], views: int) -> list[str]:
    """The prompts as a list, checked: one or more, as many as there are views, each a str with text in it."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise InputError(f"prompts={prompts!r} must be a list of str, one for each view")
    if not prompts:
        raise InputError("prompts is empty: give one prompt for each view, at least one")
    if len(prompts) != views:
        raise InputError(f"there are {len(prompts)} prompts for {views} views: give one prompt for each view")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise InputError(f"prompts[{i}] must be a str, not {type(prompt).__name__} ({prompt!r})")
        if not prompt.strip():
            raise InputError(f"prompts[{i}]={prompt!r} has no text: say what this view should show")
    return list(prompts)


def parse_concept(prompt: str) -> ParsedPrompt:
    """Take the brackets off: "a sketch of a [sea turtle]" names the concept "sea turtle".

    A prompt without brackets names none (concept_span then takes its last word). Raises InputError for
    brackets that are unbalanced, nested, empty, or more than one pair.
    """
    if not isinstance(prompt, str):
        raise InputError(f"a prompt must be a str, not {type(prompt).__name__} ({prompt!r})")
    opening, closing = prompt.count("["), prompt.count("]")
    if opening == closing == 0:
        return ParsedPrompt(prompt, None, None)
    first, last = prompt.find("["), prompt.find("]")
    if opening != closing or last < first:
        raise InputError(f"the brackets of {prompt!r} are unbalanced: write 'a [sea turtle]', or no brackets")
    if opening > 1:
        raise InputError(
            f"{prompt!r} has {opening} pairs of brackets: a prompt has one concept, mark only that"
        )
    inside = prompt[first + 1 : last]
    if not inside.strip():
        raise InputError(f"the brackets of {prompt!r} are empty: put the concept between them, or none")
    position = first + len(inside) - len(inside.lstrip())
    return ParsedPrompt(prompt[:first] + inside + prompt[last + 1 :], inside.strip(), position)


def concept_span(
    tokenizer: T5Tokenizer,
    prompt: str,
    concept: str | None = None,
    *,
    position: int | None = None,
    max_length: int = 77,
) -> tuple[int, int]:
    """The range of tokens [start, stop) of the encoded prompt that name its concept.

    The concept is the one in brackets, else `concept`, else the prompt's last word, as in the released
    code. Where brackets mark the place, or `position` does (the character of `prompt` at which the concept
    begins, as parse_concept returns it), the tokens are those at that place; else they are the first
    occurrence of the concept's tokens among the prompt's. The released code searches the text as typed,
    although the states that the sampler uses are those of the lower-cased one, so that capitals can shift
    its range by some tokens; here both are lower-cased and stripped, as for the states.

    Raises InputError, which lists the prompt's tokens, where the concept does not occur or lies beyond the
    max_length - 1 tokens that are kept.
    """
    if concept is None:
        prompt, concept, position = parse_concept(prompt)
    elif not isinstance(prompt, str) or not isinstance(concept, str):
        raise InputError(f"prompt={prompt!r} and concept={concept!r} must be str")
    elif "[" in prompt or "]" in prompt:
        raise InputError(
            f"{prompt!r} has brackets and concept={concept!r} is given too: name the concept once"
        )
    if not prompt.strip():
        raise InputError(f"the prompt {prompt!r} has no text, so no concept: say what the view should show")
    if concept is None:
        concept = prompt.split()[-1]
    if not concept.strip():
        raise InputError(f"concept={concept!r} has no text: give a word of the prompt {prompt!r}")
    ids = tokenizer.encode(prompt)[:-1]
    if position is None:
        span = _first(ids, tokenizer.encode(concept)[:-1])
    else:
        span = _at(tokenizer, prompt, concept, position)
    if span is None:
        raise InputError(
            f"the concept {concept!r} is not among the tokens of {prompt!r} ({_listed(tokenizer, ids)}): "
            "mark it in the prompt with brackets, such as 'a [sea turtle]'"
        )
    if span[1] > max_length - 1:
        raise InputError(
            f"the concept {concept!r} is tokens {span[0]} to {span[1] - 1} of {prompt!r}, but only the first "
            f"{max_length - 1} are kept ({_listed(tokenizer, ids)}): shorten the prompt, or mark an "
            "earlier word with brackets"
        )
    return span


def _first(ids: list[int], wanted: list[int]) -> tuple[int, int] | None:
    for start in range(len(ids) - len(wanted) + 1):
        if wanted and ids[start : start + len(wanted)] == wanted:
            return start, start + len(wanted)
    return None


def _at(tokenizer: T5Tokenizer, prompt: str, concept: str, position: int) -> tuple[int, int] | None:
    """The tokens that hold the concept's characters, found by the lengths of the pieces before it."""
    if isinstance(position, bool) or not isinstance(position, int):
        raise InputError(f"position={position!r} must be a whole number: the concept's first character")
    if position < 0 or not prompt.startswith(concept, position):
        raise InputError(
            f"{prompt!r} has no {concept!r} at character {position}: pass what parse_concept gave"
        )
    # Cleaned like the prompt's own tokens: lower case can change the length, so each part by itself.
    before = prompt[:position].lower().lstrip()
    text = prompt.lower().strip()
    stops = (len(before), len(before) + len(concept.lower()))
    begin, end = (len("".join(tokenizer.split(text[:stop]))) for stop in stops)
    ends = list(accumulate(len(piece) for piece in tokenizer.split(text)))
    starts = [0, *ends[:-1]]
    inside = [
        i for i, (left, right) in enumerate(zip(starts, ends, strict=True)) if left < end and right > begin
    ]
    return (inside[0], inside[-1] + 1) if inside else None


def _listed(tokenizer: T5Tokenizer, ids: list[int]) -> str:
    return " ".join(f"{i}:{piece}" for i, piece in enumerate(tokenizer.pieces(ids)))
