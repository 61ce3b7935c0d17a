"""Triton kernels for attention over blocks: store keys and values, attend, and combine parts.

The algorithm is that of FlashAttention-2 (Dao 2023, arXiv 2307.08691), with block tables (Kwon et al. 2023, arXiv
2309.06180). In these functions, a name in capitals is known when a kernel is compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_kernel(
    keys,  # (heads, tokens, size)
    values,  # (heads, tokens, value size)
    cached_keys,  # (cells, heads, size)
    cached_values,  # (cells, heads, value size)
    cells,  # (tokens,)
    key_head_stride,
    key_token_stride,
    value_head_stride,
    value_token_stride,
    LARGEST: tl.constexpr,  # of the cache's dtype
    HEADS: tl.constexpr,
    HEAD_LANES: tl.constexpr,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_LANES: tl.constexpr,
):
    """Store the keys and values of one token, rounded to the cache's dtype. NaN and infinity become 0."""
    token = tl.program_id(0).to(tl.int64)
    cell = tl.load(cells + token)
    head = tl.arange(0, HEAD_LANES)[:, None]
    lane = tl.arange(0, LANES)[None]
    inside = (head < HEADS) & (lane < SIZE)
    key = tl.load(keys + token * key_token_stride + head * key_head_stride + lane, mask=inside)
    key = _finite(key, cached_keys, LARGEST)
    tl.store(cached_keys + (cell * HEADS + head) * SIZE + lane, key, mask=inside)
    lane = tl.arange(0, VALUE_LANES)[None]
    inside = (head < HEADS) & (lane < VALUE_SIZE)
    value = tl.load(values + token * value_token_stride + head * value_head_stride + lane, mask=inside)
    value = _finite(value, cached_values, LARGEST)
    tl.store(cached_values + (cell * HEADS + head) * VALUE_SIZE + lane, value, mask=inside)


@triton.jit
def _finite(x, cached, LARGEST: tl.constexpr):
    x = tl.where(tl.abs(x) < float("inf"), x, 0.0).to(tl.float32)
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST).to(cached.dtype.element_ty)


