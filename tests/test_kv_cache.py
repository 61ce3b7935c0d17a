from __future__ import annotations

import pytest
import torch

from models.kv_cache import CacheTooLarge, KVCache, Slots, UnsupportedModel, slot_attention


class Attention(torch.nn.Module):
    layer_idx = 0


def tokens(rows: int, count: int, heads: int = 2) -> torch.Tensor:
    """Anything for keys, values or queries: (rows, heads, count, 4)."""
    return torch.randn(rows, heads, count, 4, generator=torch.Generator().manual_seed(rows * 100 + count))


def slots(cache: KVCache, first: int, positions: list[list[int]], length: int) -> Slots:
    return Slots(cache, first, torch.tensor(positions), length)


def test_each_row_is_written_to_its_own_slot_and_position_and_to_nothing_else() -> None:
    cache, key, value = KVCache(4, 8), tokens(2, 3), tokens(2, 3) + 1
    keys, values = slots(cache, 1, [[0, 1, 2], [4, 5, 6]], 7).update(0, key, value)
    assert keys.shape == values.shape == (2, 2, 7, 4)
    assert torch.equal(keys[0, :, 0:3], key[0])
    assert torch.equal(values[1, :, 4:7], value[1])
    stored = cache.layers[0][0]
    assert int(stored.count_nonzero()) == key.numel()
    assert not stored[0].any()
    assert not stored[3].any()


def test_layers_have_tensors_of_their_own() -> None:
    cache = KVCache(2, 8)
    for layer in (0, 1):
        slots(cache, 0, [[0]], 1).update(layer, tokens(1, 1), tokens(1, 1))
    pointers = {tensor.data_ptr() for pair in cache.layers.values() for tensor in pair}
    assert len(pointers) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cache_takes_the_dtype_that_the_model_shows_and_starts_at_zero(dtype: torch.dtype) -> None:
    key, value = KVCache(2, 8).layer(0, tokens(1, 1).to(dtype), tokens(1, 1).to(dtype))
    assert key.dtype == value.dtype == dtype
    assert not key.any()


def test_a_mask_is_causal_and_as_wide_as_the_window() -> None:
    rows = slots(KVCache(2, 8), 0, [[3, 4]], 6)
    like = torch.zeros(1)
    assert (rows.mask(None, like)[0, 0] == 0).tolist() == [[True] * 4 + [False] * 2, [True] * 5 + [False]]
    assert (rows.mask(2, like)[0, 0] == 0).tolist() == [
        [False, False, True, True, False, False],
        [False, False, False, True, True, False],
    ]


def test_queries_in_groups_see_the_keys_of_their_group() -> None:
    cache, query = KVCache(1, 8), tokens(1, 3, heads=4)
    key, value = tokens(1, 3), tokens(1, 3) * 2
    output, _ = slot_attention(Attention(), query, key, value, None, slots=slots(cache, 0, [[0, 1, 2]], 3))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), is_causal=True
    )
    torch.testing.assert_close(output, expected.transpose(1, 2))


def test_a_large_soft_cap_and_sinks_that_weigh_nothing_change_nothing() -> None:
    query, key, value = tokens(1, 3, heads=4), tokens(1, 3), tokens(1, 3) * 2

    def attend(**options: object) -> torch.Tensor:
        rows = slots(KVCache(1, 8), 0, [[0, 1, 2]], 3)
        return slot_attention(Attention(), query, key, value, None, slots=rows, **options)[0]  # type: ignore[arg-type]

    torch.testing.assert_close(attend(softcap=1e4), attend())
    torch.testing.assert_close(attend(s_aux=torch.full((4,), -1e9)), attend())
    assert not torch.allclose(attend(softcap=0.1), attend())
    assert attend(s_aux=torch.full((4,), 1e9)).abs().max() < 1e-6


def test_what_it_cannot_honour_is_refused() -> None:
    module = Attention()
    with pytest.raises(UnsupportedModel):
        slot_attention(module, tokens(1, 1), tokens(1, 1), tokens(1, 1), None)
    rows = slots(KVCache(1, 8), 0, [[0]], 1)
    with pytest.raises(UnsupportedModel):
        slot_attention(module, tokens(1, 1), tokens(1, 1), tokens(1, 1), None, slots=rows, position_bias=tokens(1, 1))


def test_a_cache_that_no_memory_can_hold_says_what_to_lower() -> None:
    with pytest.raises(CacheTooLarge, match="PARLEY_SLOTS"):
        KVCache(2**20, 2**24).layer(0, tokens(1, 1), tokens(1, 1))
