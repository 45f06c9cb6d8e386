// CPU kernels of the fused weight write. No sum depends on the number of threads: an element is always added up by one thread in one order.
#include "rank_update.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "vector.h"

namespace rose::cpu {
namespace {

ROSE_INLINE f64x8 load_wide(const float* x) { return __builtin_convertvector(load<f32x8>(x), f64x8); }
ROSE_INLINE f64x8 load_wide(const double* x) { return load<f64x8>(x); }

// --- sums of products in float64: the Gram matrix and the Cholesky factorisation ---

constexpr int64_t tile = 4;      // a tile of dot products is tile x tile
constexpr int64_t block = 64;    // a task's rows and columns of a Gram matrix, and the Cholesky panel
constexpr int64_t chunk = 1024;  // how much of d_in a task keeps in cache

// out[i * out_row + j] += sign * <a_i, b_j> over `length` elements; a_i = a[i] and b_j = b[j] for 4 rows each.
template <class T>
ROSE_INLINE void dots(const T* const* a, const T* const* b, int64_t length, double sign, double* out) {
  f64x8 sum[tile][tile] = {};
  int64_t t = 0;
  for (; t + 8 <= length; t += 8) {
    f64x8 x[tile];
#pragma GCC unroll 4
    for (int i = 0; i < tile; ++i) x[i] = load_wide(a[i] + t);
#pragma GCC unroll 4
    for (int j = 0; j < tile; ++j) {
      const f64x8 y = load_wide(b[j] + t);
#pragma GCC unroll 4
      for (int i = 0; i < tile; ++i) sum[i][j] += x[i] * y;
    }
  }
  for (int i = 0; i < tile; ++i)
    for (int j = 0; j < tile; ++j) {
      double s = 0;
      for (int l = 0; l < 8; ++l) s += sum[i][j][l];
      for (int64_t l = t; l < length; ++l) s += double(a[i][l]) * double(b[j][l]);
      out[i * tile + j] += sign * s;
    }
}

ROSE_CLONES void dots_f32(const float* const* a, const float* const* b, int64_t length, double sign, double* out) {
  dots(a, b, length, sign, out);
}
ROSE_CLONES void dots_f64(const double* const* a, const double* const* b, int64_t length, double sign, double* out) {
  dots(a, b, length, sign, out);
}

// Pointers to four rows from `first` on; rows past `end` repeat the last one, and their results are dropped.
template <class T>
void rows_of(const T* x, int64_t first, int64_t end, int64_t stride, const T** rows) {
  for (int i = 0; i < tile; ++i) rows[i] = x + std::min(first + i, end - 1) * stride;
}

// --- triangular solves, 32 right-hand sides at a time ---

constexpr int64_t width = 32;

typedef f64x8 Line[width / 8];  // a row of the right-hand sides

// x [n, width]: x = L^-1 x, then x = L^-T x. Four rows of x are in registers while the known ones go by.
ROSE_CLONES void solve_columns(const double* l, int64_t n, double* x) {
  constexpr int vectors = width / 8;
  for (int64_t i = 0; i < n; i += tile) {
    const int rows = int(std::min(tile, n - i));
    const double* a[tile];
    rows_of(l, i, n, n, a);
    Line sum[tile] = {};
    for (int64_t k = 0; k < i; ++k) {
      Line known;
#pragma GCC unroll 4
      for (int c = 0; c < vectors; ++c) known[c] = load<f64x8>(x + k * width + 8 * c);
#pragma GCC unroll 4
      for (int r = 0; r < tile; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < vectors; ++c) sum[r][c] += a[r][k] * known[c];
    }
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < vectors; ++c) {
        f64x8 y = load<f64x8>(x + (i + r) * width + 8 * c) - sum[r][c];
        for (int k = 0; k < r; ++k) y -= a[r][i + k] * load<f64x8>(x + (i + k) * width + 8 * c);
        store(x + (i + r) * width + 8 * c, y / a[r][i + r]);
      }
  }
  for (int64_t i = (n - 1) / tile * tile; i >= 0; i -= tile) {
    const int rows = int(std::min(tile, n - i));
    Line sum[tile] = {};
    for (int64_t k = i + rows; k < n; ++k) {
      Line known;
#pragma GCC unroll 4
      for (int c = 0; c < vectors; ++c) known[c] = load<f64x8>(x + k * width + 8 * c);
#pragma GCC unroll 4
      for (int r = 0; r < tile; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < vectors; ++c) sum[r][c] += l[k * n + i + r] * known[c];  // l[k][i + r] exists: k > i + r
    }
    for (int r = rows - 1; r >= 0; --r)
      for (int c = 0; c < vectors; ++c) {
        f64x8 y = load<f64x8>(x + (i + r) * width + 8 * c) - sum[r][c];
        for (int k = r + 1; k < rows; ++k) y -= l[(i + k) * n + i + r] * load<f64x8>(x + (i + k) * width + 8 * c);
        store(x + (i + r) * width + 8 * c, y / l[(i + r) * n + i + r]);
      }
  }
}

// --- the write ---

constexpr int panel_rows = 6;              // rows of W in registers,
constexpr int panel_vectors = 4;           // times 4 vectors of columns: 24 accumulators
constexpr int panel = 16 * panel_vectors;  // columns
constexpr int64_t cached_bytes = 256 << 10;  // of V, packed, that stays in a core's cache while rows go by
constexpr int64_t task_rows = 504;         // a multiple of panel_rows

// w[r][0 .. panel) += sum over k of u[k * panel_rows + r] * v[k * panel ..)
template <class Type>
ROSE_INLINE void add_panel(typename Type::type* const* w, const float* u, const float* v, int64_t n) {
  f32x16 sum[panel_rows][panel_vectors];
#pragma GCC unroll 6
  for (int r = 0; r < panel_rows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < panel_vectors; ++c) sum[r][c] = Type::widen(w[r] + 16 * c);
  for (int64_t k = 0; k < n; ++k) {
    f32x16 y[panel_vectors];
#pragma GCC unroll 4
    for (int c = 0; c < panel_vectors; ++c) y[c] = load<f32x16>(v + k * panel + 16 * c);
#pragma GCC unroll 6
    for (int r = 0; r < panel_rows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < panel_vectors; ++c) sum[r][c] += u[k * panel_rows + r] * y[c];
  }
#pragma GCC unroll 6
  for (int r = 0; r < panel_rows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < panel_vectors; ++c) Type::narrow(w[r] + 16 * c, sum[r][c]);
}

// `panels` panels side by side in the same rows.
template <class Type>
ROSE_INLINE void add_panels(typename Type::type* const* w, const float* u, const float* v, int64_t n, int64_t panels) {
  for (int64_t p = 0; p < panels; ++p) {
    typename Type::type* at[panel_rows];
    for (int r = 0; r < panel_rows; ++r) at[r] = w[r] + p * panel;
    add_panel<Type>(at, u, v + p * n * panel, n);
  }
}

ROSE_CLONES void add_panels_f32(float* const* w, const float* u, const float* v, int64_t n, int64_t panels) {
  add_panels<F32>(w, u, v, n, panels);
}
ROSE_CLONES void add_panels_bf16(uint16_t* const* w, const float* u, const float* v, int64_t n, int64_t panels) {
  add_panels<BF16>(w, u, v, n, panels);
}
ROSE_CLONES void add_panels_f16(float16* const* w, const float* u, const float* v, int64_t n, int64_t panels) {
  add_panels<F16>(w, u, v, n, panels);
}

// The columns [first, last) of the rows [top, bottom) of one weight; v is packed, u is packed here, a group of rows at a time.
template <class T>
void write_task(const Write& job, int64_t top, int64_t bottom, int64_t first, int64_t last,
                void (*add)(T* const*, const float*, const float*, int64_t, int64_t)) {
  const int64_t n = job.n, panels = (last - first + panel - 1) / panel, whole = (last - first) / panel;
  std::vector<float> v(panels * n * panel), u(n * panel_rows);
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t column = first + p * panel, count = std::min<int64_t>(panel, last - column);
    for (int64_t k = 0; k < n; ++k) std::memcpy(&v[(p * n + k) * panel], job.v + k * job.columns + column, count * sizeof(float));
  }
  T* base = static_cast<T*>(job.w);
  T spare[panel_rows][panel] = {};
  for (int64_t row = top; row < bottom; row += panel_rows) {
    const int rows = int(std::min<int64_t>(panel_rows, bottom - row));
    for (int r = 0; r < rows; ++r)
      for (int64_t k = 0; k < n; ++k) u[k * panel_rows + r] = job.u[(row + r) * job.u_row + k * job.u_column];
    T *w[panel_rows], *at[panel_rows];
    for (int r = 0; r < rows; ++r) w[r] = base + (row + r) * job.row_stride + first;
    if (rows == panel_rows) {
      add(w, u.data(), v.data(), n, whole);
      if (whole == panels) continue;
    }
    // The last columns, or the last rows, go through a spare panel.
    for (int64_t p = rows == panel_rows ? whole : 0; p < panels; ++p) {
      const int64_t count = std::min<int64_t>(panel, last - first - p * panel);
      for (int r = 0; r < panel_rows; ++r) {
        at[r] = spare[r];
        if (r < rows) std::memcpy(spare[r], w[r] + p * panel, count * sizeof(T));
      }
      add(at, u.data(), &v[p * n * panel], n, 1);
      for (int r = 0; r < rows; ++r) std::memcpy(w[r] + p * panel, spare[r], count * sizeof(T));
    }
  }
}

