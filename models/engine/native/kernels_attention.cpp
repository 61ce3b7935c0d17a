// Attention over slots. Each row of a result is computed alone, in an order that depends on nothing else.

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "vectors.h"

namespace {

using parley::fill;
using parley::Floats;
using parley::Integers;
using parley::LANES;
using parley::load;
typedef uint32_t Words __attribute__((vector_size(64), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2)));

inline Floats load(const c10::BFloat16* from) {
#ifdef __AVX512F__  // one instruction; GCC 12 makes six from the code below
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#else
  return (Floats)(__builtin_convertvector(*(const Halves*)from, Words) << 16);
#endif
}
inline Floats load(const c10::Half* from) {
#ifdef __AVX512F__
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#else
  Floats result;
  for (int lane = 0; lane < LANES; lane++) result[lane] = from[lane];
  return result;
#endif
}
inline Floats load(const c10::Float8_e4m3fn* from) {
#ifdef __AVX512F__  // the same bits in a half float are 256 times smaller, subnormal ones too
  const __m256i bytes = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from));
  const __m256i sign = _mm256_and_si256(bytes, _mm256_set1_epi16((short)0x8000));
  const __m256i rest = _mm256_slli_epi16(_mm256_and_si256(bytes, _mm256_set1_epi16(0x7f)), 7);
  return (Floats)_mm512_cvtph_ps(_mm256_or_si256(sign, rest)) * 256.f;
#else
  Floats result;
  for (int lane = 0; lane < LANES; lane++) result[lane] = from[lane];
  return result;
#endif
}
// The nearest number of a type. In the small types, what is too large becomes the largest one, not infinity or NaN.
template <typename T>
inline T rounded(float value) {
  return (T)value;
}
template <>
inline c10::Half rounded(float value) {
  return std::min(std::max(value, -65504.f), 65504.f);
}
template <>
inline c10::Float8_e4m3fn rounded(float value) {
  return std::min(std::max(value, -448.f), 448.f);
}
inline void store(float* to, Floats value) { *(Floats*)to = value; }

// e to the x, to about one unit in the last place, by the polynomial of Cephes' expf. Below -87 the result is 0;
// above 88 it is the result at 88.
inline Floats exponential(Floats x) {
  Floats inside = x < -87.f ? fill(-87.f) : x;
  inside = inside > 88.f ? fill(88.f) : inside;
  Floats rounded = inside * 1.44269504f + 12582912.f;  // the lowest bits of the sum are the rounded number
  Integers exponent = (Integers)rounded << 23;
  rounded -= 12582912.f;
  Floats rest = inside - rounded * 0.693359375f + rounded * 2.12194440e-4f;
  Floats sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  Floats result = (Floats)((Integers)(sum * rest * rest + rest + 1.f) + exponent);
  return x < -87.f ? Floats{} : result;
}

struct Shape {
  int64_t groups, size, value_size, window, stride;  // groups: query heads per key head; stride: scores per row
  float scale, softcap;
};

// Read 4 kB ahead. The keys and values of a slot are too few for the processor to see in time where they go on: without
// this, 32 streams spend a tenth of a step waiting for them.
inline void fetch(const void* from) {
  for (int64_t line = 0; line < 4096; line += 64) __builtin_prefetch((const char*)from + line);
}

