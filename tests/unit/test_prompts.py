"""Prompts: style, checks, brackets, and the tokens of the concept."""

import warnings

import pytest

from mtl_anagram.errors import InputError, PromptWarning
from mtl_anagram.models.tokenizers import T5Tokenizer
from mtl_anagram.prompts import (
    check_learnt,
    check_prompts,
    concept_span,
    other_prompts,
    parse_concept,
    styled,
    with_article,
)
from tests.unit.tiny import sentencepiece_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("t5") / "spiece.model"
    path.write_bytes(sentencepiece_model())
    return T5Tokenizer(path)


def named(tokenizer, prompt, *args, **options):
    """The text of the tokens that concept_span gives."""
    start, stop = concept_span(tokenizer, prompt, *args, **options)
    ids = tokenizer.encode(prompt if args else parse_concept(prompt).prompt)
    return "".join(tokenizer.pieces(ids[start:stop])).replace("▁", " ").strip()


def test_styled():
    assert styled("a sketch of", "a duck") == "a sketch of a duck"
    assert styled("", "a duck") == "a duck"
    assert styled("a photo of", "") == "a photo of"
    for wrong in ((None, "a duck"), ("a", 3)):
        with pytest.raises(InputError, match="must be a str"):
            styled(*wrong)


def test_articles():
    assert [with_article(n) for n in ("duck", "eye", "the moon")] == ["a duck", "an eye", "the moon"]


def test_other_prompts_leave_out_what_is_asked_for():
    concepts = ("duck", "house", "house plant", "apple")
    assert other_prompts("a sketch of", ["a duck", "a house plant"], concepts) == ["a sketch of an apple"]
    assert other_prompts("", ["a house"], concepts) == ["a duck", "a house plant", "an apple"]
    assert other_prompts("a sketch of", ["a duck"], ()) == []


def test_what_a_cascade_has_not_learnt_is_said():
    concepts = ("cat", "wine glass")
    with pytest.warns(
        PromptWarning, match="'a sketch of a caterpillar', 'a wine': small .* cat, wine glass"
    ) as seen:
        check_learnt(["a sketch of a caterpillar", "a CAT's head", "a wine"], concepts, "small")
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_learnt(["a Cat", "two cats, one cat", "a wine glass"], concepts, "small")
        check_learnt(["a dragon"], (), "large")


def test_check_prompts():
    assert check_prompts(("a duck", "a cat"), 2) == ["a duck", "a cat"]
    for prompts, views, match in (
        ("a duck", 1, "list of str"),
        (None, 1, "list of str"),
        ([], 0, "empty"),
        (["a duck"], 2, "1 prompts for 2 views"),
        (["a duck", 3], 2, r"prompts\[1\] must be a str"),
        (["a duck", " \n"], 2, r"prompts\[1\].* no text"),
    ):
        with pytest.raises(InputError, match=match):
            check_prompts(prompts, views)


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("a sketch of a [sea turtle]", ("a sketch of a sea turtle", "sea turtle", 14)),
        ("[Duck] in water", ("Duck in water", "Duck", 0)),
        ("a [ duck ]!", ("a  duck !", "duck", 3)),
        ("a duck", ("a duck", None, None)),
    ],
)
def test_parse_concept(prompt, expected):
    assert tuple(parse_concept(prompt)) == expected


@pytest.mark.parametrize(
    "prompt, match",
    [
        ("a [duck", "unbalanced"),
        ("a duck]", "unbalanced"),
        ("a ]duck[", "unbalanced"),
        ("a [sea [turtle]]", "2 pairs"),
        ("a [duck] and a [cat]", "2 pairs"),
        ("a []", "empty"),
        ("a [ ] duck", "empty"),
        (3, "must be a str"),
    ],
)
def test_parse_concept_refuses(prompt, match):
    with pytest.raises(InputError, match=match):
        parse_concept(prompt)


def test_concept_is_the_last_word_by_default(tokenizer):
    assert named(tokenizer, "a sketch of a sea turtle") == "turtle"
    assert named(tokenizer, "A Sketch of the DUCK ") == "duck"
    assert named(tokenizer, "a sketch of a turtle.") == "turtle."
    assert concept_span(tokenizer, "duck")[0] == 0


def test_concept_in_brackets_or_given(tokenizer):
    assert named(tokenizer, "a sketch of a [sea turtle] in the house") == "sea turtle"
    assert named(tokenizer, "a sketch of a sea turtle in the house", "Sea Turtle") == "sea turtle"
    assert named(tokenizer, "  The [Big Cat]") == "big cat"
    assert named(tokenizer, "the house ([cat]).") == "cat"


def test_of_two_occurrences_brackets_mean_the_marked_one(tokenizer):
    prompt = "the duck near the duck"
    first = concept_span(tokenizer, prompt)
    assert first == concept_span(tokenizer, "the [duck] near the duck") == (1, 2)
    last = len(tokenizer.encode(prompt)) - 1
    assert concept_span(tokenizer, "the duck near the [duck]") == (last - 1, last)
    assert concept_span(tokenizer, prompt, "duck", position=18) == (last - 1, last)
    parsed = parse_concept("the duck near the [duck]")
    assert concept_span(tokenizer, parsed.prompt, parsed.concept, position=parsed.position) == (
        last - 1,
        last,
    )


def test_brackets_find_their_place_behind_text_whose_length_changes(tokenizer):
    # Lower case makes two characters of the capital I with a dot; the normaliser takes ligatures apart.
    assert named(tokenizer, "  İİ ﬁﬁ ½ ☃ the [duck] duck") == "duck"
    assert named(tokenizer, "the <extra_id_0>  duck   [cat] cat") == "cat"


def test_position_is_the_one_that_counts(tokenizer):
    for position in (1, -1, 400, True, "4"):
        with pytest.raises(InputError, match="character|position="):
            concept_span(tokenizer, "the duck", "duck", position=position)


def test_a_concept_that_is_not_there_shows_the_tokens(tokenizer):
    with pytest.raises(InputError, match="'rabbit' is not among .*0:▁the 1:▁duck.*brackets"):
        concept_span(tokenizer, "the duck", "rabbit")


def test_a_concept_beyond_the_cut_is_an_error(tokenizer):
    prompt = "the " * 75 + "duck"
    assert concept_span(tokenizer, prompt) == (75, 76)
    with pytest.raises(InputError, match="only the first 76 are kept .*76:▁duck"):
        concept_span(tokenizer, "the " + prompt)
    assert concept_span(tokenizer, "the " + prompt, max_length=78) == (76, 77)
    with pytest.raises(InputError, match="only the first 2"):
        concept_span(tokenizer, "the the the [duck]", max_length=3)


@pytest.mark.parametrize(
    "prompt, concept, match",
    [
        ("", None, "no text"),
        ("  ", None, "no text"),
        ("the duck", " ", "no text"),
        ("the [duck]", "duck", "name the concept once"),
        (None, "duck", "must be str"),
        ("the duck", 3, "must be str"),
        (7, None, "must be a str"),
    ],
)
def test_concept_span_refuses(tokenizer, prompt, concept, match):
    with pytest.raises(InputError, match=match):
        concept_span(tokenizer, prompt, concept)
