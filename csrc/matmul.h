// Products of a few hundred packed tokens with frozen weights, on CPUs with 512-bit vectors.
//
// The weights are read where they lie: a panel of 32 of a product's columns is rearranged into a core's own cache, used for all tokens, and
// dropped, and the next panel is fetched meanwhile. Nothing of a weight is kept, so that memory does not grow. Sums are
// float32, each in one order whatever the number of threads.
#pragma once

#include <cstdint>

#include "rank_update.h"

namespace rose::cpu {

// Whether this machine has what the products need: AVX-512, for bf16 with AVX512-BF16. Where there is AMX the library's are faster.
bool products_serve(Float dtype);

// out = a w^T (turned: w is [columns, depth], as a linear layer stores it), or out = a w (w is [depth, columns]); with `add` onto out.
struct Product {
  const void* w;
  int64_t columns;
  void* out;          // [rows, columns]
  Float out_dtype;    // f32, or the weights' type
};

// a [rows, depth] of a_dtype (f32 or the weights' type), shared by all products; depth and columns are multiples of 16. Where all outputs
// are f32, each equal part of the depth is summed by itself, as if it were all there is, and added to `out` before the next; a depth that
// does not divide into parts in multiples of 16 words is one part. (Parts of more than 16384 words are cut further.)
void products(const void* a, Float a_dtype, int64_t rows, int64_t depth, const Product* jobs, int64_t count, Float dtype, bool turned, bool add,
              int64_t parts);

}  // namespace rose::cpu
