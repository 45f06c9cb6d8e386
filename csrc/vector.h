// Vectors for the CPU kernels: the compiler's vector types of 64 bytes, which it lowers to what the machine has, and the element types that
// they are read from and rounded to. A function marked ROSE_CLONES is compiled for several instruction sets and the loader picks one,
// so that a build serves any machine of its architecture.
#pragma once

#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__gnu_linux__) && ((defined(__clang__) && __clang_major__ >= 16) || (!defined(__clang__) && __GNUC__ >= 12))
#define ROSE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ROSE_CLONES
#endif
#define ROSE_INLINE inline __attribute__((always_inline))

// Every vector crosses functions that are inlined only, so the calling convention that GCC warns of is never used.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace rose::cpu {

typedef float f32x16 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef double f64x8 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
#ifdef __FLT16_MAX__  // the compiler has float16 and converts vectors of it
using float16 = _Float16;
typedef _Float16 f16x16 __attribute__((vector_size(32)));
#else
using float16 = c10::Half;
#endif

template <class Vector, class T>
ROSE_INLINE Vector load(const T* x) {
  Vector v;
  std::memcpy(&v, x, sizeof v);
  return v;
}

template <class Vector, class T>
ROSE_INLINE void store(T* x, Vector v) {
  std::memcpy(x, &v, sizeof v);
}

template <class To, class From>
ROSE_INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

struct F32 {
  using type = float;
  static ROSE_INLINE f32x16 widen(const type* x) { return load<f32x16>(x); }
  static ROSE_INLINE void narrow(type* x, f32x16 v) { store(x, v); }
};

struct BF16 {
  using type = uint16_t;
  static ROSE_INLINE f32x16 widen(const type* x) {
    return bits<f32x16>(__builtin_convertvector(load<u16x16>(x), u32x16) << 16);
  }
  static ROSE_INLINE void narrow(type* x, f32x16 v) {  // to the nearest, ties to even
    const u32x16 b = bits<u32x16>(v);
    const u32x16 rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    const u32x16 is_nan = bits<u32x16>((b & 0x7fffffffu) > 0x7f800000u);
    store(x, __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0u), u16x16));
  }
};

struct F16 {
  using type = float16;
#ifdef __FLT16_MAX__
  static ROSE_INLINE f32x16 widen(const type* x) { return __builtin_convertvector(load<f16x16>(x), f32x16); }
  static ROSE_INLINE void narrow(type* x, f32x16 v) { store(x, __builtin_convertvector(v, f16x16)); }
#else
  static ROSE_INLINE f32x16 widen(const type* x) {
    f32x16 v;
    for (int i = 0; i < 16; ++i) v[i] = float(x[i]);
    return v;
  }
  static ROSE_INLINE void narrow(type* x, f32x16 v) {
    for (int i = 0; i < 16; ++i) x[i] = type(v[i]);
  }
#endif
};

}  // namespace rose::cpu
