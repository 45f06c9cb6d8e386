#include "layer.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "vector.h"

namespace rose::cpu {
namespace {

constexpr int64_t lanes = 16;

ROSE_INLINE float sum(f32x16 v) {
  float s = 0;
  for (int i = 0; i < lanes; ++i) s += v[i];
  return s;
}

ROSE_INLINE f32x16 at_least(f32x16 x, f32x16 y) { return x > y ? x : y; }

// e^x to 2 units in the last place: 2^n times a polynomial in r = x - n ln 2. Below -87 the result is about 1e-38.
ROSE_INLINE f32x16 exponential(f32x16 x) {
  const f32x16 zero = {};
  x = x < -87.0f ? zero - 87.0f : x;  // NaN stays NaN
  x = x > 88.0f ? zero + 88.0f : x;
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const f32x16 shifted = x * 1.44269504f + shift, n = shifted - shift;
  const f32x16 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  f32x16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const u32x16 power = (bits<u32x16>(shifted) - bits<u32x16>(zero + shift) + 127u) << 23;
  return p * bits<f32x16>(power);
}

ROSE_INLINE f32x16 sigmoid(f32x16 x) { return 1.0f / (1.0f + exponential(-x)); }

// --- norms and activations ---

template <class Type>
ROSE_INLINE void norm_rows(const float* x, const typename Type::type* w, int64_t count, int64_t width, float eps, typename Type::type* y) {
  for (int64_t row = 0; row < count; ++row, x += width, y += width) {
    f32x16 squares = {};
    for (int64_t i = 0; i < width; i += lanes) squares += load<f32x16>(x + i) * load<f32x16>(x + i);
    const float scale = 1.0f / std::sqrt(sum(squares) / float(width) + eps);
    for (int64_t i = 0; i < width; i += lanes) Type::narrow(y + i, load<f32x16>(x + i) * scale * Type::widen(w + i));
  }
}

template <class Type>
ROSE_INLINE void norm_rows_backward(const float* dy, const float* x, const typename Type::type* w, int64_t count, int64_t width,
                                    float eps, float* grad) {
  for (int64_t row = 0; row < count; ++row, dy += width, x += width, grad += width) {
    f32x16 squares = {}, along = {};
    for (int64_t i = 0; i < width; i += lanes) {
      const f32x16 v = load<f32x16>(x + i);
      squares += v * v;
      along += v * load<f32x16>(dy + i) * Type::widen(w + i);
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / float(width) + eps);
    const float back = sum(along) * scale * scale * scale / float(width);
    for (int64_t i = 0; i < width; i += lanes)
      store(grad + i, load<f32x16>(grad + i) + load<f32x16>(dy + i) * Type::widen(w + i) * scale - load<f32x16>(x + i) * back);
  }
}

template <class Type>
ROSE_INLINE void swiglu_part(const typename Type::type* gate, const typename Type::type* up, int64_t count, typename Type::type* y) {
  for (int64_t i = 0; i < count; i += lanes) {
    const f32x16 g = Type::widen(gate + i);
    Type::narrow(y + i, g * sigmoid(g) * Type::widen(up + i));
  }
}

template <class Type>
ROSE_INLINE void swiglu_part_backward(const typename Type::type* dy, typename Type::type* gate, typename Type::type* up, int64_t count) {
  for (int64_t i = 0; i < count; i += lanes) {
    const f32x16 d = Type::widen(dy + i), g = Type::widen(gate + i), u = Type::widen(up + i), s = sigmoid(g);
    Type::narrow(gate + i, d * u * s * (1.0f + g * (1.0f - s)));
    Type::narrow(up + i, d * g * s);
  }
}

template <class Type>
ROSE_INLINE void rotate_head(typename Type::type* x, const float* cosine, const float* sine, int64_t dim, bool backward) {
  const int64_t half = dim / 2;
  const float turn = backward ? -1.0f : 1.0f;
  const float *sine_a = sine + (backward ? half : 0), *sine_b = sine + (backward ? 0 : half);
  for (int64_t i = 0; i < half; i += lanes) {
    const f32x16 a = Type::widen(x + i), b = Type::widen(x + half + i);
    Type::narrow(x + i, a * load<f32x16>(cosine + i) - turn * b * load<f32x16>(sine_a + i));
    Type::narrow(x + half + i, b * load<f32x16>(cosine + half + i) + turn * a * load<f32x16>(sine_b + i));
  }
}

// --- attention: small matrix products in float32 ---

constexpr int tile_rows = 6;

// out[i][0 .. 16 V) = sum over k of a[i * a_row + k * a_column] * b[k * b_row + ..) for tile_rows rows, of which `rows` are stored
template <int V>
ROSE_INLINE void product_tile(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, int64_t depth, int rows, float* out,
                              int64_t out_row) {
  f32x16 acc[tile_rows][V] = {};
  const float* at[tile_rows];
  for (int r = 0; r < tile_rows; ++r) at[r] = a + std::min(r, rows - 1) * a_row;
  for (int64_t k = 0; k < depth; ++k) {
    f32x16 y[V];
#pragma GCC unroll 4
    for (int c = 0; c < V; ++c) y[c] = load<f32x16>(b + k * b_row + lanes * c);
#pragma GCC unroll 6
    for (int r = 0; r < tile_rows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < V; ++c) acc[r][c] += at[r][k * a_column] * y[c];
  }
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < V; ++c) store(out + r * out_row + lanes * c, acc[r][c]);
}

// out [m, n] = a [m, depth] b [depth, n]; n a multiple of 16; a has any strides.
ROSE_INLINE void product(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, int64_t m, int64_t n, int64_t depth,
                         float* out, int64_t out_row) {
  for (int64_t j = 0; j < n; j += 4 * lanes)
    for (int64_t i = 0; i < m; i += tile_rows) {
      const int rows = int(std::min<int64_t>(tile_rows, m - i));
      const float *x = a + i * a_row, *y = b + j;
      float* z = out + i * out_row + j;
      switch (std::min<int64_t>((n - j) / lanes, 4)) {
        case 1: product_tile<1>(x, a_row, a_column, y, b_row, depth, rows, z, out_row); break;
        case 2: product_tile<2>(x, a_row, a_column, y, b_row, depth, rows, z, out_row); break;
        case 3: product_tile<3>(x, a_row, a_column, y, b_row, depth, rows, z, out_row); break;
        default: product_tile<4>(x, a_row, a_column, y, b_row, depth, rows, z, out_row);
      }
    }
}

template <class Type>
ROSE_INLINE void widen_row(const typename Type::type* x, int64_t dim, float* out) {
  for (int64_t i = 0; i < dim; i += lanes) store(out + i, Type::widen(x + i));
}

template <class Type>
ROSE_INLINE void narrow_row(const float* x, int64_t dim, typename Type::type* out) {
  for (int64_t i = 0; i < dim; i += lanes) Type::narrow(out + i, load<f32x16>(x + i));
}

// out[i * stride] = x[i]: a row becomes a column.
ROSE_INLINE void as_column(const float* x, int64_t dim, float* out, int64_t stride) {
  for (int64_t i = 0; i < dim; ++i) out[i * stride] = x[i];
}

// What a task, one suffix and one key head, works on. It grows to the largest task of a thread, and stays for the next call.
struct Scratch {
  std::vector<float> query, keys, values, turned, scores, other, result;
};

int64_t rounded(int64_t n) { return (n + lanes - 1) / lanes * lanes; }

// The probabilities [group * length, width] of suffix b and key head g in s.scores; keys and values of prefix and suffix widened. Query
// (j, t), head j of the group at suffix token t, is row j * length + t.
template <class Type>
ROSE_INLINE void probabilities(const Suffixes& a, int64_t b, int64_t g, Scratch& s) {
  using T = typename Type::type;
  const int64_t dim = a.dim, group = a.heads / a.kv, length = a.length[b], past = a.prefix_length[b], all = past + length, width = rounded(all);
  const int64_t queries = group * length;
  s.query.resize(std::max<size_t>(s.query.size(), queries * dim));
  s.keys.resize(std::max<size_t>(s.keys.size(), all * dim));
  s.values.resize(std::max<size_t>(s.values.size(), all * dim));
  s.turned.resize(std::max<size_t>(s.turned.size(), dim * width));
  s.scores.resize(std::max<size_t>(s.scores.size(), queries * width));
  float* turned = s.turned.data();
  for (int64_t i = 0; i < all; ++i) {
    const int64_t row = i < past ? a.prefix[b * a.longest + i] : a.start[b] + i - past;
    const T* k = static_cast<const T*>(i < past ? a.past_k : a.k) + (row * a.kv + g) * dim;
    const T* v = static_cast<const T*>(i < past ? a.past_v : a.v) + (row * a.kv + g) * dim;
    widen_row<Type>(k, dim, &s.keys[i * dim]);
    widen_row<Type>(v, dim, &s.values[i * dim]);
    as_column(&s.keys[i * dim], dim, turned + i, width);
  }
  for (int64_t i = all; i < width; ++i)
    for (int64_t c = 0; c < dim; ++c) turned[c * width + i] = 0;
  for (int64_t j = 0; j < group; ++j)
    for (int64_t t = 0; t < length; ++t)
      widen_row<Type>(static_cast<const T*>(a.q) + ((a.start[b] + t) * a.heads + g * group + j) * dim, dim, &s.query[(j * length + t) * dim]);
  product(s.query.data(), dim, 1, turned, width, queries, width, dim, s.scores.data(), width);
  for (int64_t row = 0; row < queries; ++row) {
    float* p = &s.scores[row * width];
    const int64_t seen = past + row % length + 1;
    for (int64_t i = seen; i < width; ++i) p[i] = -INFINITY;
    f32x16 largest = load<f32x16>(p);
    for (int64_t i = lanes; i < width; i += lanes) largest = at_least(largest, load<f32x16>(p + i));
    float top = largest[0];
    for (int i = 1; i < lanes; ++i) top = std::max(top, largest[i]);
    for (int64_t i = 0; i < width; i += lanes) store(p + i, exponential((load<f32x16>(p + i) - top) * a.scale));
    for (int64_t i = seen; i < width; ++i) p[i] = 0;
    f32x16 total = {};
    for (int64_t i = 0; i < width; i += lanes) total += load<f32x16>(p + i);
    const float share = 1.0f / sum(total);
    for (int64_t i = 0; i < width; i += lanes) store(p + i, load<f32x16>(p + i) * share);
  }
}

template <class Type>
ROSE_INLINE void attend(const Suffixes& a, int64_t b, int64_t g, void* out, Scratch& s) {
  probabilities<Type>(a, b, g, s);
  const int64_t dim = a.dim, group = a.heads / a.kv, length = a.length[b], all = a.prefix_length[b] + length;
  s.result.resize(std::max<size_t>(s.result.size(), group * length * dim));
  product(s.scores.data(), rounded(all), 1, s.values.data(), dim, group * length, dim, all, s.result.data(), dim);
  for (int64_t j = 0; j < group; ++j)
    for (int64_t t = 0; t < length; ++t) {
      auto* to = static_cast<typename Type::type*>(out) + ((a.start[b] + t) * a.heads + g * group + j) * dim;
      narrow_row<Type>(&s.result[(j * length + t) * dim], dim, to);
    }
}

// P = softmax(scale Q K^T), dP = dO V^T, dS = scale P (dP - rowsum(P dP)); dQ = dS K, dK = dS^T Q, dV = P^T dO, of the suffix alone.
template <class Type>
ROSE_INLINE void attend_backward(const Suffixes& a, int64_t b, int64_t g, const void* dout, void* dq, void* dk, void* dv, Scratch& s) {
  using T = typename Type::type;
  probabilities<Type>(a, b, g, s);
  const int64_t dim = a.dim, group = a.heads / a.kv, length = a.length[b], past = a.prefix_length[b], all = past + length, width = rounded(all);
  const int64_t queries = group * length, first = a.start[b];
  s.other.resize(std::max<size_t>(s.other.size(), queries * (dim + width)));
  s.result.resize(std::max<size_t>(s.result.size(), queries * dim));
  float *given = s.other.data(), *slope = given + queries * dim, *result = s.result.data(), *p = s.scores.data();
  for (int64_t j = 0; j < group; ++j)
    for (int64_t t = 0; t < length; ++t)
      widen_row<Type>(static_cast<const T*>(dout) + ((first + t) * a.heads + g * group + j) * dim, dim, given + (j * length + t) * dim);
  for (int64_t i = 0; i < all; ++i) as_column(&s.values[i * dim], dim, &s.turned[i], width);
  product(given, dim, 1, s.turned.data(), width, queries, width, dim, slope, width);

  product(p + past, 1, width, given, dim, length, dim, queries, result, dim);
  for (int64_t t = 0; t < length; ++t) narrow_row<Type>(result + t * dim, dim, static_cast<T*>(dv) + ((first + t) * a.kv + g) * dim);

  for (int64_t row = 0; row < queries; ++row) {
    f32x16 along = {};
    for (int64_t i = 0; i < width; i += lanes) along += load<f32x16>(p + row * width + i) * load<f32x16>(slope + row * width + i);
    const float mean = sum(along);
    for (int64_t i = 0; i < width; i += lanes) {
      const f32x16 spread = load<f32x16>(slope + row * width + i) - mean;
      store(slope + row * width + i, load<f32x16>(p + row * width + i) * spread * a.scale);
    }
  }
  product(slope + past, 1, width, s.query.data(), dim, length, dim, queries, result, dim);
  for (int64_t t = 0; t < length; ++t) narrow_row<Type>(result + t * dim, dim, static_cast<T*>(dk) + ((first + t) * a.kv + g) * dim);
  product(slope, width, 1, s.keys.data(), dim, queries, dim, all, result, dim);
  for (int64_t j = 0; j < group; ++j)
    for (int64_t t = 0; t < length; ++t)
      narrow_row<Type>(result + (j * length + t) * dim, dim, static_cast<T*>(dq) + ((first + t) * a.heads + g * group + j) * dim);
}

// One function for each type, so that each can be compiled for several instruction sets.
#define ROSE_FOR_TYPE(TYPE, SUFFIX)                                                                                                         \
  ROSE_CLONES void norm_##SUFFIX(const float* x, const TYPE::type* w, int64_t count, int64_t width, float eps, TYPE::type* y) {             \
    norm_rows<TYPE>(x, w, count, width, eps, y);                                                                                            \
  }                                                                                                                                         \
  ROSE_CLONES void norm_backward_##SUFFIX(const float* dy, const float* x, const TYPE::type* w, int64_t count, int64_t width,          \
                                          float eps, float* grad) {                                                                         \
    norm_rows_backward<TYPE>(dy, x, w, count, width, eps, grad);                                                                            \
  }                                                                                                                                         \
  ROSE_CLONES void swiglu_##SUFFIX(const TYPE::type* gate, const TYPE::type* up, int64_t count, TYPE::type* y) {                            \
    swiglu_part<TYPE>(gate, up, count, y);                                                                                                  \
  }                                                                                                                                         \
  ROSE_CLONES void swiglu_backward_##SUFFIX(const TYPE::type* dy, TYPE::type* gate, TYPE::type* up, int64_t count) {                        \
    swiglu_part_backward<TYPE>(dy, gate, up, count);                                                                                        \
  }                                                                                                                                         \
  ROSE_CLONES void rotate_##SUFFIX(TYPE::type* x, const float* cosine, const float* sine, int64_t heads, int64_t dim, bool backward) {      \
    for (int64_t i = 0; i < heads; ++i) rotate_head<TYPE>(x + i * dim, cosine, sine, dim, backward);                                        \
  }                                                                                                                                         \
  ROSE_CLONES void attend_##SUFFIX(const Suffixes& a, int64_t b, int64_t g, void* out, Scratch& s) { attend<TYPE>(a, b, g, out, s); }       \
  ROSE_CLONES void attend_backward_##SUFFIX(const Suffixes& a, int64_t b, int64_t g, const void* dout, void* dq, void* dk, void* dv,        \
                                            Scratch& s) {                                                                                   \
    attend_backward<TYPE>(a, b, g, dout, dq, dk, dv, s);                                                                                    \
  }