ROSE_CLONES bool finite(const float* x, int64_t count) {
  uint32_t bad = 0;
#pragma omp simd reduction(| : bad)
  for (int64_t i = 0; i < count; ++i) {
    uint32_t b;
    std::memcpy(&b, x + i, sizeof b);
    bad |= (b & 0x7f800000u) == 0x7f800000u;
  }
  return bad == 0;
}

}  // namespace

bool all_finite(const float* x, int64_t count) { return finite(x, count); }

void gram(const float* k, const float* p, int64_t n, int64_t d_in, double* g) {
  const int64_t blocks = (n + block - 1) / block;
  // Small systems have fewer blocks than there are threads: they are cut down to single tiles.
  const int64_t side = blocks > 4 ? block : tile, across = (n + side - 1) / side;
  at::parallel_for(0, across * across, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t top = task / across * side, left = task % across * side;
      if (left > top) continue;
      const int64_t bottom = std::min(top + side, n), right = std::min(left + side, n);
      std::vector<double> sums(side * side, 0.0);
      for (int64_t from = 0; from < d_in; from += chunk) {
        const int64_t length = std::min(chunk, d_in - from);
        for (int64_t i = top; i < bottom; i += tile)
          for (int64_t j = left; j < right; j += tile) {
            const float *a[tile], *b[tile];
            rows_of(k + from, i, n, d_in, a);
            rows_of(p + from, j, n, d_in, b);
            dots_f32(a, b, length, 1.0, &sums[((i - top) / tile * (side / tile) + (j - left) / tile) * tile * tile]);
          }
      }
      for (int64_t i = top; i < bottom; ++i)
        for (int64_t j = left; j < right; ++j)
          g[i * n + j] = sums[(((i - top) / tile * (side / tile) + (j - left) / tile) * tile + (i - top) % tile) * tile + (j - left) % tile];
    }
  });
}

