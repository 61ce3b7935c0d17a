// Linears whose weights stay quantized in groups of 32 inputs, as in GGUF files. Pure computation, no torch.
//
// Weights stand in panels of 32 outputs. A panel is a row of records, one for each group of 32 inputs:
//   scales  32 half floats, one for each output; two times 32 where a scale is for 16 inputs
//   minima  32 half floats, in formats that have them
//   low     512 bytes: byte 4 * lane + i of the vector (j, block) has input 4 * j + i in its low four bits and input
//           16 + 4 * j + i in its high ones, for output 16 * block + lane
//   high    the bits above the low four, in the order of the bytes of `low`: 128 bytes for a fifth bit, 256 for two bits
//   or, for 8 bits, 1024 bytes in place of low and high: all 8 vectors of four inputs, of both blocks
// All records are whole cache lines.
//
// Activations are one byte each, with a scale for each group of 32. A group whose largest number stands out in its row
// gets a second byte for each number: one group in ten, where most of the error would come from. So the divergence from
// exact activations falls to a third, and two bytes for all would take half as much time again.
//
// Each row of a result is computed alone, in a fixed order.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "vectors.h"

namespace parley {

constexpr int GROUP = 32, PANEL = 32;

// In the order of the names in quantized_weight.py.
enum Format { Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q6_16, Q4_16, IQ4, MXFP4, FORMATS };

constexpr int bits_of(Format f) {
  return f == Q8_0 ? 8 : f == Q6_16 ? 6 : f == Q5_0 || f == Q5_1 ? 5 : 4;
}
constexpr bool has_minimum(Format f) { return f == Q4_1 || f == Q5_1; }
constexpr bool has_table(Format f) { return f == IQ4 || f == MXFP4; }
constexpr int scales_of(Format f) { return f == Q6_16 || f == Q4_16 ? 2 : 1; }
// What the stored number is larger by than the number it stands for.
constexpr int zero_of(Format f) {
  return has_minimum(f) ? 0 : has_table(f) ? 128 : f == Q4_16 ? 4 : 1 << (bits_of(f) - 1);
}
constexpr int low_at(Format f) { return (scales_of(f) + has_minimum(f)) * PANEL * 2; }
constexpr int record_size(Format f) { return low_at(f) + GROUP * PANEL * bits_of(f) / 8; }

// The numbers that 4 bits stand for, each 128 larger: of IQ4_NL and IQ4_XS, and of MXFP4 (doubled).
constexpr uint8_t TABLES[2][16] = {
    {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241},
    {128, 129, 130, 131, 132, 134, 136, 140, 128, 127, 126, 125, 124, 122, 120, 116}};

#ifdef __AVX512F__
inline Floats halves(const uint16_t* from) { return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }
#elif defined(__F16C__)
inline Floats halves(const uint16_t* from) {
  Floats result;
  for (int half = 0; half < 2; half++)
    _mm256_storeu_ps((float*)&result + 8 * half, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from + half)));
  return result;
}
#else
inline Floats halves(const uint16_t* from) {
  const _Float16* numbers = (const _Float16*)from;
  Floats result;
  for (int lane = 0; lane < LANES; lane++) result[lane] = numbers[lane];
  return result;
}
#endif

#ifdef __AVX512F__
inline float largest_of(Floats x) { return _mm512_reduce_max_ps((__m512)x); }
inline int32_t sum_of(Integers x) { return _mm512_reduce_add_epi32((__m512i)x); }
#else
inline float largest_of(Floats x) {
  float largest = x[0];
  for (int lane = 1; lane < LANES; lane++) largest = std::max(largest, x[lane]);
  return largest;
}
inline int32_t sum_of(Integers x) {
  int32_t sum = 0;
  for (int lane = 0; lane < LANES; lane++) sum += x[lane];
  return sum;
}
#endif

// LANES sums of four products each: four bytes of a row of activations against the weights of LANES outputs.
inline Integers add_products(Integers sums, Bytes weights, int32_t four) {
#if defined(__AVX512VNNI__)
  return (Integers)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, _mm512_set1_epi32(four));