ROSE_FOR_TYPE(F32, f32)
ROSE_FOR_TYPE(BF16, bf16)
#undef ROSE_FOR_TYPE

using bf16 = BF16::type;

// Elements that make it worth to wake a thread.
constexpr int64_t grain = 1 << 14;

// Calls task(suffix, key head, scratch) for all of them. Suffixes come sorted by length, so threads take them in turns.
template <class Task>
void each_task(const Suffixes& s, const Task& task) {
  const int64_t threads = std::max<int64_t>(1, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t i = thread; i < s.count * s.kv; i += threads) task(i / s.kv, i % s.kv, scratch);
  });
}

int64_t rows_for(int64_t width) { return std::max<int64_t>(1, grain / width); }

}  // namespace

void rms_norm(const float* x, const void* w, int64_t count, int64_t width, float eps, Float dtype, void* y) {
  at::parallel_for(0, count, rows_for(width), [&](int64_t begin, int64_t end) {
    const int64_t at = begin * width, n = end - begin;
    if (dtype == Float::f32)
      norm_f32(x + at, static_cast<const float*>(w), n, width, eps, static_cast<float*>(y) + at);
    else
      norm_bf16(x + at, static_cast<const bf16*>(w), n, width, eps, static_cast<bf16*>(y) + at);
  });
}

