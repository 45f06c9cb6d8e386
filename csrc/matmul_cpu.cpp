#include "matmul.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "vector.h"

// The names of these instruction sets are known to GCC from 12 on; elsewhere PyTorch's products serve.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#include <cpuid.h>
#include <immintrin.h>
#define ROSE_AVX512 __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
#define ROSE_AVX512_BF16 __attribute__((target("arch=x86-64-v4,avx512bf16,prefer-vector-width=512")))

namespace rose::cpu {
namespace {

// A step is 32 bits of depth: one float32, or two bfloat16 that one instruction multiplies and adds.
constexpr int64_t tile_rows = 12, tile_vectors = 2, panel = 16 * tile_vectors;
constexpr int64_t most_steps = 192;  // 24 KiB of a panel stay in a first-level cache; sums of blocks keep rounding errors small
typedef uint32_t Tile16[16];

// Where sums may go on in the output, a depth such as a vocabulary's is cut into segments, so that the packed rows stay in cache. An MLP's is
// not: what a process sums of a part of it has to be what another sums that holds this part alone.
constexpr int64_t most_segment = 6144, most_whole = 16384;

// A segment's depth is cut into blocks of one length.
int64_t block_of(int64_t steps) {
  const int64_t blocks = (steps + most_steps - 1) / most_steps;
  return ((steps + blocks - 1) / blocks + 15) / 16 * 16;
}

int64_t tiles(int64_t rows) { return (rows + tile_rows - 1) / tile_rows; }

struct Job {
  const char* a;               // packed: [tiles(rows)][steps][tile_rows] of 32 bits
  int64_t rows, steps, block;
  int64_t first, all_steps;    // these steps are first .. first + steps - 1 of the weights' all_steps
  Float dtype;
  bool turned, add;
};

// A part of one product that one thread computes: a panel of columns, some tiles of rows.
struct Task {
  const Product* product;
  int64_t column, first_tile, last_tile;
};

// 16 rows of 16 words become columns: out[c * panel + r] = in[r][c].
ROSE_AVX512 void turn_block(const uint32_t* const* in, int64_t at, uint32_t* out) {
  __m512i x[16], y[16];
  for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_si512(in[i] + at);
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_si512(out + i * panel, _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88));
    _mm512_storeu_si512(out + (i + 8) * panel, _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd));
  }
}

// Words `from` .. `from + steps` of the rows of a turned weight [columns, depth] as a panel [steps, 32]; columns past the last are zero.
ROSE_AVX512 void pack_turned(const uint32_t* w, int64_t row_words, int64_t columns, int64_t from, int64_t steps, uint32_t* out) {
  static const uint32_t nothing[16] = {};
  for (int64_t c = 0; c < panel; c += 16)
    for (int64_t s = 0; s < steps; s += 16) {
      const uint32_t* rows[16];
      const bool whole = s + 16 <= steps && c + 16 <= columns;
      if (whole) {
        for (int i = 0; i < 16; ++i) rows[i] = w + (c + i) * row_words;
        turn_block(rows, from + s, out + s * panel + c);
        continue;
      }
      uint32_t spare[16 * panel];
      Tile16 some[16] = {};
      const int64_t count = std::min<int64_t>(16, steps - s);
      for (int i = 0; i < 16; ++i) {
        if (c + i < columns) std::copy_n(w + (c + i) * row_words + from + s, count, some[i]);
        rows[i] = c + i < columns ? some[i] : nothing;
      }
      turn_block(rows, 0, spare);
      for (int64_t k = 0; k < count; ++k) std::copy_n(spare + k * panel, 16, out + (s + k) * panel + c);
    }
}