// Attention of ROWS queries over one slot's keys (blocks, size, LANES) and values (length, value_size) of one head.
// Three passes over data that fits a core's cache: all scores, then the softmax, then the sum of values.
template <int ROWS, typename T>
void attend(const Shape& shape, const float* queries, const int64_t* positions, const float* sinks, const T* keys,
            const T* values, float* scores, float* result) {
  const int64_t last = *std::max_element(positions, positions + ROWS);
  const int64_t oldest = *std::min_element(positions, positions + ROWS) - shape.window + 1;
  const int64_t first = shape.window ? std::max<int64_t>(0, oldest) / LANES : 0, end = last / LANES + 1;
  const Integers lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  fetch(values + first * LANES * shape.value_size);
  Floats highest[ROWS];
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; row++) highest[row] = fill(-INFINITY);
  for (int64_t block = first; block < end; block += 2) {  // two blocks at a time keep the multipliers busy
    const int64_t next = std::min(block + 1, end - 1);
    Floats sums[ROWS][2] = {};
    for (int64_t i = 0; i < shape.size; i++) {
      __builtin_prefetch(keys + ((block + 2) * shape.size + i) * LANES);
      __builtin_prefetch(keys + ((block + 3) * shape.size + i) * LANES);
      const Floats key[2] = {load(keys + (block * shape.size + i) * LANES), load(keys + (next * shape.size + i) * LANES)};
#pragma GCC unroll 8
      for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 8
        for (int half = 0; half < 2; half++) sums[row][half] += queries[row * shape.size + i] * key[half];
    }
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 8
      for (int half = 0; half < 2; half++) {
        const int64_t here = half ? next : block;
        const Integers key = lane + (int32_t)(here * LANES);
        Floats score = sums[row][half] * shape.scale;
        if (shape.softcap) score = shape.softcap - 2 * shape.softcap / (exponential(score * (2 / shape.softcap)) + 1.f);
        score = key <= (int32_t)positions[row] ? score : fill(-INFINITY);
        if (shape.window) score = key > (int32_t)(positions[row] - shape.window) ? score : fill(-INFINITY);
        highest[row] = highest[row] > score ? highest[row] : score;
        store(scores + row * shape.stride + here * LANES, score);
      }
  }
  float total[ROWS];
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; row++) {
    float top = sinks ? sinks[row] : -INFINITY;
    for (int i = 0; i < LANES; i++) top = std::max(top, highest[row][i]);
    Floats sum = {};
    for (float* at = scores + row * shape.stride + first * LANES; at < scores + row * shape.stride + end * LANES;
         at += LANES) {
      store(at, exponential(load(at) - top));
      sum += load(at);
    }
    total[row] = sinks ? exponential(fill(sinks[row] - top))[0] : 0;
    for (int i = 0; i < LANES; i++) total[row] += sum[i];
  }
  constexpr int WIDE = 4;
  for (int64_t column = 0; column < shape.value_size;) {
    const int wide = shape.value_size - column >= WIDE * LANES ? WIDE : 1;
    Floats sums[ROWS][WIDE] = {};
    for (int64_t position = first * LANES; position <= last; position++) {
      const T* value = values + position * shape.value_size + column;
      __builtin_prefetch(value + 16 * shape.value_size);
      __builtin_prefetch(value + 16 * shape.value_size + 32);
      if (wide == WIDE) {
#pragma GCC unroll 8
        for (int i = 0; i < WIDE; i++)
#pragma GCC unroll 8
          for (int row = 0; row < ROWS; row++)
            sums[row][i] += scores[row * shape.stride + position] * load(value + i * LANES);
      } else {
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++) sums[row][0] += scores[row * shape.stride + position] * load(value);
      }
    }
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++)
      for (int i = 0; i < wide; i++)
        store(result + row * shape.value_size + column + i * LANES, sums[row][i] / total[row]);
    column += wide * LANES;
  }
}

// Rows whose sums fit the registers; each key and value is loaded once for all of them. Without AVX-512, compiling more takes
// minutes.
#ifdef __AVX512F__
constexpr int TILE = 6;
#else
constexpr int TILE = 2;
#endif

template <int ROWS, typename T, typename... Arguments>
void attend_rows(int64_t rows, Arguments... arguments) {
  if constexpr (ROWS == 1) {
    attend<1, T>(arguments...);
  } else if (rows == ROWS) {
    attend<ROWS, T>(arguments...);
  } else {
    attend_rows<ROWS - 1, T>(rows, arguments...);
  }
}

