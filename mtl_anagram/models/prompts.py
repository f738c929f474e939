"""Prompts as the sampler needs them: style in front, which tokens name the concept, and what to warn of."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import InputError
from .tokenizers import UNK, T5Tokenizer

KEPT = 76  # tokens of a prompt; the 77th is the end token


class ParsedPrompt(NamedTuple):
    """A prompt without brackets, the concept that they held, and where in it that begins (both or None)."""

    prompt: str
    concept: str | None
    position: int | None


def styled(style: str, prompt: str) -> str:
    """The prompt with the style in front, as in the released code; an empty style leaves it as it is."""
    return f"{style} {prompt}".strip()


def with_article(name: str) -> str:
    """'duck' -> 'a duck', 'apple' -> 'an apple'; a name that begins with an article stays."""
    article = "" if re.match(r"(a|an|the) ", name) else "an " if name[:1].lower() in "aeiou" else "a "
    return f"{article}{name}"


def without_article(name: str) -> str:
    """'a duck' and ' Duck' -> 'duck'."""
    return name.lower().strip().removeprefix("a ").removeprefix("an ").strip()


def other_prompts(style: str, prompts: Sequence[str], concepts: Sequence[str]) -> list[str]:
    """What else a picture might show: the style with every concept whose name is in none of the prompts."""
    return [styled(style, with_article(c)) for c in concepts if not any(c in prompt for prompt in prompts)]


def parse_concept(prompt: str) -> ParsedPrompt:
    """Take the brackets off: "a sketch of a [sea turtle]" names the concept "sea turtle"; without them, none."""
    if "[" not in prompt and "]" not in prompt:
        return ParsedPrompt(prompt, None, None)
    marked = re.fullmatch(r"([^][]*)\[(\s*)([^][]+?)\s*\]([^][]*)", prompt)
    if marked is None or not marked[3].strip():
        raise InputError(f"{prompt!r} must have one pair of brackets with words in it, as 'a [sea turtle]'")
    return ParsedPrompt(re.sub(r"[][]", "", prompt), marked[3], len(marked[1] + marked[2]))


def concept_span(
    tokenizer: T5Tokenizer, prompt: str, concept: str | None = None, *, position: int | None = None
) -> tuple[int, int]:
    """The range of tokens [start, stop) of the encoded prompt that name its concept.

    The concept is `concept`, at the character `position` as parse_concept gives it, or the first that stands there as
    whole words; else the one in brackets; else the prompt's last word, as in the released code (which does not
    lower-case it, so that capitals can shift its range). InputError where it is not among the tokens that are kept.
    """
    prompt, marked, place = parse_concept(prompt)
    if concept is None:
        concept, position = marked, place
    if concept is None:
        concept = (prompt.split() or [""])[-1]
        position = prompt.rindex(concept)
    text = prompt.lower().strip()
    pieces = tokenizer.split(text)
    if position is None:
        words = "".join(tokenizer.split(concept.lower().strip())).lstrip("▁")
        found = re.search(rf"▁?(?<!\w){re.escape(words)}(?!\w)", "".join(pieces))
        begin, end = found.span() if found else (0, 0)
    else:  # lower case can change a text's length, so each part by itself
        start = len(prompt[:position].lower().lstrip())
        stops = (start, start + len(concept.lower()))
        begin, end = (len("".join(tokenizer.split(text[:stop]))) for stop in stops)
    of = [i for i, piece in enumerate(pieces) for _ in piece][begin:end]  # each character's token
    if not of or not concept.strip() or of[-1] >= KEPT:
        listed = " ".join(f"{i}:{piece}" for i, piece in enumerate(pieces))
        said = f"is no whole word among the first {KEPT} tokens of {prompt!r} ({listed}), which are kept"
        raise InputError(f"the concept {concept!r} {said}: mark it with [brackets], or shorten the prompt")
    return of[0], of[-1] + 1


def request_warnings(
    tokenizer: T5Tokenizer,
    prompts: Sequence[str],
    concepts: Sequence[str | None] | None = None,
    *,
    style: str = "",
    learnt: Sequence[str] = (),
    styles: Sequence[str] = (),
    name: str = "",
    size: int | None = None,
    trained_size: int | None = None,
) -> list[str]:
    """What should be known of a request before it is sampled: texts for a user, one for each trouble.

    prompts: with the style, without brackets. concepts: what each names, None = its last word; None for all = no
    attention is kept apart. learnt, styles, trained_size (px): of the cascade `name`, as its makers say, or unknown.
    """
    unique, found, unknown = list(dict.fromkeys(prompts)), list[str](), list[str]()
    for prompt in unique:
        pieces, ids = tokenizer.split(prompt.lower().strip()), tokenizer.encode(prompt)
        unknown += [repr(p) for p, i in zip(pieces, ids, strict=False) if i == UNK and p != "<unk>"]
        if len(pieces) > KEPT:
            cut = "".join(pieces[KEPT:]).replace("▁", " ").strip()
            said = f"has {len(pieces)} tokens and {KEPT} are read: {cut!r} is cut; shorten it"
            found.append(f"the prompt {prompt!r} {said}")
    if unknown:
        said = "and reads all such words alike, which then give the same picture: use words that it knows"
        found.append(f"the tokenizer does not know {', '.join(dict.fromkeys(unknown))} {said}")
    named = dict.fromkeys(zip(prompts, concepts or (), strict=False))
    words = [(concept or prompt.split()[-1]).lower() for prompt, concept in named]
    for word in dict.fromkeys(word for word in words if words.count(word) > 1):
        remedy = "mark what each should show with brackets, such as 'a [sea turtle] in oil'"
        found.append(f"several views' concept is {word!r}, whose attention cannot be kept apart: {remedy}")
    known = re.compile(rf"\b({'|'.join(map(re.escape, learnt))})\b", re.IGNORECASE)
    strange = ", ".join(repr(prompt) for prompt in unique if learnt and not known.search(prompt))
    if strange:
        remedy = f"It draws: {', '.join(learnt)}; for others name the released weights with model="
        found.append(f"{strange}: {name} has not learnt to draw that and will draw something else. {remedy}")
    spoken = [style] if style.strip() else [of[0] for p in unique if (of := re.match(r".+\bof\b", p))]
    strange = ", ".join(repr(s) for s in dict.fromkeys(spoken) if " ".join(s.lower().split()) not in styles)
    if styles and strange:
        remedy = f"Its styles: {', '.join(styles)}"
        found.append(f"{strange}: {name} has not learnt that style and may draw nothing that reads. {remedy}")
    if trained_size is not None and size not in (None, trained_size):
        said = "and may draw nothing that reads at another; leave size out"
        found.append(f"size={size}: {name} was trained at {trained_size} px {said}")
    return found