// Steps `from` and on of a weight [depth, columns] as a panel [steps, 32].
ROSE_AVX512 void pack_straight(const void* w, int64_t row_elements, int64_t columns, int64_t from, int64_t steps, Float dtype, uint32_t* out) {
  const int64_t count = std::min(panel, columns);
  if (count < panel) std::fill_n(out, steps * panel, 0u);
  for (int64_t s = 0; s < steps; ++s, out += panel) {
    if (dtype == Float::f32) {
      std::memcpy(out, static_cast<const float*>(w) + (from + s) * row_elements, count * sizeof(float));
      continue;
    }
    const uint16_t *low = static_cast<const uint16_t*>(w) + 2 * (from + s) * row_elements, *high = low + row_elements;
    for (int64_t c = 0; c < count; c += 16) {
      const u32x16 x = __builtin_convertvector(load<u16x16>(low + c), u32x16), y = __builtin_convertvector(load<u16x16>(high + c), u32x16);
      store(out + c, x | (y << 16));
    }
  }
}

// Rows `top` .. `top + tile_rows` of a [rows, depth], steps `first` and on, as [steps][tile_rows] words; rows past the last are zero.
ROSE_AVX512 void pack_tile(const void* a, Float a_dtype, int64_t rows, int64_t depth, int64_t top, int64_t first, int64_t steps, Float dtype,
                           uint32_t* out, uint32_t* row) {
  const int64_t per_step = dtype == Float::f32 ? 1 : 2;
  for (int64_t r = 0; r < tile_rows; ++r) {
    if (top + r >= rows) {
      for (int64_t s = 0; s < steps; ++s) out[s * tile_rows + r] = 0;
      continue;
    }
    const uint32_t* words = row;
    const int64_t at = (top + r) * depth + first * per_step;
    if (a_dtype == dtype) {
      words = reinterpret_cast<const uint32_t*>(static_cast<const char*>(a) + at * (dtype == Float::f32 ? 4 : 2));
    } else {
      const float* x = static_cast<const float*>(a) + at;
      for (int64_t i = 0; i < steps * per_step; i += 16) BF16::narrow(reinterpret_cast<uint16_t*>(row) + i, load<f32x16>(x + i));
    }
    for (int64_t s = 0; s < steps; ++s) out[s * tile_rows + r] = words[s];
  }
}

// c [tile_rows, 32] = (fresh ? 0 : c) + (the sum over steps of a[s][r] * b[s][..))
ROSE_AVX512 void tile_f32(const float* a, const float* b, int64_t steps, bool fresh, float* c) {
  f32x16 acc[tile_rows][tile_vectors] = {};
  for (int64_t s = 0; s < steps; ++s) {
    f32x16 y[tile_vectors];
#pragma GCC unroll 2
    for (int v = 0; v < tile_vectors; ++v) y[v] = load<f32x16>(b + s * panel + 16 * v);
#pragma GCC unroll 12
    for (int r = 0; r < tile_rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < tile_vectors; ++v) acc[r][v] += a[s * tile_rows + r] * y[v];
  }
#pragma GCC unroll 12
  for (int r = 0; r < tile_rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < tile_vectors; ++v) {
      float* to = c + r * panel + 16 * v;
      store(to, fresh ? acc[r][v] : load<f32x16>(to) + acc[r][v]);
    }
}