#elif defined(__AVX2__)
  // Even and odd bytes as 16-bit numbers, so that no sum of two products overflows.
  const __m256i x = _mm256_set1_epi32(four), even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8);
  const __m256i odd = _mm256_srai_epi16(x, 8), mask = _mm256_set1_epi16(255);
  __m256i parts[2], totals[2];
  std::memcpy(parts, &weights, sizeof parts);
  std::memcpy(totals, &sums, sizeof totals);
  for (int half = 0; half < 2; half++) {
    totals[half] = _mm256_add_epi32(totals[half], _mm256_madd_epi16(_mm256_and_si256(parts[half], mask), even));
    totals[half] = _mm256_add_epi32(totals[half], _mm256_madd_epi16(_mm256_srli_epi16(parts[half], 8), odd));
  }
  std::memcpy(&sums, totals, sizeof sums);
  return sums;
#else
  int8_t x[4];
  std::memcpy(x, &four, 4);
  for (int lane = 0; lane < LANES; lane++)
    for (int i = 0; i < 4; i++) sums[lane] += weights[4 * lane + i] * x[i];
  return sums;
#endif
}

// The numbers that the low four bits stand for.
inline Bytes look_up(const uint8_t* table, Bytes bits) {
#if defined(__AVX512BW__)
  const __m512i numbers = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table));
  return (Bytes)_mm512_shuffle_epi8(numbers, (__m512i)bits);
#else
  for (int i = 0; i < 64; i++) bits[i] = table[bits[i]];
  return bits;
#endif
}

constexpr float FINE = 128;      // a number is FINE times its first byte, plus its second byte
constexpr float OUTSTANDING = 1.5;  // times the root mean square of all groups' largest numbers

// Rows of activations, as bytes.
struct Activations {
  int64_t depth, groups;
  std::vector<int8_t> bytes[2];     // (rows, depth): the first bytes; the second ones, where there are any
  std::vector<int32_t> totals[2];   // (rows, groups, 2): the sums of 16 bytes
  std::vector<float> scales, sums;  // (rows, groups): of a first byte; the sum of the numbers
  std::vector<int64_t> seconds;     // (rows, groups): the groups of a row that have second bytes, then -1

  Activations(int64_t rows, int64_t depth) : depth(depth), groups(depth / GROUP) {
    for (int part = 0; part < 2; part++) bytes[part].resize(rows * depth), totals[part].resize(rows * groups * 2);
    scales.resize(rows * groups), sums.resize(rows * groups), seconds.resize(rows * groups);
  }

  // A row with a number that is not finite gives NaN everywhere.
  void take(int64_t row, const float* x) {
    float *tops = &scales[row * groups], squares = 0;
    Floats zeros = {};  // or NaN
    for (int64_t group = 0; group < groups; group++) {
      const Floats first = load(x + group * GROUP), second = load(x + group * GROUP + LANES);
      const Floats sizes[2] = {first < 0 ? -first : first, second < 0 ? -second : second};
      tops[group] = std::max(1e-20f, largest_of(sizes[0] > sizes[1] ? sizes[0] : sizes[1]));
      squares += tops[group] * tops[group];
      zeros += first * 0.f + second * 0.f;
    }
    if (sum_of((Integers)(zeros != zeros))) {
      std::fill_n(tops, groups, NAN), std::fill_n(&sums[row * groups], groups, NAN);
      seconds[row * groups] = -1;
      return;
    }
    const float most = OUTSTANDING * std::sqrt(squares / groups);
    int64_t* second = &seconds[row * groups];
    for (int64_t group = 0; group < groups; group++) {
      const bool two = tops[group] > most;
      if (two) *second++ = group;
      take_group(row * groups + group, x + group * GROUP, two);
    }
    if (second < &seconds[row * groups] + groups) *second = -1;
  }

