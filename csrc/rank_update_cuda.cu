// CUDA kernels of the fused weight write. Raw pointers, sizes and a stream: no torch header, so nvcc alone compiles this file.
#include "rank_update.h"

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

namespace cg = cooperative_groups;

namespace rose::cuda {
namespace {

// --- V = (ridge I + K^T P)^-1 P^T, n <= 64, one cooperative launch ---

constexpr int max_n = max_fused_n;
constexpr int threads = 256;
constexpr int span = 32;         // columns of K and P in shared memory at a time
constexpr int right_sides = 64;  // columns that a block solves at a time, four neighbouring lanes each
constexpr int lanes = threads / right_sides;
constexpr int pitch = max_n + 1;

struct FactorShared {
  union {
    struct {
      float k[max_n][span + 1], p[max_n][span + 1];
    } chunk;
    double x[max_n][right_sides + 1];
  };
  double g[max_n][pitch];
};

struct Scratch {
  double* partial;  // [blocks, n, n]
  double* g;        // [n, n]
  int32_t* bad;     // [blocks]: bit 0 K, bit 1 P, bit 2 R
};

__host__ __device__ Scratch parts_of(void* scratch, int64_t n, int blocks) {
  double* partial = static_cast<double*>(scratch);
  double* g = partial + blocks * n * n;
  return {partial, g, reinterpret_cast<int32_t*>(g + n * n)};
}

// This block's share of K^T P into its partial sum. Thread (ty, tx) of 16 x 16 holds the 4 x 4 elements (ty + 16 a, tx + 16 b).
__device__ int gram_share(const float* k, const float* p, int n, int64_t d_in, FactorShared& shared, double* partial) {
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  double sum[4][4] = {};
  int bad = 0;
  const int64_t chunks = (d_in + span - 1) / span;
  for (int64_t c = blockIdx.x; c < chunks; c += gridDim.x) {
    for (int e = threadIdx.x; e < max_n * span; e += threads) {
      const int i = e / span, t = e % span;
      const int64_t column = c * span + t;
      const bool inside = i < n && column < d_in;
      const float a = inside ? k[i * d_in + column] : 0.f, b = inside ? p[i * d_in + column] : 0.f;
      bad |= (isfinite(a) ? 0 : 1) | (isfinite(b) ? 0 : 2);
      shared.chunk.k[i][t] = a;
      shared.chunk.p[i][t] = b;
    }
    __syncthreads();
    if (ty < n && tx < n) {
      for (int t = 0; t < span; ++t) {
        double a[4], b[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          a[r] = shared.chunk.k[ty + 16 * r][t];
          b[r] = shared.chunk.p[tx + 16 * r][t];
        }
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int s = 0; s < 4; ++s) sum[r][s] = fma(a[r], b[s], sum[r][s]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int i = ty + 16 * r, j = tx + 16 * s;
      if (i < n && j < n) partial[i * n + j] = sum[r][s];
    }
  return bad;
}

// Cholesky of shared.g in place, every block its own copy. Returns 0 or the leading minor that is not positive definite.
__device__ int factorise(FactorShared& shared, int n) {
  for (int j = 0; j < n; ++j) {
    const double pivot = shared.g[j][j];
    if (!(pivot > 0) || !isfinite(pivot)) return j + 1;  // the same in every thread
    __syncthreads();
    const double root = sqrt(pivot);
    for (int i = j + threadIdx.x; i < n; i += threads) shared.g[i][j] = i == j ? root : shared.g[i][j] / root;
    __syncthreads();
    for (int e = threadIdx.x; e < (n - j - 1) * (n - j - 1); e += threads) {
      const int i = j + 1 + e / (n - j - 1), m = j + 1 + e % (n - j - 1);
      if (m <= i) shared.g[i][m] = fma(-shared.g[i][j], shared.g[m][j], shared.g[i][m]);
    }
    __syncthreads();
  }
  return 0;
}

// x = L^-T L^-1 x for the column of right-hand sides that this thread shares with its neighbours.
__device__ void solve_column(FactorShared& shared, int n) {
  const int column = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  for (int i = 0; i < n; ++i) {
    const double y = shared.x[i][column] / shared.g[i][i];
    __syncwarp();
    if (lane == 0) shared.x[i][column] = y;
    for (int j = i + 1 + lane; j < n; j += lanes) shared.x[j][column] = fma(-shared.g[j][i], y, shared.x[j][column]);
    __syncwarp();
  }
  for (int i = n - 1; i >= 0; --i) {
    const double y = shared.x[i][column] / shared.g[i][i];
    __syncwarp();
    if (lane == 0) shared.x[i][column] = y;
    for (int j = lane; j < i; j += lanes) shared.x[j][column] = fma(-shared.g[i][j], y, shared.x[j][column]);
    __syncwarp();
  }
}

__global__ void __launch_bounds__(threads)
    factor_kernel(const float* k, const float* p, const float* r, int64_t r_count, int n, int64_t d_in, double ridge, float* v, void* scratch,
                  int32_t* status) {
  extern __shared__ __align__(16) unsigned char memory[];
  FactorShared& shared = *reinterpret_cast<FactorShared*>(memory);
  const Scratch part = parts_of(scratch, n, gridDim.x);
  const cg::grid_group grid = cg::this_grid();

  int bad = gram_share(k, p, n, d_in, shared, part.partial + int64_t(blockIdx.x) * n * n);
  for (int64_t e = int64_t(blockIdx.x) * threads + threadIdx.x; e < r_count; e += int64_t(gridDim.x) * threads)
    bad |= isfinite(r[e]) ? 0 : 4;
  const int any = (__syncthreads_or(bad & 1) ? 1 : 0) | (__syncthreads_or(bad & 2) ? 2 : 0) | (__syncthreads_or(bad & 4) ? 4 : 0);
  if (threadIdx.x == 0) part.bad[blockIdx.x] = any;
  grid.sync();

  // The partial sums are added up in the order of the blocks, each element by one thread: the same bits in every run.
  for (int e = blockIdx.x * threads + threadIdx.x; e < n * n; e += gridDim.x * threads) {
    double sum = e / n == e % n ? ridge : 0;
    for (int b = 0; b < gridDim.x; ++b) sum += part.partial[int64_t(b) * n * n + e];
    part.g[e] = sum;
  }
  int seen = 0;
  for (int b = threadIdx.x; b < gridDim.x; b += threads) seen |= part.bad[b];
  const int found = (__syncthreads_or(seen & 1) ? 1 : 0) | (__syncthreads_or(seen & 2) ? 2 : 0) | (__syncthreads_or(seen & 4) ? 4 : 0);
  grid.sync();

  if (found) {
    if (blockIdx.x == 0 && threadIdx.x == 0) *status = found & 1 ? -1 : found & 2 ? -2 : -3;
    return;
  }
  for (int e = threadIdx.x; e < n * n; e += threads) shared.g[e / n][e % n] = part.g[e];
  __syncthreads();
  const int minor = factorise(shared, n);
  if (blockIdx.x == 0 && threadIdx.x == 0) *status = minor;
  if (minor) return;
  for (int64_t first = int64_t(blockIdx.x) * right_sides; first < d_in; first += int64_t(gridDim.x) * right_sides) {
    __syncthreads();
    for (int e = threadIdx.x; e < n * right_sides; e += threads) {
      const int64_t column = first + e % right_sides;
      shared.x[e / right_sides][e % right_sides] = column < d_in ? double(p[e / right_sides * d_in + column]) : 0;
    }
    __syncthreads();
    solve_column(shared, n);
    __syncthreads();
    for (int e = threadIdx.x; e < n * right_sides; e += threads) {
      const int64_t column = first + e % right_sides;
      if (column < d_in) v[e / right_sides * d_in + column] = float(shared.x[e / right_sides][e % right_sides]);
    }
  }
}

// --- the write: one pass over W, 16 bytes a thread at a time ---

constexpr int tile_rows = 64, tile_columns = 128;  // of W, a block of 256 threads
constexpr int thread_rows = 4, thread_columns = 8;
constexpr int depth = 16;  // of n, in shared memory at a time

struct Batch {
  Write jobs[max_writes];
  int64_t tiles_before[max_writes + 1];
  int count;
};

// By name: the conversion operators are left out where torch compiles this file.
__device__ float widen(float x) { return x; }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float widen(__half x) { return __half2float(x); }

template <class T>
__device__ T narrow(float x);
template <>
__device__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}

// Eight weights side by side; `whole` says that they are inside the row and on a 16-byte boundary.
template <class T>
__device__ void read_row(const T* w, int64_t left, bool whole, float* x) {
  constexpr int words = thread_columns * sizeof(T) / 16;
  if (whole) {
    alignas(16) T values[thread_columns];
#pragma unroll
    for (int i = 0; i < words; ++i) reinterpret_cast<uint4*>(values)[i] = reinterpret_cast<const uint4*>(w)[i];
#pragma unroll
    for (int c = 0; c < thread_columns; ++c) x[c] = widen(values[c]);
  } else {
#pragma unroll
    for (int c = 0; c < thread_columns; ++c) x[c] = c < left ? widen(w[c]) : 0.f;
  }
}

template <class T>
__device__ void write_row(T* w, int64_t left, bool whole, const float* x) {
  constexpr int words = thread_columns * sizeof(T) / 16;
  if (whole) {
    alignas(16) T values[thread_columns];
#pragma unroll
    for (int c = 0; c < thread_columns; ++c) values[c] = narrow<T>(x[c]);
#pragma unroll
    for (int i = 0; i < words; ++i) reinterpret_cast<uint4*>(w)[i] = reinterpret_cast<uint4*>(values)[i];
  } else {
#pragma unroll
    for (int c = 0; c < thread_columns; ++c)
      if (c < left) w[c] = narrow<T>(x[c]);
  }
}

template <class T>
__global__ void __launch_bounds__(threads) write_kernel(const __grid_constant__ Batch batch, const int32_t* status) {
  if (status && *status) return;
  __shared__ __align__(16) float u[depth][tile_rows];
  __shared__ __align__(16) float v[depth][tile_columns];
  int which = 0;
  while (which + 1 < batch.count && int64_t(blockIdx.x) >= batch.tiles_before[which + 1]) ++which;
  const Write& job = batch.jobs[which];
  const int64_t tile = int64_t(blockIdx.x) - batch.tiles_before[which], across = (job.columns + tile_columns - 1) / tile_columns;
  const int64_t top = tile / across * tile_rows, first = tile % across * tile_columns;
  const int row = threadIdx.x / (tile_columns / thread_columns) * thread_rows;
  const int column = threadIdx.x % (tile_columns / thread_columns) * thread_columns;
  const int64_t left = job.columns - first - column;
  T* w = static_cast<T*>(job.w) + (top + row) * job.row_stride + first + column;
  const bool aligned = reinterpret_cast<uintptr_t>(job.w) % 16 == 0 && job.row_stride * sizeof(T) % 16 == 0;
  const bool whole = aligned && left >= thread_columns;

  float sum[thread_rows][thread_columns];
#pragma unroll
  for (int r = 0; r < thread_rows; ++r)
    if (top + row + r < job.rows) read_row(w + r * job.row_stride, left, whole, sum[r]);
  for (int64_t from = 0; from < job.n; from += depth) {
    for (int e = threadIdx.x; e < depth * tile_columns; e += threads) {
      const int64_t k = from + e / tile_columns, j = first + e % tile_columns;
      v[e / tile_columns][e % tile_columns] = k < job.n && j < job.columns ? job.v[k * job.columns + j] : 0.f;
    }
    for (int e = threadIdx.x; e < depth * tile_rows; e += threads) {
      const int64_t k = from + e % depth, i = top + e / depth;
      u[e % depth][e / depth] = k < job.n && i < job.rows ? job.u[i * job.u_row + k * job.u_column] : 0.f;
    }
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < depth; ++k) {
      float a[thread_rows], b[thread_columns];
#pragma unroll
      for (int r = 0; r < thread_rows; ++r) a[r] = u[k][row + r];
#pragma unroll
      for (int c = 0; c < thread_columns; ++c) b[c] = v[k][column + c];
#pragma unroll
      for (int r = 0; r < thread_rows; ++r)
#pragma unroll
        for (int c = 0; c < thread_columns; ++c) sum[r][c] = fmaf(a[r], b[c], sum[r][c]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < thread_rows; ++r)
    if (top + row + r < job.rows) write_row(w + r * job.row_stride, left, whole, sum[r]);
}

}  // namespace

int64_t factor_scratch_bytes(int64_t n, int blocks) { return (blocks + 1) * n * n * int64_t(sizeof(double)) + blocks * int64_t(sizeof(int32_t)); }

int factor_blocks() {
  int device = 0, processors = 0;
  if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return 0;
  return processors;
}

int factor(const float* k, const float* p, const float* r, int64_t r_count, int64_t n, int64_t d_in, double ridge, float* v, void* scratch,
           int blocks, int32_t* status, void* stream) {
  const int bytes = int(sizeof(FactorShared));
  if (const cudaError_t e = cudaFuncSetAttribute(factor_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return e;
  int order = int(n);
  void* arguments[] = {&k, &p, &r, &r_count, &order, &d_in, &ridge, &v, &scratch, &status};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(factor_kernel), dim3(blocks), dim3(threads), arguments, bytes,
                                     static_cast<cudaStream_t>(stream));
}

int add_low_rank(const Write* writes, int count, const int32_t* status, void* stream) {
  Batch batch{};
  for (int i = 0; i < count; ++i) {
    const Write& job = writes[i];
    batch.jobs[i] = job;
    batch.tiles_before[i + 1] =
        batch.tiles_before[i] + (job.rows + tile_rows - 1) / tile_rows * ((job.columns + tile_columns - 1) / tile_columns);
  }
  batch.count = count;
  const dim3 grid(unsigned(batch.tiles_before[count]));
  if (grid.x == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (writes[0].dtype) {
    case Float::f32: write_kernel<float><<<grid, threads, 0, on>>>(batch, status); break;
    case Float::bf16: write_kernel<__nv_bfloat16><<<grid, threads, 0, on>>>(batch, status); break;
    case Float::f16: write_kernel<__half><<<grid, threads, 0, on>>>(batch, status); break;
  }
  return cudaGetLastError();
}

}  // namespace rose::cuda