ROSE_AVX512_BF16 void tile_bf16(const uint32_t* a, const uint32_t* b, int64_t steps, bool fresh, float* c) {
  __m512 acc[tile_rows][tile_vectors];
#pragma GCC unroll 12
  for (int r = 0; r < tile_rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < tile_vectors; ++v) acc[r][v] = _mm512_setzero_ps();
  for (int64_t s = 0; s < steps; ++s) {
    __m512i y[tile_vectors];
#pragma GCC unroll 2
    for (int v = 0; v < tile_vectors; ++v) y[v] = _mm512_loadu_si512(b + s * panel + 16 * v);
#pragma GCC unroll 12
    for (int r = 0; r < tile_rows; ++r) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(int(a[s * tile_rows + r]));
#pragma GCC unroll 2
      for (int v = 0; v < tile_vectors; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], x, (__m512bh)y[v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < tile_rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < tile_vectors; ++v) {
      float* to = c + r * panel + 16 * v;
      _mm512_storeu_ps(to, fresh ? acc[r][v] : _mm512_add_ps(_mm512_loadu_ps(to), acc[r][v]));
    }
}

// One row of a panel to where it belongs.
ROSE_AVX512 void put_row(const float* c, int64_t count, void* out, Float dtype, bool add) {
  for (int64_t i = 0; i < count; i += 16) {
    f32x16 x = load<f32x16>(c + i);
    if (dtype == Float::f32) {
      float* to = static_cast<float*>(out) + i;
      store(to, add ? load<f32x16>(to) + x : x);
    } else {
      uint16_t* to = static_cast<uint16_t*>(out) + i;
      BF16::narrow(to, add ? BF16::widen(to) + x : x);
    }
  }
}

// Memory that a panel will be packed from: `lines` rows of `bytes`, `stride` bytes apart. fetch(i, n) asks for the i-th of n parts of it.
struct Source {
  const char* at = nullptr;
  int64_t lines = 0, bytes = 0, stride = 0;

  void fetch(int64_t part, int64_t parts) const {
    for (int64_t line = lines * part / parts; line < lines * (part + 1) / parts; ++line)
      for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(at + line * stride + b, 0, 2);
  }
};

Source source_of(const Job& job, const Task& task, int64_t from) {
  const int64_t size = job.dtype == Float::f32 ? 4 : 2, per_step = job.dtype == Float::f32 ? 1 : 2;
  const int64_t steps = std::min(job.block, job.steps - from), columns = std::min(panel, task.product->columns - task.column);
  const char* w = static_cast<const char*>(task.product->w);
  from += job.first;
  if (job.turned) return {w + (task.column * job.all_steps + from) * 4, columns, steps * 4, job.all_steps * 4};
  const int64_t row = task.product->columns * size;
  return {w + from * per_step * row + task.column * size, steps * per_step, columns * size, row};
}

// Memory of a thread that stays for the next call; a system call for each product's few hundred KiB costs more than a small product.
template <class T>
T* kept(int64_t count, int which) {
  static thread_local std::vector<T> buffers[2];
  if (int64_t(buffers[which].size()) < count) buffers[which].resize(count);
  return buffers[which].data();
}

void run(const Job& job, const Task& task, const Task* next, uint32_t* b, float* c) {
  const int64_t count = std::min(panel, task.product->columns - task.column), row_elements = task.product->columns;
  for (int64_t from = 0; from < job.steps; from += job.block) {
    const int64_t steps = std::min(job.block, job.steps - from);
    if (job.turned)
      pack_turned(reinterpret_cast<const uint32_t*>(task.product->w) + task.column * job.all_steps, job.all_steps, count,
                  job.first + from, steps, b);
    else if (job.dtype == Float::f32)
      pack_straight(static_cast<const float*>(task.product->w) + task.column, row_elements, count, job.first + from, steps, job.dtype, b);
    else
      pack_straight(static_cast<const uint16_t*>(task.product->w) + task.column, row_elements, count, job.first + from, steps, job.dtype, b);
    Source source;
    if (from + job.block < job.steps)
      source = source_of(job, task, from + job.block);
    else if (next)
      source = source_of(job, *next, 0);
    for (int64_t t = task.first_tile; t < task.last_tile; ++t) {
      source.fetch(t - task.first_tile, task.last_tile - task.first_tile);
      const char* a = job.a + (t * job.steps + from) * tile_rows * 4;
      float* to = c + (t - task.first_tile) * tile_rows * panel;
      if (job.dtype == Float::f32)
        tile_f32(reinterpret_cast<const float*>(a), reinterpret_cast<const float*>(b), steps, from == 0, to);
      else
        tile_bf16(reinterpret_cast<const uint32_t*>(a), b, steps, from == 0, to);
    }
  }
  const int64_t size = task.product->out_dtype == Float::f32 ? 4 : 2;
  for (int64_t row = task.first_tile * tile_rows; row < std::min(task.last_tile * tile_rows, job.rows); ++row)
    put_row(c + (row - task.first_tile * tile_rows) * panel, count,
            static_cast<char*>(task.product->out) + (row * task.product->columns + task.column) * size, task.product->out_dtype, job.add);
}

// Every thread's tasks: whole panels in turn, and what is left over shared out by rows. Meant for few threads: each part packs its panel.
std::vector<std::vector<Task>> share(const Product* jobs, int64_t count, int64_t rows, int64_t threads) {
  std::vector<Task> panels;
  for (int64_t j = 0; j < count; ++j)
    for (int64_t column = 0; column < jobs[j].columns; column += panel) panels.push_back({&jobs[j], column, 0, tiles(rows)});
  std::vector<std::vector<Task>> shares(threads);
  const int64_t whole = int64_t(panels.size()) / threads * threads, parts = std::min(threads, tiles(rows));
  for (int64_t p = 0; p < whole; ++p) shares[p * threads / whole].push_back(panels[p]);
  for (int64_t p = whole; p < int64_t(panels.size()); ++p)
    for (int64_t i = 0; i < parts; ++i)
      shares[i].push_back({panels[p].product, panels[p].column, tiles(rows) * i / parts, tiles(rows) * (i + 1) / parts});
  return shares;
}

}  // namespace