// Consecutive tokens of one slot. One core computes them, and reads the slot's keys once.
struct Run {
  int64_t start, count;
};

std::vector<Run> runs_of(const int64_t* slots, int64_t tokens) {
  std::vector<Run> runs;
  for (int64_t start = 0; start < tokens;) {
    int64_t count = 1;
    while (count < 2 * TILE && start + count < tokens && slots[start + count] == slots[start]) count++;
    runs.push_back({start, count});
    start += count;
  }
  return runs;
}

template <typename T>
void attention_of(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, at::Tensor& keys,
                  at::Tensor& values, const int64_t* slots, const int64_t* positions, const float* sinks, Shape shape,
                  at::Tensor& out) {
  const int64_t tokens = query.size(2), heads = query.size(1), key_heads = key.size(1), width = value.size(3);
  const int64_t length = values.size(2);
  const auto runs = runs_of(slots, tokens);
  const auto query_step = query.strides(), key_step = key.strides(), value_step = value.strides();
  const float *new_keys = key.const_data_ptr<float>(), *new_values = value.const_data_ptr<float>();
  const float* queries = query.const_data_ptr<float>();
  T *all_keys = keys.data_ptr<T>(), *all_values = values.data_ptr<T>();
  float* results = out.data_ptr<float>();
#pragma omp parallel
  {
#pragma omp for
    for (int64_t token = 0; token < tokens; token++)
      for (int64_t head = 0; head < key_heads; head++) {
        const int64_t row = slots[token] * key_heads + head, at = positions[token];
        T* to = all_keys + (row * length + at / LANES * LANES) * shape.size + at % LANES;
        const float* from = new_keys + head * key_step[1] + token * key_step[2];
        for (int64_t i = 0; i < shape.size; i++) to[i * LANES] = rounded<T>(from[i * key_step[3]]);
        to = all_values + (row * length + at) * shape.value_size;
        from = new_values + head * value_step[1] + token * value_step[2];
        for (int64_t i = 0; i < width; i++) to[i] = rounded<T>(from[i * value_step[3]]);
      }
    std::vector<float> scores(TILE * shape.stride), rows(TILE * shape.size), result(TILE * shape.value_size);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < (int64_t)runs.size() * key_heads; item++) {
      const Run run = runs[item / key_heads];
      const int64_t head = item % key_heads, slot = slots[run.start] * key_heads + head;
      const int64_t later = item + omp_get_num_threads();  // probably this thread's next one
      if (!shape.window && later < (int64_t)runs.size() * key_heads)
        fetch(all_keys + (slots[runs[later / key_heads].start] * key_heads + later % key_heads) * length * shape.size);
      for (int64_t done = 0; done < run.count * shape.groups; done += TILE) {
        const int64_t count = std::min<int64_t>(TILE, run.count * shape.groups - done);
        int64_t where[TILE], token[TILE], query_head[TILE];
        float sink[TILE];
        for (int64_t row = 0; row < count; row++) {
          token[row] = run.start + (done + row) / shape.groups;
          query_head[row] = head * shape.groups + (done + row) % shape.groups;
          where[row] = positions[token[row]];
          if (sinks) sink[row] = sinks[query_head[row]];
          const float* from = queries + query_head[row] * query_step[1] + token[row] * query_step[2];
          for (int64_t i = 0; i < shape.size; i++) rows[row * shape.size + i] = from[i * query_step[3]];
        }
        attend_rows<TILE, T>(count, shape, rows.data(), where, sinks ? sink : nullptr, all_keys + slot * length * shape.size,
                       all_values + slot * length * shape.value_size, scores.data(), result.data());
        for (int64_t row = 0; row < count; row++)
          std::memcpy(results + (token[row] * heads + query_head[row]) * width, &result[row * shape.value_size],
                      width * sizeof(float));
      }
    }
  }
}

