// The parts of a decoder layer between its matrix products, forward and backward, for packed suffixes on the CPU.
//
// The residual stream is float32; what enters or leaves a matrix product is in the weights' type, float32 or bfloat16. Every width
// (hidden size, MLP size) is a multiple of 16, the head dimension of 32. No result depends on the number of threads.
#pragma once

#include <cstdint>

#include "rank_update.h"

namespace rose::cpu {

// y = x / sqrt(mean(x^2) + eps) * w for `count` rows of x [count, width].
void rms_norm(const float* x, const void* w, int64_t count, int64_t width, float eps, Float dtype, void* y);

// grad += d<dy, rms_norm(x)>/dx.
void rms_norm_backward(const float* dy, const float* x, const void* w, int64_t count, int64_t width, float eps, Float dtype, float* grad);

// y = silu(gate) * up, elementwise over `count`.
void swiglu(const void* gate, const void* up, int64_t count, Float dtype, void* y);

// gate and up become their own gradients.
void swiglu_backward(const void* dy, void* gate, void* up, int64_t count, Float dtype);

// x [tokens, heads, dim] turned in place by cosine and sine [tokens, dim]: x cos + (-x2, x1) sin; or, backward, the transpose of it.
void rotate(void* x, const float* cosine, const float* sine, int64_t tokens, int64_t heads, int64_t dim, bool backward, Float dtype);

// B suffixes over cached prefixes. Suffix b is the tokens start[b] .. start[b] + length[b] - 1 of q [N, heads, dim] and k, v [N, kv, dim];
// its prefix is the rows prefix[b * longest ..] of past_k, past_v [M, kv, dim], prefix_length[b] of them.
struct Suffixes {
  const void *q, *k, *v, *past_k, *past_v;
  Float dtype;
  int64_t count, heads, kv, dim;
  const int64_t *start, *length, *prefix, *prefix_length;
  int64_t longest;
  float scale;
};

// Causal softmax attention: out [N, heads, dim]. Scores and probabilities are float32.
void attention(const Suffixes& s, void* out);

// dq [N, heads, dim], dk, dv [N, kv, dim] from dout; probabilities are computed again.
void attention_backward(const Suffixes& s, const void* dout, void* dq, void* dk, void* dv);

}  // namespace rose::cpu