  void take_group(int64_t index, const float* x, bool two) {
    const Floats rounder = fill(12582912.f);  // adding and subtracting it rounds to whole numbers
    const float unit = scales[index] / 127, steps = two ? FINE : 1;
    int32_t total[2] = {};
    for (int half = 0; half < 2; half++) {
      const Floats whole = load(x + half * LANES) * (steps / unit) + rounder - rounder;
      const Floats coarse = two ? whole / FINE + rounder - rounder : whole;
      const Floats parts[2] = {coarse, whole - coarse * steps};
      for (int part = 0; part <= two; part++) {
        const Integers numbers = __builtin_convertvector(parts[part], Integers);
        const Smalls small = __builtin_convertvector(numbers, Smalls);
        std::memcpy(&bytes[part][index * GROUP + half * LANES], &small, LANES);
        total[part] += totals[part][index * 2 + half] = sum_of(numbers);
      }
    }
    scales[index] = unit;
    sums[index] = total[0] * unit + total[1] * (unit / FINE);
  }
};

// The numbers of the inputs 4 j to 4 j + 3 (first) and 16 + 4 j to 16 + 4 j + 3 (second) of a group, for LANES outputs.
template <Format F>
inline void unpack(const uint8_t* record, int j, int block, Bytes& first, Bytes& second) {
  const uint8_t* low = record + low_at(F);
  if constexpr (F == Q8_0) {
    first = *(const Bytes*)(low + (j * 2 + block) * 64);
    second = *(const Bytes*)(low + ((j + 4) * 2 + block) * 64);
    return;
  }
  const Bytes both = *(const Bytes*)(low + (j * 2 + block) * 64), fifteen = Bytes{} + 15;
  first = both & fifteen;
  second = (Bytes)((Shorts)both >> 4) & fifteen;
  if constexpr (has_table(F)) {
    first = look_up(TABLES[F == MXFP4], first);
    second = look_up(TABLES[F == MXFP4], second);
  } else if constexpr (bits_of(F) == 5) {
    const Shorts more = *(const Shorts*)(low + 512 + block * 64);
    const Bytes fifth = Bytes{} + 16;
    first |= (Bytes)(j < 2 ? more << (4 - 2 * j) : more >> (2 * j - 4)) & fifth;
    second |= (Bytes)(j < 2 ? more << (3 - 2 * j) : more >> (2 * j - 3)) & fifth;
  } else if constexpr (bits_of(F) == 6) {
    const Shorts more = *(const Shorts*)(low + 512 + ((j / 2) * 2 + block) * 64);
    const Bytes two = Bytes{} + 48;
    first |= (Bytes)(j % 2 ? more : more << 4) & two;
    second |= (Bytes)(j % 2 ? more >> 2 : more << 2) & two;
  }
}

// Neighbouring rows of activations, and where their results for a panel are written.
struct Tile {
  const Activations* x;
  int64_t first;     // row of x
  float* const* to;  // the results' first columns of this panel
  int64_t columns;   // how many of them exist
};

constexpr int AHEAD = 8192;  // bytes: prefetching so far ahead, a core reads weights at the speed of the memory

// The products of a group of COUNT rows with the weights of a record, added to `sums`, in units of the first or the second
// byte. `index` is that of the group of the first row.
template <Format F, int COUNT, int PART>
[[gnu::always_inline]] inline void add_group(const Activations& x, int64_t index, const uint8_t* record, Floats (&sums)[COUNT][2]) {
  constexpr int SCALES = scales_of(F);
  const int8_t* bytes = &x.bytes[PART][index * GROUP];
  const int32_t* totals = &x.totals[PART][index * 2];
  Integers all[COUNT][SCALES][2];
#pragma GCC unroll 8
  for (int row = 0; row < COUNT; row++) {
    const int32_t* total = totals + row * x.groups * 2;
#pragma GCC unroll 2
    for (int scale = 0; scale < SCALES; scale++)
      all[row][scale][0] = all[row][scale][1] =
          zero_of(F) ? fill(-zero_of(F) * (SCALES == 2 ? total[scale] : total[0] + total[1])) : Integers{};
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    Bytes weights[2][2];  // first or second half of the group, block
#pragma GCC unroll 2
    for (int block = 0; block < 2; block++) unpack<F>(record, j, block, weights[0][block], weights[1][block]);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++)
#pragma GCC unroll 8
      for (int row = 0; row < COUNT; row++) {
        int32_t four;
        std::memcpy(&four, bytes + row * x.depth + 16 * half + 4 * j, sizeof four);
#pragma GCC unroll 2
        for (int block = 0; block < 2; block++) {
          Integers& sum = all[row][SCALES == 2 ? half : 0][block];
          sum = add_products(sum, weights[half][block], four);
        }
      }
  }
  const uint16_t* factors = (const uint16_t*)record;
