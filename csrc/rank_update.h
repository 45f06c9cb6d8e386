// The fused weight write W += U V with V = (ridge I + K^T P)^-1 P^T, on raw pointers: no torch type crosses this header.
//
// Layouts. K and P arrive transposed, [n, d_in] row-major float32, so that a column of the method is a contiguous row here.
// G is [n, n] row-major float64, of which the lower triangle counts. V is [n, d_in] row-major float32.
#pragma once

#include <cstdint>

namespace rose {

enum class Float { f32, bf16, f16 };

// One weight to be written: w(i, j) at data + i * row_stride + j, rows x columns;
// it gains the sum over k of u[i * u_row + k * u_column] * v[k * columns + j].
struct Write {
  void* w;
  Float dtype;
  int64_t rows, columns, row_stride;
  const float* u;
  int64_t u_row, u_column;
  const float* v;
  int64_t n;
};

namespace cpu {

bool all_finite(const float* x, int64_t count);

// G = K^T P, lower triangle, each element summed in one fixed order whatever the number of threads.
void gram(const float* k, const float* p, int64_t n, int64_t d_in, double* g);

// The Cholesky factor of G in its lower triangle. Returns 0, or the leading minor (1 and up) that is not positive definite.
int64_t cholesky(double* g, int64_t n);

// V = (L L^T)^-1 P^T.
void solve(const double* l, const float* p, int64_t n, int64_t d_in, float* v);

// float32 arithmetic, one rounding to the weight's type; every element is added up in the order of k.
void add_low_rank(const Write* writes, int64_t count);

}  // namespace cpu

namespace cuda {

// Largest n that `factor` takes, and the bytes of scratch that it needs.
constexpr int max_fused_n = 64;
int64_t factor_scratch_bytes(int64_t n, int blocks);

// Number of blocks that `factor` may use on the current device: all of them run at once.
int factor_blocks();

// V = (ridge I + K^T P)^-1 P^T in one launch, for n <= max_fused_n. status[0] becomes 0, or the leading minor that is not positive
// definite, or -1 (K), -2 (P), -3 (R [r_count]) for one that holds NaN or Inf; V is then not written.
// Returns a cudaError_t.
int factor(const float* k, const float* p, const float* r, int64_t r_count, int64_t n, int64_t d_in, double ridge, float* v, void* scratch,
           int blocks, int32_t* status, void* stream);

constexpr int max_writes = 16;

// All writes in one launch (at most max_writes of one dtype); nothing is written where status is not null and status[0] is not 0.
// Returns a cudaError_t.
int add_low_rank(const Write* writes, int count, const int32_t* status, void* stream);

}  // namespace cuda
}  // namespace rose