int64_t cholesky(double* g, int64_t n) {
  for (int64_t left = 0; left < n; left += block) {
    const int64_t right = std::min(left + block, n);
    // What the columns before `left` take away from these; rows of the factor are contiguous.
    const int64_t groups = left ? (n - left + tile - 1) / tile : 0;
    at::parallel_for(0, groups, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = left + begin * tile; i < std::min(left + end * tile, n); i += tile)
        for (int64_t j = left; j < std::min(right, i + tile); j += tile) {
          const double *a[tile], *b[tile];
          rows_of(g, i, n, n, a);
          rows_of(g, j, n, n, b);
          double taken[tile * tile] = {};
          dots_f64(a, b, left, -1.0, taken);
          for (int r = 0; r < tile && i + r < n; ++r)
            for (int c = 0; c < tile && j + c < right; ++c) g[(i + r) * n + j + c] += taken[r * tile + c];
        }
    });
    const auto eliminate = [&](int64_t i, int64_t until) {
      double* row = g + i * n;
      for (int64_t j = left; j < until; ++j) {
        double s = row[j];
        for (int64_t k = left; k < j; ++k) s -= row[k] * g[j * n + k];
        row[j] = s / g[j * n + j];
      }
    };
    for (int64_t i = left; i < right; ++i) {
      eliminate(i, i);
      double pivot = g[i * n + i];
      for (int64_t k = left; k < i; ++k) pivot -= g[i * n + k] * g[i * n + k];
      if (!(pivot > 0) || !std::isfinite(pivot)) return i + 1;
      g[i * n + i] = std::sqrt(pivot);
    }
    at::parallel_for(right, n, 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) eliminate(i, right);
    });
  }
  return 0;
}

void solve(const double* l, const float* p, int64_t n, int64_t d_in, float* v) {
  at::parallel_for(0, (d_in + width - 1) / width, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> x(n * width, 0.0);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * width, count = std::min(width, d_in - first);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < count; ++c) x[i * width + c] = p[i * d_in + first + c];
      solve_columns(l, n, x.data());
      for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < count; ++c) v[i * d_in + first + c] = float(x[i * width + c]);
    }
  });
}

void add_low_rank(const Write* writes, int64_t count) {
  struct Task {
    const Write* job;
    int64_t top, left, columns;
  };
  std::vector<Task> tasks;
  for (const Write* job = writes; job < writes + count; ++job) {
    // As many columns as V's part of them fits in cache, but enough tasks for every thread to have several.
    const int64_t fits = cached_bytes / (int64_t(sizeof(float)) * std::max<int64_t>(job->n, 1)) / panel * panel;
    const int64_t shared = (job->columns / (4 * at::get_num_threads()) + panel - 1) / panel * panel;
    const int64_t columns = std::max<int64_t>(std::min(fits, shared), panel);
    for (int64_t left = 0; left < job->columns; left += columns)
      for (int64_t top = 0; top < job->rows; top += task_rows) tasks.push_back({job, top, left, columns});
  }
  at::parallel_for(0, int64_t(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const auto& [job, top, left, columns] = tasks[t];
      const int64_t bottom = std::min(top + task_rows, job->rows), right = std::min(left + columns, job->columns);
      switch (job->dtype) {
        case Float::f32: write_task<float>(*job, top, bottom, left, right, add_panels_f32); break;
        case Float::bf16: write_task<uint16_t>(*job, top, bottom, left, right, add_panels_bf16); break;
        case Float::f16: write_task<float16>(*job, top, bottom, left, right, add_panels_f16); break;
      }
    }
  });
}

}  // namespace rose::cpu
