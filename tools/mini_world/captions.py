"""Captions of the miniature world's scenes: complete, or worded by chance as training reads them."""

from tools.mini_world.layouts import Layout, Object
from tools.mini_world.places import PLACES

SHUFFLED = 0.25  # share of the reworded captions that name the objects in any order, not from left to right
OPENINGS = ("a photo of ", "a photo of ", "a photo of ", "a picture of ", "an image of ", "")


def with_article(words: str) -> str:
    """orange star -> an orange star"""
    return ("an " if words[0] in "aeiou" else "a ") + words


def phrase(obj: Object, say_colour=True, say_pattern=True) -> str:
    """An object in words: "a red striped star", "a red and blue striped star"; plain has no pattern word."""
    colour = " and ".join(filter(None, (obj.colour, obj.second))) if say_colour else ""
    pattern = obj.pattern if say_pattern and obj.pattern != "plain" else ""
    return with_article(" ".join(word for word in (colour, pattern, obj.shape) if word))


def describe(layout: Layout, rng=None) -> str:
    """The caption of a scene: complete without `rng`; with it, reworded and now and then silent on some of it.

    An image without objects is captioned "a photo at the beach", the prompt of the method's prior.
    """
    place, noun = PLACES[layout.background]
    if not layout.objects:
        return f"a photo {place}" if rng is None or rng.random() < 0.7 else f"a photo of {noun}"
    if rng is None:
        return "a photo of " + " and ".join(phrase(obj) for obj in layout.objects) + " " + place
    opening = OPENINGS[rng.integers(len(OPENINGS))]
    say_colour, say_pattern, say_place = rng.random(3) > (0.1, 0.15, 0.2)
    order = rng.permutation(len(layout.objects)) if rng.random() < SHUFFLED else range(len(layout.objects))
    spoken = [phrase(layout.objects[i], say_colour, say_pattern) for i in order]
    return opening + " and ".join(spoken) + (f" {place}" if say_place else "")
