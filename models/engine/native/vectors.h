// Vectors of LANES numbers, which GCC turns into the instructions of the processor.

#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace parley {

constexpr int LANES = PARLEY_LANES;  // from build.py, whose layouts depend on it

typedef float Floats __attribute__((vector_size(64), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(64), aligned(4)));
typedef uint16_t Shorts __attribute__((vector_size(64), aligned(2)));
typedef uint8_t Bytes __attribute__((vector_size(64), aligned(1)));
typedef int8_t Smalls __attribute__((vector_size(16), aligned(1)));

inline Floats load(const float* from) { return *(const Floats*)from; }
inline Floats fill(float value) { return value - Floats{}; }
inline Integers fill(int32_t value) { return value - Integers{}; }

}  // namespace parley
