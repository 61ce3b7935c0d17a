from __future__ import annotations

from models.prefix_cache import WORTH_COPYING, PrefixCache


def holding(*tokens: list[int]) -> PrefixCache:
    """A cache whose slots hold these, used in this order."""
    cache = PrefixCache(len(tokens))
    for slot, held in enumerate(tokens):
        cache.hold(slot, held)
    return cache


def words(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


def test_a_new_cache_holds_nothing_of_any_prompt() -> None:
    assert PrefixCache(3).find(words(0, 100))[1] == 0


def test_the_slot_that_shares_the_longest_beginning_is_found() -> None:
    common = words(0, 40)
    cache = holding([*common[:20], 7], [*common[:30], 8, *words(500, 50)], common[:25], [9, *common])
    assert cache.find([*common, 10]) == (1, 30)


def test_a_beginning_counts_up_to_the_first_token_that_differs() -> None:
    prompt = words(0, 60)
    held = [*prompt[:33], 999, *prompt[34:]]
    assert holding(held).find(prompt) == (0, 33)
    assert holding([999, *prompt[1:]]).find(prompt) == (0, 0)


def test_a_slot_that_holds_less_than_the_prompt_gives_all_of_it() -> None:
    assert holding(words(0, 20)).find(words(0, 60)) == (0, 20)


def test_the_last_token_of_a_prompt_is_always_read_since_it_gives_the_first_of_the_reply() -> None:
    prompt = words(0, 30)
    assert holding(prompt).find(prompt) == (0, 29)
    assert holding(words(0, 50)).find(prompt) == (0, 29)


def test_fewer_tokens_than_are_worth_copying_are_read_again() -> None:
    held = words(0, 100)
    assert holding(held).find([*held[:WORTH_COPYING], 999]) == (0, WORTH_COPYING)
    assert holding(held).find([*held[: WORTH_COPYING - 1], 999])[1] == 0
    assert holding(held).find(held[:WORTH_COPYING])[1] == 0  # all but the last would be


def test_of_slots_that_share_as_much_the_one_used_last_is_found() -> None:
    cache = holding(words(0, 40), words(0, 40), words(0, 40))
    assert cache.find(words(0, 60)) == (2, 40)
    cache.hold(0, words(0, 40))
    assert cache.find(words(0, 60)) == (0, 40)


def test_a_prompt_continues_in_the_slot_of_its_beginning_where_little_else_is_lost() -> None:
    cache = holding(words(0, 10), words(0, 60), words(500, 10))
    assert cache.choose([0, 1, 2], source=1, length=60) == 1
    assert cache.choose([0, 1, 2], source=1, length=30) == 1


def test_a_slot_of_which_more_than_half_would_be_lost_is_left_for_its_own_conversation() -> None:
    cache = holding(words(0, 10), words(0, 60), words(500, 10))
    assert cache.choose([0, 1, 2], source=1, length=29) == 0


def test_a_slot_that_is_not_free_is_not_chosen() -> None:
    cache = holding(words(0, 60), words(500, 10), words(600, 10))
    assert cache.choose([1, 2], source=0, length=60) == 1


def test_the_slot_that_was_unused_longest_is_chosen() -> None:
    cache = holding(words(0, 50), words(100, 50), words(200, 50))
    cache.hold(0, words(0, 55))
    assert cache.choose([0, 1, 2], source=0, length=0) == 1
    assert cache.choose([0, 2], source=0, length=0) == 2


def test_a_slot_that_was_never_used_goes_before_one_that_holds_something() -> None:
    cache = PrefixCache(3)
    cache.hold(0, words(0, 50))
    cache.hold(2, words(100, 50))
    assert cache.choose([0, 1, 2], source=2, length=20) == 1


def test_what_a_slot_held_before_is_forgotten_once_it_holds_something_else() -> None:
    cache = holding(words(0, 50))
    cache.hold(0, words(500, 50))
    assert cache.find(words(0, 60))[1] == 0
    assert cache.find(words(500, 60)) == (0, 50)
