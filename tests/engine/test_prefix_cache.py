from __future__ import annotations

import pytest

from models.engine.prefix_cache import MIN_PREFIX, OwnedTokens, PrefixCache


def cache_of(*slots: list[int]) -> PrefixCache:
    """A cache with these tokens in its slots, recorded in this order."""
    cache = PrefixCache(len(slots))
    for slot, tokens in enumerate(slots):
        cache.record(slot, OwnedTokens(tokens))
    return cache


def find(cache: PrefixCache, prompt: list[int]) -> tuple[int, int]:
    """What a prompt of the same owner finds."""
    return cache.find(OwnedTokens(prompt))


def tokens_from(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


def test_a_new_cache_has_no_prefix_of_any_prompt() -> None:
    assert find(PrefixCache(3), tokens_from(0, 100))[1] == 0


def test_find_returns_the_slot_with_the_longest_prefix() -> None:
    common = tokens_from(0, 40)
    cache = cache_of([*common[:20], 7], [*common[:30], 8, *tokens_from(500, 50)], common[:25], [9, *common])
    assert find(cache, [*common, 10]) == (1, 30)


def test_a_prefix_ends_at_the_first_token_that_differs() -> None:
    prompt = tokens_from(0, 60)
    cached = [*prompt[:33], 999, *prompt[34:]]
    assert find(cache_of(cached), prompt) == (0, 33)
    assert find(cache_of([999, *prompt[1:]]), prompt) == (0, 0)


def test_all_tokens_of_a_slot_can_be_the_prefix() -> None:
    assert find(cache_of(tokens_from(0, 20)), tokens_from(0, 60)) == (0, 20)


def test_the_last_token_of_a_prompt_is_never_taken_from_the_cache() -> None:
    prompt = tokens_from(0, 30)
    assert find(cache_of(prompt), prompt) == (0, 29)
    assert find(cache_of(tokens_from(0, 50)), prompt) == (0, 29)


def test_a_prefix_below_the_minimum_is_not_reused() -> None:
    cached = tokens_from(0, 100)
    assert find(cache_of(cached), [*cached[:MIN_PREFIX], 999]) == (0, MIN_PREFIX)
    assert find(cache_of(cached), [*cached[: MIN_PREFIX - 1], 999])[1] == 0
    assert find(cache_of(cached), cached[:MIN_PREFIX])[1] == 0  # the last token does not count


def test_of_equally_long_prefixes_the_last_used_one_is_found() -> None:
    cache = cache_of(tokens_from(0, 40), tokens_from(0, 40), tokens_from(0, 40))
    assert find(cache, tokens_from(0, 60)) == (2, 40)
    cache.record(0, OwnedTokens(tokens_from(0, 40)))
    assert find(cache, tokens_from(0, 60)) == (0, 40)


def test_a_prompt_continues_in_the_slot_of_its_prefix() -> None:
    cache = cache_of(tokens_from(0, 10), tokens_from(0, 60), tokens_from(500, 10))
    assert cache.choose([0, 1, 2], source=1, length=60) == 1
    assert cache.choose([0, 1, 2], source=1, length=30) == 1


def test_a_slot_that_would_lose_more_than_half_is_not_chosen() -> None:
    cache = cache_of(tokens_from(0, 10), tokens_from(0, 60), tokens_from(500, 10))
    assert cache.choose([0, 1, 2], source=1, length=29) == 0


def test_a_slot_of_another_owner_is_not_chosen_before_older_ones() -> None:
    cache = PrefixCache(2)
    cache.record(0, OwnedTokens(tokens_from(500, 10), owner="ann"))
    cache.record(1, OwnedTokens(tokens_from(0, 60), owner="ann", public=60))
    assert cache.choose([0, 1], source=1, length=60, owner="bob") == 0
    assert cache.choose([0, 1], source=1, length=60, owner="ann") == 1


def test_a_slot_in_use_is_not_chosen() -> None:
    cache = cache_of(tokens_from(0, 60), tokens_from(500, 10), tokens_from(600, 10))
    assert cache.choose([1, 2], source=0, length=60) == 1


def test_the_least_recently_used_slot_is_chosen() -> None:
    cache = cache_of(tokens_from(0, 50), tokens_from(100, 50), tokens_from(200, 50))
    cache.record(0, OwnedTokens(tokens_from(0, 55)))
    assert cache.choose([0, 1, 2], source=0, length=0) == 1
    assert cache.choose([0, 2], source=0, length=0) == 2


def test_an_unused_slot_is_chosen_before_a_used_one() -> None:
    cache = PrefixCache(3)
    cache.record(0, OwnedTokens(tokens_from(0, 50)))
    cache.record(2, OwnedTokens(tokens_from(100, 50)))
    assert cache.choose([0, 1, 2], source=2, length=20) == 1


def test_a_record_replaces_the_tokens_of_its_slot() -> None:
    cache = cache_of(tokens_from(0, 50))
    cache.record(0, OwnedTokens(tokens_from(500, 50)))
    assert find(cache, tokens_from(0, 60))[1] == 0
    assert find(cache, tokens_from(500, 60)) == (0, 50)


def test_another_owner_finds_only_what_is_public_for_both() -> None:
    tokens = tokens_from(0, 60)
    cache = PrefixCache(1)
    cache.record(0, OwnedTokens(tokens, owner="ann", public=30))
    assert cache.find(OwnedTokens([*tokens, 1], owner="ann")) == (0, 60)
    assert cache.find(OwnedTokens([*tokens, 1], owner="bob", public=40)) == (0, 30)
    assert cache.find(OwnedTokens([*tokens, 1], owner="bob", public=20)) == (0, 20)
    assert cache.find(OwnedTokens([*tokens, 1], owner="bob"))[1] == 0
    cache.record(0, OwnedTokens(tokens, owner="ann"))
    assert cache.find(OwnedTokens([*tokens, 1], owner="bob", public=40))[1] == 0


def test_tokens_that_are_not_public_are_not_even_compared() -> None:
    class Secret(int):
        def __eq__(self, other: object) -> bool:
            raise AssertionError("compared")

        __hash__ = int.__hash__

    secret = [*tokens_from(0, 20), *map(Secret, range(20, 60))]
    cached = OwnedTokens(secret, owner="ann", public=20)
    assert cached.shared_with(OwnedTokens(tokens_from(0, 60), owner="bob", public=20)) == 20
    with pytest.raises(AssertionError, match="compared"):
        cached.shared_with(OwnedTokens(tokens_from(0, 60), owner="ann", public=20))


def test_with_recurrent_states_a_prompt_reuses_all_tokens_of_a_slot_or_none() -> None:
    tokens = tokens_from(0, 40)
    cache = PrefixCache(3, whole=True)
    cache.record(0, OwnedTokens([*tokens[:20]]))
    cache.record(1, OwnedTokens([*tokens[:35], 999]))
    assert find(cache, [*tokens, 1]) == (0, 20)  # the longer prefix is only a part of what the slot has read
    assert find(cache, tokens[:20])[1] == 0  # the last token of a prompt has to be computed
    cache.record(2, OwnedTokens([*tokens[:20], 7], owner="ann", public=20))
    assert cache.find(OwnedTokens([*tokens[:20], 7, 8], owner="bob", public=20))[1] == 0
    assert cache.find(OwnedTokens([*tokens[:20], 7, 8], owner="ann", public=20)) == (2, 21)
