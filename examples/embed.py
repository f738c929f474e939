"""For an engineer: anagrams inside a program of your own. Nothing is printed, errors are typed.

python examples/embed.py
"""

from mtl_anagram import AnagramError, Cascade, generate_anagram

cascade = Cascade.from_pretrained(device="cpu")  # loads when first used, once for all requests


def anagram_of(first: str, second: str, folder: str) -> str | None:
    """A picture's path, or None where the request cannot be served."""

    def watch(seeds, stage, state):
        """Called at every step: a progress bar, a preview of state.x0, or an exception that ends the run."""

    prompts, views = [first, second], ["identity", "rotate_180"]
    try:
        made = generate_anagram("a poster of", prompts, views, folder, seed=12, model=cascade, on_step=watch)
    except AnagramError as error:  # a ValueError or an OSError, with value, limit and remedy
        print(f"refused: {error}")
        return None
    return str(made[0].pictures[64])


if __name__ == "__main__":
    print(anagram_of("a hat", "a house", "output/embedded"))
    print(anagram_of("a hat", "a [house", "output/embedded"))