#pragma GCC unroll 2
  for (int block = 0; block < 2; block++) {
#pragma GCC unroll 2
    for (int scale = 0; scale < SCALES; scale++) {
      const Floats factor = halves(factors + scale * PANEL + block * LANES);
#pragma GCC unroll 8
      for (int row = 0; row < COUNT; row++)
        sums[row][block] += __builtin_convertvector(all[row][scale][block], Floats) * x.scales[index + row * x.groups] * factor;
    }
    if constexpr (has_minimum(F) && PART == 0) {
      const Floats minimum = halves(factors + PANEL + block * LANES);
#pragma GCC unroll 8
      for (int row = 0; row < COUNT; row++) sums[row][block] += x.sums[index + row * x.groups] * minimum;
    }
  }
}

// Rows whose sums fit the registers; weights are unpacked once for all of them. More would take minutes to compile.
#ifdef __AVX512F__
constexpr int ROWS = 6;
#else
constexpr int ROWS = 2;
#endif

// Sums of COUNT rows for one panel, by the first bytes.
template <Format F, int COUNT>
void products(const Tile& tile, const uint8_t* record, bool fetch, Floats (*results)[2]) {
  Floats sums[COUNT][2] = {};
  for (int64_t group = 0; group < tile.x->groups; group++, record += record_size(F)) {
    for (int line = 0; fetch && line < record_size(F); line += 64) __builtin_prefetch(record + line + AHEAD);
    add_group<F, COUNT, 0>(*tile.x, tile.first * tile.x->groups + group, record, sums);
  }
  std::memcpy(results, sums, sizeof sums);
}

// Add what the second bytes of a row give.
template <Format F>
void add_second(const Tile& tile, int64_t row, const uint8_t* record, Floats* result) {
  const int64_t groups = tile.x->groups, start = (tile.first + row) * groups;
  const int64_t *second = &tile.x->seconds[start], *end = second + groups;
  Floats sums[1][2] = {};
  for (; second < end && *second >= 0; second++)
    add_group<F, 1, 1>(*tile.x, start + *second, record + *second * record_size(F), sums);
  for (int block = 0; block < 2; block++) result[block] += sums[0][block] * (1 / FINE);
}

inline void store(Floats value, float* to, int64_t count) {
  if (count >= LANES) {  // a copy of variable length would take as long as three groups
    *(Floats*)to = value;
  } else {
    for (int64_t i = 0; i < count; i++) to[i] = value[i];
  }
}

// `products` of `count` rows, 1 to ROWS.
template <Format F, int... BEFORE>
void products_of_count(int64_t count, const Tile& tile, const uint8_t* record, bool fetch, Floats (*results)[2],
                       std::integer_sequence<int, BEFORE...>) {
  constexpr void (*RUN[])(const Tile&, const uint8_t*, bool, Floats(*)[2]) = {products<F, BEFORE + 1>...};
  RUN[count - 1](tile, record, fetch, results);
}

template <Format F>
void products_of_rows(int64_t rows, const Tile& tile, const uint8_t* record, bool fetch) {
  Floats results[ROWS][2];  // not yet in `to`: reading it would wait for memory
  products_of_count<F>(rows, tile, record, fetch, results, std::make_integer_sequence<int, ROWS>());
  for (int64_t row = 0; row < rows; row++) {
    add_second<F>(tile, row, record, results[row]);
    for (int block = 0; block < 2; block++)
      store(results[row][block], tile.to[row] + block * LANES, tile.columns - block * LANES);
  }
}

typedef void (*Products)(int64_t rows, const Tile& tile, const uint8_t* record, bool fetch);
constexpr Products PRODUCTS[FORMATS] = {
    products_of_rows<Q4_0>, products_of_rows<Q4_1>,  products_of_rows<Q5_0>,  products_of_rows<Q5_1>, products_of_rows<Q8_0>,
    products_of_rows<Q6_16>, products_of_rows<Q4_16>, products_of_rows<IQ4>, products_of_rows<MXFP4>};