bool products_serve(Float dtype) {
  static const bool f32 = __builtin_cpu_supports("x86-64-v4");
  static const bool bf16 = [] {
    unsigned a, b, c, d;
    const bool amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);  // AMX-BF16
    return f32 && __builtin_cpu_supports("avx512bf16") && !amx;
  }();
  return dtype == Float::f32 ? f32 : dtype == Float::bf16 && bf16;
}

void products(const void* a, Float a_dtype, int64_t rows, int64_t depth, const Product* jobs, int64_t count, Float dtype, bool turned, bool add,
              int64_t parts) {
  if (!rows) return;
  const int64_t all_steps = dtype == Float::f32 ? depth : depth / 2, threads = std::max<int64_t>(1, at::get_num_threads());
  const bool wide = std::all_of(jobs, jobs + count, [](const Product& job) { return job.out_dtype == Float::f32; });
  const int64_t part = wide && all_steps % (16 * parts) == 0 ? all_steps / parts : all_steps;
  const int64_t segment = wide && part > most_whole ? most_segment : part;
  const auto shares = share(jobs, count, rows, threads);
  for (int64_t first = 0, steps; first < all_steps; first += steps) {
    steps = std::min(segment, part - first % part);
    uint32_t* packed = kept<uint32_t>(tiles(rows) * steps * tile_rows, 0);
    at::parallel_for(0, tiles(rows), 2, [&](int64_t begin, int64_t end) {
      uint32_t* row = kept<uint32_t>(steps, 1);
      for (int64_t t = begin; t < end; ++t)
        pack_tile(a, a_dtype, rows, depth, t * tile_rows, first, steps, dtype, packed + t * steps * tile_rows, row);
    });
    const Job job{reinterpret_cast<const char*>(packed), rows, steps, block_of(steps), first, all_steps, dtype, turned, add || first};
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      uint32_t* b = kept<uint32_t>(job.block * panel, 1);
      float* c = kept<float>(tiles(rows) * tile_rows * panel, 0);
      for (int64_t thread = begin; thread < end; ++thread)
        for (size_t i = 0; i < shares[thread].size(); ++i)
          run(job, shares[thread][i], i + 1 < shares[thread].size() ? &shares[thread][i + 1] : nullptr, b, c);
    });
  }
}

}  // namespace rose::cpu

#else

namespace rose::cpu {
bool products_serve(Float) { return false; }
void products(const void*, Float, int64_t, int64_t, const Product*, int64_t, Float, bool, bool, int64_t) {}
}  // namespace rose::cpu

#endif