auto attention_over(at::ScalarType cache) {
  switch (cache) {
    case at::kFloat: return attention_of<float>;
    case at::kBFloat16: return attention_of<c10::BFloat16>;
    case at::kHalf: return attention_of<c10::Half>;
    case at::kFloat8_e4m3fn: return attention_of<c10::Float8_e4m3fn>;
    default: TORCH_CHECK(false, "the cache must be float32, bfloat16, float16 or float8_e4m3fn");
  }
}

void check_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& keys,
                     const at::Tensor& values, const at::Tensor& slots, const at::Tensor& positions,
                     const std::optional<at::Tensor>& sinks) {
  for (const auto* tensor : {&query, &key, &value})
    TORCH_CHECK(tensor->dim() == 4 && tensor->size(0) == 1 && tensor->scalar_type() == at::kFloat,
                "query, key and value must be float32 of (1, heads, tokens, size)");
  const int64_t heads = query.size(1), tokens = query.size(2), size = query.size(3), key_heads = key.size(1);
  TORCH_CHECK(key_heads > 0 && heads % key_heads == 0, heads, " heads cannot share ", key_heads, " key heads");
  TORCH_CHECK(key.size(2) == tokens && key.size(3) == size && value.size(1) == key_heads && value.size(2) == tokens,
              "query, key and value do not fit each other");
  TORCH_CHECK(keys.dim() == 5 && keys.is_contiguous() && keys.size(1) == key_heads && keys.size(3) == size &&
                  keys.size(4) == LANES,
              "cached keys must be contiguous, (slots, ", key_heads, ", blocks, ", size, ", ", LANES, ")");
  TORCH_CHECK(values.dim() == 4 && values.is_contiguous() && values.scalar_type() == keys.scalar_type() &&
                  values.size(0) == keys.size(0) && values.size(1) == key_heads &&
                  values.size(2) == keys.size(2) * LANES && values.size(3) >= value.size(3) &&
                  values.size(3) % LANES == 0,
              "cached values must be contiguous, (slots, ", key_heads, ", blocks * ", LANES, ", size), and fit the keys");
  for (const auto* tensor : {&slots, &positions})
    TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == tokens && tensor->is_contiguous() &&
                    tensor->scalar_type() == at::kLong,
                "slots and positions must be contiguous int64 of (tokens)");
  const int64_t *slot = slots.const_data_ptr<int64_t>(), *position = positions.const_data_ptr<int64_t>();
  for (int64_t token = 0; token < tokens; token++)
    TORCH_CHECK(slot[token] >= 0 && slot[token] < keys.size(0) && position[token] >= 0 &&
                    position[token] < values.size(2),
                "slot ", slot[token], ", position ", position[token], " is not in the cache");
  TORCH_CHECK(!sinks || (sinks->scalar_type() == at::kFloat && sinks->is_contiguous() && sinks->numel() == heads),
              "sinks must be contiguous float32 of (heads)");
}

}  // namespace

namespace parley {

at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, at::Tensor keys,
                     at::Tensor values, const at::Tensor& slots, const at::Tensor& positions,
                     const std::optional<at::Tensor>& sinks, double scale, double softcap, int64_t window) {
  check_attention(query, key, value, keys, values, slots, positions, sinks);
  auto out = at::empty({1, query.size(2), query.size(1), value.size(3)}, query.options());
  const int64_t *position = positions.const_data_ptr<int64_t>(), tokens = positions.numel();
  const int64_t longest = tokens ? *std::max_element(position, position + tokens) / LANES * LANES + LANES : 0;
  const Shape shape = {query.size(1) / key.size(1), query.size(3), values.size(3), window, longest,
                       (float)scale, (float)softcap};
  const auto run = attention_over(keys.scalar_type());
  run(query, key, value, keys, values, slots.const_data_ptr<int64_t>(), position,
      sinks ? sinks->const_data_ptr<float>() : nullptr, shape, out);
  return out;
}

}  // namespace parley