// The weights of a linear: its format, its outputs, its panels.
struct Part {
  Format format;
  int64_t columns;
  const uint8_t* weights;
};

inline int64_t panels_of(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

// In bytes.
inline int64_t weight_size(Format format, int64_t columns, int64_t depth) {
  return panels_of(columns) * (depth / GROUP) * record_size(format);
}

// One panel of the results of `rows` rows, from `first` on; `to` says which row of `out` each becomes, null that it stays.
inline void compute(const Activations& x, int64_t first, int64_t rows, const Part& part, const float* bias, int64_t panel,
                    const int64_t* to, float* out, int64_t step) {
  const int64_t size = x.groups * record_size(part.format), column = panel * PANEL;
  for (int64_t row = 0, tiles = (rows + ROWS - 1) / ROWS, count; tiles; row += count, tiles--) {
    count = (rows - row + tiles - 1) / tiles;  // 8 rows are 4 and 4 rather than 6 and 2
    float* results[ROWS];
    for (int64_t i = 0; i < count; i++) results[i] = out + (to ? to[first + row + i] : row + i) * step + column;
    const Tile tile = {&x, first + row, results, part.columns - column};
    PRODUCTS[part.format](count, tile, part.weights + panel * size, row == 0);
    for (int64_t i = 0; bias && i < count; i++)
      for (int64_t j = 0; j < std::min<int64_t>(PANEL, tile.columns); j++) results[i][j] += bias[column + j];
  }
}

// Several linears of the same input: x is (rows, depth), the bias (all columns) or null, out (rows, all columns).
inline void linear(const float* x, int64_t rows, int64_t depth, const std::vector<Part>& parts, const float* bias,
                   float* out) {
  int64_t columns = 0, panels = 0;
  for (const Part& part : parts) columns += part.columns, panels += panels_of(part.columns);
  Activations bytes(rows, depth);
#pragma omp parallel
  {
#pragma omp for
    for (int64_t row = 0; row < rows; row++) bytes.take(row, x + row * depth);
#pragma omp for
    for (int64_t index = 0; index < panels; index++) {
      int64_t panel = index, column = 0;
      const Part* part = parts.data();
      for (; panel >= panels_of(part->columns); part++) panel -= panels_of(part->columns), column += part->columns;
      compute(bytes, 0, rows, *part, bias ? bias + column : nullptr, panel, nullptr, out + column, columns);
    }
  }
}

// For each row of x, (rows, depth), the linears of the experts that it chose, (rows, choices), of `count` experts whose
// weights stand one after the other; biases are (count, columns) or null, out is (rows, choices, columns).
inline void linear_of_experts(const float* x, int64_t rows, int64_t depth, const int64_t* experts, int64_t choices,
                              const Part& all, int64_t count, const float* biases, float* out) {
  const int64_t panels = panels_of(all.columns), size = weight_size(all.format, all.columns, depth);
  std::vector<int64_t> to(rows * choices), starts = {0};  // choices by their experts, and where those of each begin
  std::iota(to.begin(), to.end(), 0);
  std::stable_sort(to.begin(), to.end(), [&](int64_t a, int64_t b) { return experts[a] < experts[b]; });
  for (int64_t i = 1; i <= rows * choices; i++)
    if (i == rows * choices || experts[to[i]] != experts[to[i - 1]]) starts.push_back(i);
  Activations bytes(rows * choices, depth);
#pragma omp parallel
  {
#pragma omp for
    for (int64_t i = 0; i < rows * choices; i++) bytes.take(i, x + to[i] / choices * depth);
#pragma omp for schedule(dynamic, 4)
    for (int64_t index = 0; index < ((int64_t)starts.size() - 1) * panels; index++) {
      const int64_t start = starts[index / panels], end = starts[index / panels + 1], expert = experts[to[start]];
      const Part part = {all.format, all.columns, all.weights + expert * size};
      compute(bytes, start, end - start, part, biases ? biases + expert * all.columns : nullptr, index % panels, to.data(),
              out, all.columns);
    }
  }
}

}  // namespace parley
