from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies

from models.language.stop_strings import StopStrings


def cut_at_stop(text: str, strings: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the stop string that ends first (the longest of those that end together), and whether one is."""
    for end in range(1, len(text) + 1):
        complete = [string for string in strings if text[:end].endswith(string)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@settings(max_examples=400, deadline=None)
@given(
    strategies.lists(strategies.text("ab州", max_size=4), max_size=8),
    strategies.lists(strategies.text("ab州", min_size=1, max_size=4), max_size=4).map(tuple),
)
def test_the_text_ends_before_the_first_stop_string(pieces: list[str], strings: tuple[str, ...]) -> None:
    stop_strings = StopStrings(strings)
    text = "".join([*map(stop_strings.push, pieces), stop_strings.flush()])
    assert (text, stop_strings.found) == cut_at_stop("".join(pieces), strings)


def test_only_the_beginning_of_a_stop_string_is_held_back() -> None:
    stop_strings = StopStrings(("END", "<|im_end|>"))
    pieces = [
        ("Hello E", "Hello "),
        ("N", ""),
        ("!", "EN!"),
        (" 1 < 2", " 1 < 2"),
        (" <", " "),
        ("|im_", ""),
    ]
    for piece, certain in pieces:
        assert stop_strings.push(piece) == certain
    assert not stop_strings.found
    assert stop_strings.flush() == "<|im_"


def test_no_text_comes_after_a_stop_string() -> None:
    stop_strings = StopStrings(("END",))
    assert [stop_strings.push(piece) for piece in ("The E", "ND and", " more")] == ["The ", "", ""]
    assert (stop_strings.found, stop_strings.flush()) == (True, "")


@pytest.mark.parametrize("pieces", [["a", "b", ""], ["ab"]], ids=["pieces", "whole"])
def test_without_stop_strings_the_text_is_unchanged(pieces: list[str]) -> None:
    stop_strings = StopStrings(())
    assert [stop_strings.push(piece) for piece in pieces] == pieces
    assert (stop_strings.found, stop_strings.flush()) == (False, "")
