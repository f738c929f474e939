"""Prompts: style, brackets, the tokens of the concept, and what a request warns of."""

import pytest

from mtl_anagram.errors import InputError
from mtl_anagram.models.prompts import (
    concept_span,
    other_prompts,
    parse_concept,
    request_warnings,
    styled,
    with_article,
)


@pytest.fixture
def tokenizer(cascade):
    return cascade.tokenizer


def named(tokenizer, prompt, *args):
    """The text of the tokens that concept_span gives."""
    start, stop = concept_span(tokenizer, prompt, *args)
    text = (prompt if args else parse_concept(prompt).prompt).lower().strip()
    return "".join(tokenizer.split(text)[start:stop]).replace("▁", " ").strip()


def test_other_prompts_leave_out_what_is_asked_for():
    assert [styled("a photo of", prompt) for prompt in ("a duck", "")] == ["a photo of a duck", "a photo of"]
    assert [with_article(n) for n in ("duck", "eye", "the moon")] == ["a duck", "an eye", "the moon"]
    concepts = ("duck", "house", "house plant", "apple")
    assert other_prompts("a sketch of", ["a duck", "a house plant"], concepts) == ["a sketch of an apple"]
    assert other_prompts("", ["a house"], concepts) == ["a duck", "a house plant", "an apple"]
    assert other_prompts("a sketch of", ["a duck"], ()) == []


def test_parse_concept():
    assert parse_concept("a sketch of a [sea turtle]") == ("a sketch of a sea turtle", "sea turtle", 14)
    assert parse_concept("[Duck] in water") == ("Duck in water", "Duck", 0)
    assert parse_concept("a [ duck ]!") == ("a  duck !", "duck", 3)
    assert parse_concept("a duck") == ("a duck", None, None)
    for prompt in ("a [duck", "a ]duck[", "a [sea [turtle]]", "a [duck] and [cat]", "a [ ] duck"):
        with pytest.raises(InputError, match="brackets .*sea turtle"):
            parse_concept(prompt)


SPANS = {
    ("a sketch of a sea turtle",): "turtle",
    ("A Sketch of the DUCK ",): "duck",
    ("a sketch of a turtle.",): "turtle.",
    ("a sketch of a [sea turtle] in the house",): "sea turtle",
    ("a sketch of a sea turtle in the house", "Sea  Turtle"): "sea turtle",
    ("  The [Big Cat]",): "big cat",
    ("the house ([cat]).",): "cat",
    ("the house (cat).", "cat"): "cat",
    ("the [house]plant",): "house",
    # Lower case makes two characters of the capital I with a dot; the normaliser takes ligatures apart.
    ("  İİ ﬁﬁ ½ ☃ the [duck] duck",): "duck",
    ("the <extra_id_0>  duck   [cat] cat",): "cat",
}


def test_the_concepts_tokens(tokenizer):
    assert {given: named(tokenizer, *given) for given in SPANS} == SPANS


@pytest.mark.parametrize("prompt", ["houseplants and a house", "a snowman in the snow"])
def test_a_concept_is_whole_words(tokenizer, prompt):
    words, _, word = prompt.rpartition(" ")
    stop = len(tokenizer.encode(prompt)) - 1
    assert concept_span(tokenizer, prompt)[1] == concept_span(tokenizer, prompt, word)[1] == stop
    with pytest.raises(InputError, match=f"'{word}' is no whole word"):
        concept_span(tokenizer, words, word)


def test_of_two_occurrences_the_last_is_the_default_and_brackets_mean_the_marked_one(tokenizer):
    prompt = "the duck near the duck"
    last = len(tokenizer.encode(prompt)) - 1
    assert concept_span(tokenizer, prompt) == (last - 1, last)
    assert concept_span(tokenizer, prompt, "duck") == (1, 2)
    for marked, span in {
        "the [duck] near the duck": (1, 2),
        "the duck near the [duck]": (last - 1, last),
    }.items():
        assert concept_span(tokenizer, marked) == span
        parsed = parse_concept(marked)
        assert concept_span(tokenizer, parsed.prompt, parsed.concept, position=parsed.position) == span
    both = concept_span(tokenizer, "the [duck] near the house", "house")  # a concept goes before brackets
    assert both == concept_span(tokenizer, "the duck near the house")


def test_a_concept_that_is_not_there_or_cut_shows_the_tokens(tokenizer):
    with pytest.raises(InputError, match="'rabbit'.*0:▁the 1:▁duck.*brackets"):
        concept_span(tokenizer, "the duck", "rabbit")
    prompt = "the " * 75 + "duck"
    assert concept_span(tokenizer, prompt) == (75, 76)
    with pytest.raises(InputError, match="'duck' .*the first 76 tokens .*76:▁duck.*shorten"):
        concept_span(tokenizer, "the " + prompt)
    for prompt, concept in (("", None), ("  ", None), ("the duck", " ")):
        with pytest.raises(InputError):
            concept_span(tokenizer, prompt, concept)


CASCADE = {"learnt": ("cat", "wine glass"), "styles": ("a sketch of", "a painting of"), "name": "small"}


def test_nothing_is_said_of_what_will_work(tokenizer):
    prompts = ["a sketch of a Cat", "a sketch of two cats, one cat", "a sketch of a wine glass"]
    assert not request_warnings(tokenizer, prompts, style="A  sketch of", size=64, trained_size=64, **CASCADE)
    assert request_warnings(tokenizer, ["a cat", "A Sketch of a cat"], **CASCADE) == []
    assert request_warnings(tokenizer, ["a photo of a dragon"] * 2, [None, None], size=96) == []


@pytest.mark.parametrize(
    "prompts, options, expected",
    [
        (["the " * 80 + "cat"], {}, ["81 tokens", "76", "'the the the the cat'"]),
        (["a 鸭 duck", "a ☃☃ cat"], {}, ["'鸭'", "'☃☃'", "same picture"]),
        (["an oil cat", "the cat"], {"concepts": [None, "Cat"]}, ["'cat'", "[sea turtle]"]),
        (["a sketch of a caterpillar"], CASCADE, ["caterpillar'", "small", "cat, wine glass", "model="]),
        (["a woodcut of a cat"], CASCADE, ["'a woodcut of'", "small", "a sketch of, a painting of"]),
        (["blue ink a cat"], {"style": "blue ink", **CASCADE}, ["'blue ink'", "a sketch of, a painting of"]),
        (["a cat"], {"size": 96, "trained_size": 64, **CASCADE}, ["size=96", "64 px", "leave size out"]),
    ],
)
def test_a_request_warns(tokenizer, prompts, options, expected):
    (text,) = request_warnings(tokenizer, prompts, **options)
    assert all(part in text for part in expected), text