void rms_norm_backward(const float* dy, const float* x, const void* w, int64_t count, int64_t width, float eps, Float dtype, float* grad) {
  at::parallel_for(0, count, rows_for(width), [&](int64_t begin, int64_t end) {
    const int64_t at = begin * width, n = end - begin;
    if (dtype == Float::f32)
      norm_backward_f32(dy + at, x + at, static_cast<const float*>(w), n, width, eps, grad + at);
    else
      norm_backward_bf16(dy + at, x + at, static_cast<const bf16*>(w), n, width, eps, grad + at);
  });
}

void swiglu(const void* gate, const void* up, int64_t count, Float dtype, void* y) {
  at::parallel_for(0, count / lanes, grain / lanes, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * lanes, n = (end - begin) * lanes;
    if (dtype == Float::f32)
      swiglu_f32(static_cast<const float*>(gate) + at, static_cast<const float*>(up) + at, n, static_cast<float*>(y) + at);
    else
      swiglu_bf16(static_cast<const bf16*>(gate) + at, static_cast<const bf16*>(up) + at, n, static_cast<bf16*>(y) + at);
  });
}

void swiglu_backward(const void* dy, void* gate, void* up, int64_t count, Float dtype) {
  at::parallel_for(0, count / lanes, grain / lanes, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * lanes, n = (end - begin) * lanes;
    if (dtype == Float::f32)
      swiglu_backward_f32(static_cast<const float*>(dy) + at, static_cast<float*>(gate) + at, static_cast<float*>(up) + at, n);
    else
      swiglu_backward_bf16(static_cast<const bf16*>(dy) + at, static_cast<bf16*>(gate) + at, static_cast<bf16*>(up) + at, n);
  });
}

void rotate(void* x, const float* cosine, const float* sine, int64_t tokens, int64_t heads, int64_t dim, bool backward, Float dtype) {
  at::parallel_for(0, tokens, rows_for(heads * dim), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t at = t * heads * dim;
      if (dtype == Float::f32)
        rotate_f32(static_cast<float*>(x) + at, cosine + t * dim, sine + t * dim, heads, dim, backward);
      else
        rotate_bf16(static_cast<bf16*>(x) + at, cosine + t * dim, sine + t * dim, heads, dim, backward);
    }
  });
}

void attention(const Suffixes& s, void* out) {
  each_task(s, [&](int64_t b, int64_t g, Scratch& scratch) { (s.dtype == Float::f32 ? attend_f32 : attend_bf16)(s, b, g, out, scratch); });
}

void attention_backward(const Suffixes& s, const void* dout, void* dq, void* dk, void* dv) {
  each_task(s, [&](int64_t b, int64_t g, Scratch& scratch) {
    (s.dtype == Float::f32 ? attend_backward_f32 : attend_backward_bf16)(s, b, g, dout, dq, dk, dv, scratch);
  });
}

}  // namespace rose::cpu