@triton.jit(do_not_specialize=["sequences", "part_length", "table_stride", "window"])
def attend_kernel(
    query,  # (heads, tokens, size)
    keys,  # (cells, key heads, size)
    values,  # (cells, key heads, value size)
    sinks,  # (heads,)
    output,  # (tokens, heads, value size); (tokens, heads, parts, value size) if SPLIT
    peaks,  # (tokens, heads, parts), the largest score of each part
    totals,  # (tokens, heads, parts), the sum of its weights
    tables,  # (sequences, blocks)
    starts,  # (sequences + 1,)
    lengths,  # (sequences,)
    sequences,
    part_length,
    head_stride,
    token_stride,
    table_stride,
    scale,
    softcap,
    window,
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # queries of a key head
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,  # of a tile; 1 if each sequence has one token
    ROWS: tl.constexpr,  # for TOKENS * GROUP queries
    TILE: tl.constexpr,  # keys that are read at once
    SPLIT: tl.constexpr,  # whether each program attends to a part of the keys
    HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention of some tokens of one sequence, for the queries of one key head, to all keys or to a part of them."""
    tile = tl.program_id(0)
    key_head = tl.program_id(1)
    part = tl.program_id(2)
    sequence = tile if TOKENS == 1 else _sequence_of(tile, starts, sequences, TOKENS)
    start = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - start
    first = 0 if TOKENS == 1 else (tile - start // TOKENS - sequence) * TOKENS
    if first >= count:
        return
    before = tl.load(lengths + sequence) - count  # tokens of the sequence before this step

    row = tl.arange(0, ROWS)
    token = first + row // GROUP
    head = key_head * GROUP + row % GROUP
    asked = (row < TOKENS * GROUP) & (token < count)
    position = before + token
    lane = tl.arange(0, LANES)
    at_query = (start + token).to(tl.int64) * token_stride + head * head_stride
    q = tl.load(query + at_query[:, None] + lane[None], mask=asked[:, None] & (lane < SIZE)[None], other=0.0)

    low = tl.maximum(before + first - window + 1, 0)
    high = before + tl.minimum(first + TOKENS, count)
    if SPLIT:
        low = tl.maximum(low, part * part_length)
        high = tl.minimum(high, (part + 1) * part_length)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if HAS_SINKS:  # noqa: SIM102, one is known when the kernel is compiled, and one is not
        if part == 0:  # a score that takes weight and adds nothing
            peak = tl.load(sinks + head, mask=asked, other=0.0).to(tl.float32)
            total += 1.0
    mixed = tl.zeros((ROWS, VALUE_LANES), tl.float32)
    value_lane = tl.arange(0, VALUE_LANES)
    for at in range(low, high, TILE):
        place = at + tl.arange(0, TILE)
        inside = place < high
        block = tl.load(tables + sequence.to(tl.int64) * table_stride + place // BLOCK, mask=inside, other=0)
        cell = (block.to(tl.int64) * BLOCK + place % BLOCK) * KEY_HEADS + key_head
        k = tl.load(keys + cell[None] * SIZE + lane[:, None], mask=inside[None] & (lane < SIZE)[:, None], other=0.0)
        score = tl.dot(q, k.to(q.dtype), input_precision=PRECISION) * scale  # (ROWS, TILE)
        if HAS_SOFTCAP:  # softcap * tanh(score / softcap)
            score = softcap * (2 * tl.sigmoid(2 * score / softcap) - 1)
        seen = inside[None] & (place[None] <= position[:, None]) & (place[None] > position[:, None] - window)
        score = tl.where(seen, score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1))
        zero = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # for rows that have seen nothing yet
        weight = tl.exp(score - zero[:, None])
        decay = tl.exp(peak - zero)
        peak = new_peak
        total = total * decay + tl.sum(weight, 1)
        at_value = cell[:, None] * VALUE_SIZE + value_lane[None]
        v = tl.load(values + at_value, mask=inside[:, None] & (value_lane < VALUE_SIZE)[None], other=0.0).to(q.dtype)
        mixed = mixed * decay[:, None] + tl.dot(weight.to(q.dtype), v, input_precision=PRECISION)

    result = (start + token).to(tl.int64) * KEY_HEADS * GROUP + head
    if SPLIT:
        result = result * tl.num_programs(2) + part
        tl.store(peaks + result, peak, mask=asked)
        tl.store(totals + result, total, mask=asked)
    else:
        mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]  # rows that nobody asked for have seen nothing
    at_result = result[:, None] * VALUE_SIZE + value_lane[None]
    mask = asked[:, None] & (value_lane < VALUE_SIZE)[None]
    tl.store(output + at_result, mixed.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _sequence_of(tile, starts, sequences, TOKENS: tl.constexpr):
    """The sequence of a tile. Those of sequence s begin at `starts[s] // TOKENS + s`."""
    low = 0
    high = sequences
    while low + 1 < high:
        middle = (low + high) // 2
        if tl.load(starts + middle) // TOKENS + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["parts"])
def combine_kernel(
    mixed,  # (tokens * heads, parts, value size)
    peaks,  # (tokens * heads, parts)
    totals,  # (tokens * heads, parts)
    output,  # (tokens * heads, value size)
    parts,
    PARTS: tl.constexpr,  # the most
    VALUE_SIZE: tl.constexpr,
    VALUE_LANES: tl.constexpr,
):
    """The attention of one query to all keys, from that to the parts."""
    query = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    lane = tl.arange(0, VALUE_LANES)
    there = part < parts
    peak = tl.load(peaks + query * parts + part, mask=there, other=float("-inf"))
    weight = tl.exp(peak - tl.max(peak, 0))  # 0 for a part in which nothing was seen
    total = tl.sum(weight * tl.load(totals + query * parts + part, mask=there, other=0.0), 0)
    at = (query * parts + part)[:, None] * VALUE_SIZE + lane[None]
    each = tl.load(mixed + at, mask=there[:, None] & (lane < VALUE_SIZE)[None], other=0.0)
    result = tl.sum(each * weight[:, None], 0) / total
    tl.store(output + query * VALUE_SIZE + lane, result.to(output.dtype.element_ty), mask=lane < VALUE_SIZE)
