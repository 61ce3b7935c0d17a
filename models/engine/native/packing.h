// Quantized weights into panels and out of them; the layout is in linears.h. The blocks are those of GGUF files.

#pragma once

#include "linears.h"

namespace parley {

typedef _Float16 Half;

// The weights of one output for 32 inputs: numbers, as they are stored, and what they are multiplied by.
struct Group {
  uint8_t numbers[GROUP];
  float scales[2];
  float minimum;
};

inline float half_at(const uint8_t* from) {
  Half number;
  std::memcpy(&number, from, 2);
  return number;
}

// Weights of more than a million would need larger scales; infinite ones would make their zeros NaN.
inline Half to_half(float number) { return (Half)std::clamp(number, -65504.f, 65504.f); }

// The record was zeros.
inline void put(const Group& group, Format format, int column, uint8_t* record) {
  const int block = column / LANES, lane = column % LANES, low = low_at(format);
  Half* factors = (Half*)record + column;
  for (int part = 0; part < scales_of(format); part++) factors[part * PANEL] = to_half(group.scales[part]);
  if (has_minimum(format)) factors[PANEL] = to_half(group.minimum);
  for (int i = 0; i < GROUP; i++) {
    const int number = group.numbers[i], half = i / 16, j = i % 16 / 4;
    if (format == Q8_0) {
      record[low + ((i / 4) * 2 + block) * 64 + 4 * lane + i % 4] = number;
      continue;
    }
    uint8_t* at = record + low + (j * 2 + block) * 64 + 4 * lane + i % 4;
    *at |= (number & 15) << (4 * half);
    uint8_t* high = record + low + 512 + block * 64 + 4 * lane + i % 4;
    if (bits_of(format) == 5) *high |= (number >> 4) << (2 * j + half);
    if (bits_of(format) == 6) high[j / 2 * 128] |= (number >> 4) << (4 * (j % 2) + 2 * half);
  }
}

inline void get(const uint8_t* record, Format format, int column, float* to) {
  const int block = column / LANES, lane = column % LANES, low = low_at(format);
  const Half* factors = (const Half*)record + column;
  for (int i = 0; i < GROUP; i++) {
    const int half = i / 16, j = i % 16 / 4, byte = 4 * lane + i % 4;
    int number;
    if (format == Q8_0) {
      number = record[low + ((i / 4) * 2 + block) * 64 + byte];
    } else {
      number = record[low + (j * 2 + block) * 64 + byte] >> (4 * half) & 15;
      if (has_table(format)) number = TABLES[format == MXFP4][number];
      if (bits_of(format) == 5) number |= (record[low + 512 + block * 64 + byte] >> (2 * j + half) & 1) << 4;
      if (bits_of(format) == 6)
        number |= (record[low + 512 + ((j / 2) * 2 + block) * 64 + byte] >> (4 * (j % 2) + 2 * half) & 3) << 4;
    }
    const float factor = factors[(scales_of(format) == 2 ? half : 0) * PANEL];
    to[i] = (number - zero_of(format)) * factor + (has_minimum(format) ? (float)factors[PANEL] : 0);
  }
}

// A type of GGUF's blocks: its number there, the format that holds it, groups of 32 in a block, and bytes of a block.
struct BlockType {
  int64_t number;
  Format format;
  int64_t groups, size;
};

constexpr BlockType BLOCK_TYPES[] = {
    {2, Q4_0, 1, 18},    {3, Q4_1, 1, 20},   {6, Q5_0, 1, 22},    {7, Q5_1, 1, 24}, {8, Q8_0, 1, 34},   {11, Q4_16, 8, 110},
    {12, Q4_1, 8, 144}, {13, Q5_1, 8, 176}, {14, Q6_16, 8, 210}, {20, IQ4, 1, 18}, {23, IQ4, 8, 136}, {39, MXFP4, 1, 17}};

// Readers of GGUF's blocks: the group `index` of a block.

inline void read_q4(const uint8_t* block, int, bool minimum, bool fifth, Group& group) {
  group.scales[0] = half_at(block);
  group.minimum = minimum ? half_at(block + 2) : 0;
  const uint8_t* at = block + (minimum ? 4 : 2);
  uint32_t bits = 0;
  if (fifth) std::memcpy(&bits, at, 4), at += 4;
  for (int i = 0; i < 16; i++) {
    group.numbers[i] = (at[i] & 15) | (bits >> i & 1) << 4;
    group.numbers[16 + i] = at[i] >> 4 | (bits >> (16 + i) & 1) << 4;
  }
}

inline void read_q8_0(const uint8_t* block, Group& group) {
  group.scales[0] = half_at(block);
  for (int i = 0; i < GROUP; i++) group.numbers[i] = block[2 + i] ^ 128;
}

// The six bits of a scale and of a minimum of Q4_K and Q5_K.
inline void scale_and_minimum(const uint8_t* bytes, int index, int& scale, int& minimum) {
  if (index < 4) {
    scale = bytes[index] & 63;
    minimum = bytes[index + 4] & 63;
  } else {
    scale = (bytes[index + 4] & 15) | (bytes[index - 4] >> 6) << 4;
    minimum = bytes[index + 4] >> 4 | (bytes[index] >> 6) << 4;
  }
}

inline void read_q4_k(const uint8_t* block, int index, bool fifth, Group& group) {
  int scale, minimum;
  scale_and_minimum(block + 4, index, scale, minimum);
  group.scales[0] = half_at(block) * scale;
  group.minimum = -half_at(block + 2) * minimum;
  const uint8_t *high = block + 16, *low = block + (fifth ? 48 : 16) + index / 2 * 32;
  for (int i = 0; i < GROUP; i++)
    group.numbers[i] = (low[i] >> (4 * (index % 2)) & 15) | (fifth ? (high[i] >> index & 1) << 4 : 0);
}

inline void read_q6_k(const uint8_t* block, int index, Group& group) {
  const int half = index / 4, quarter = index % 4;
  const uint8_t *low = block + half * 64 + quarter % 2 * 32, *high = block + 128 + half * 32;
  const int8_t* scales = (const int8_t*)block + 192 + index * 2;
  for (int i = 0; i < GROUP; i++)
    group.numbers[i] = (low[i] >> (4 * (quarter / 2)) & 15) | (high[i] >> (2 * quarter) & 3) << 4;
  for (int part = 0; part < 2; part++) group.scales[part] = half_at(block + 208) * scales[part];
}

inline void read_q3_k(const uint8_t* block, int index, Group& group) {
  const uint8_t *high = block, *low = block + 32 + index / 4 * 32, *packed = block + 96;
  for (int i = 0; i < GROUP; i++)
    group.numbers[i] = (low[i] >> (2 * (index % 4)) & 3) | (high[i] >> index & 1) << 2;
  for (int part = 0; part < 2; part++) {
    const int which = index * 2 + part;
    const int scale = (packed[which % 8] >> (4 * (which / 8)) & 15) | (packed[8 + which % 4] >> (2 * (which / 4)) & 3) << 4;
    group.scales[part] = half_at(block + 108) * (scale - 32);
  }
}

inline void read_iq4_xs(const uint8_t* block, int index, Group& group) {
  uint16_t high;
  std::memcpy(&high, block + 2, 2);
  const int scale = (block[4 + index / 2] >> (4 * (index % 2)) & 15) | (high >> (2 * index) & 3) << 4;
  group.scales[0] = half_at(block) * (scale - 32);
  const uint8_t* at = block + 8 + index * 16;
  for (int i = 0; i < 16; i++) group.numbers[i] = at[i] & 15, group.numbers[16 + i] = at[i] >> 4;
}

inline void read_mxfp4(const uint8_t* block, Group& group) {
  group.scales[0] = std::ldexp(1.f, block[0] - 128);  // the numbers of the table are doubled
  for (int i = 0; i < 16; i++) group.numbers[i] = block[1 + i] & 15, group.numbers[16 + i] = block[1 + i] >> 4;
}

inline void read_group(BlockType type, const uint8_t* row, int64_t index, Group& group) {
  const int groups = type.groups, within = index % groups;
  const uint8_t* block = row + index / groups * type.size;
  switch (type.number) {
    case 2: return read_q4(block, within, false, false, group);
    case 3: return read_q4(block, within, true, false, group);
    case 6: return read_q4(block, within, false, true, group);
    case 7: return read_q4(block, within, true, true, group);
    case 8: return read_q8_0(block, group);
    case 11: return read_q3_k(block, within, group);
    case 12: return read_q4_k(block, within, false, group);
    case 13: return read_q4_k(block, within, true, group);
    case 14: return read_q6_k(block, within, group);
    case 20: return read_q4(block, within, false, false, group);
    case 23: return read_iq4_xs(block, within, group);
    default: return read_mxfp4(block, group);
  }
}

// Scale and minimum of 32 numbers of 0 to 15, by alternating rounding and least squares.
inline void fit_q4_1(const float* x, Group& group) {
  const auto [least, most] = std::minmax_element(x, x + GROUP);
  float scale = (*most - *least) / 15, minimum = *least, best = INFINITY;
  for (int round = 0; round < 6; round++) {
    const float by = to_half(scale), from = to_half(minimum);
    float error = 0, sum = 0, squares = 0, sum_x = 0, products = 0;
    uint8_t numbers[GROUP];
    for (int i = 0; i < GROUP; i++) {
      const float number = by > 0 ? std::clamp(std::nearbyint((x[i] - from) / by), 0.f, 15.f) : 0;
      const float difference = number * by + from - x[i];
      numbers[i] = (uint8_t)number;
      error += difference * difference;
      sum += number, squares += number * number, sum_x += x[i], products += number * x[i];
    }
    if (round == 0 || error < best) {
      best = error, group.scales[0] = by, group.minimum = from;
      std::copy(numbers, numbers + GROUP, group.numbers);
    }
    const float spread = GROUP * squares - sum * sum;
    if (spread <= 0) return;
    scale = (GROUP * products - sum * sum_x) / spread;
    minimum = (sum_x - scale * sum) / GROUP;
  }
}

inline void fit_q8_0(const float* x, Group& group) {
  float top = 0;
  for (int i = 0; i < GROUP; i++) top = std::max(top, std::abs(x[i]));
  const float scale = to_half(top / 127);
  group.scales[0] = scale;
  for (int i = 0; i < GROUP; i++)
    group.numbers[i] = 128 + (scale ? (int)std::clamp(std::nearbyint(x[i] / scale), -127.f, 127.f) : 0);
}

// Fill panels: `read` gives the group of an output.
template <typename Read>
void fill_panels(Format format, int64_t columns, int64_t depth, uint8_t* to, Read read) {
  const int64_t groups = depth / GROUP, size = record_size(format);
#pragma omp parallel for
  for (int64_t panel = 0; panel < (columns + PANEL - 1) / PANEL; panel++)
    for (int64_t group = 0; group < groups; group++)
      for (int64_t column = panel * PANEL; column < std::min(columns, (panel + 1) * PANEL); column++) {
        Group numbers = {};
        read(column, group, numbers);
        put(numbers, format, column % PANEL, to + (panel * groups + group) * size);
      }
}

// Panels (zeros before) of blocks, (columns, bytes of a row).
inline void pack(BlockType type, const uint8_t* blocks, int64_t columns, int64_t depth, uint8_t* to) {
  const int64_t row = depth / GROUP / type.groups * type.size;
  fill_panels(type.format, columns, depth, to, [&](int64_t column, int64_t group, Group& numbers) {
    read_group(type, blocks + column * row, group, numbers);
  });
}

// Panels (zeros before) of weights, (columns, depth); the format is Q8_0 or Q4_1.
template <typename T>
void quantize(Format format, const T* weights, int64_t columns, int64_t depth, uint8_t* to) {
  const auto fit = format == Q4_1 ? fit_q4_1 : fit_q8_0;
  fill_panels(format, columns, depth, to, [&](int64_t column, int64_t group, Group& numbers) {
    float x[GROUP];
    for (int i = 0; i < GROUP; i++) x[i] = weights[column * depth + group * GROUP + i];
    if (std::all_of(x, x + GROUP, [](float number) { return std::isfinite(number); }))
      fit(x, numbers);
    else  // all of them become NaN
      numbers.scales[0] = NAN;
  });
}

// The weights of some outputs, (count, depth).
inline void unpack_rows(const Part& part, int64_t depth, const int64_t* rows, int64_t count, float* to) {
  const int64_t groups = depth / GROUP, size = record_size(part.format);
#pragma omp parallel for if (count > 64)
  for (int64_t i = 0; i < count; i++)
    for (int64_t group = 0; group < groups; group++)
      get(part.weights + (rows[i] / PANEL * groups + group) * size, part.format, rows[i] % PANEL,
          to + i * depth + group * GROUP);
}

}  // namespace parley
