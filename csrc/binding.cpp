// Joins the kernels to torch: `torch.ops.rose_native`. Arguments are checked in Python (rose_kernels/rank_update.py), which is the only
// caller; what is checked here is what Python cannot see. Nothing is written before every weight has been checked.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "rank_update.h"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#ifdef ROSE_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace {

using at::Tensor;

// Whether the process may write these bytes. The kernel answers a read() into memory that may not be written with an error
// where a store would end the process; the byte that is read is the byte that stands there.
bool writable(char* at) {
#if defined(__unix__) || defined(__APPLE__)
  int ends[2];
  if (pipe(ends) != 0) return true;
  const bool good = write(ends[1], at, 1) == 1 && read(ends[0], at, 1) == 1;
  close(ends[0]);
  close(ends[1]);
  return good;
#else
  return true;
#endif
}

rose::Float float_of(const Tensor& w) {
  switch (w.scalar_type()) {
    case at::kFloat: return rose::Float::f32;
    case at::kBFloat16: return rose::Float::bf16;
    case at::kHalf: return rose::Float::f16;
    default: TORCH_CHECK_VALUE(false, "W must be float32, bfloat16 or float16, given ", w.scalar_type());
  }
}

// W += U V, or, where W's rows and not its columns are apart by one, W^T += V^T U^T. `kept` holds what must outlive the job.
rose::Write write_of(const Tensor& w, const Tensor& u, const Tensor& v, std::vector<Tensor>& kept) {
  const bool turned = w.stride(1) != 1 && w.size(1) > 1;
  const Tensor left = turned ? v.t() : u, right = (turned ? u.t() : v).contiguous();
  kept.push_back(right);
  return {w.data_ptr(),     float_of(w),    left.size(0),          right.size(1),
          w.stride(turned), left.const_data_ptr<float>(), left.stride(0), left.stride(1), right.const_data_ptr<float>(), left.size(1)};
}

std::vector<rose::Write> writes_of(const std::vector<Tensor>& ws, const std::vector<Tensor>& us, const std::vector<Tensor>& vs,
                                   std::vector<Tensor>& kept) {
  std::vector<rose::Write> writes;
  for (size_t i = 0; i < ws.size(); ++i)
    if (ws[i].numel() && us[i].size(1)) writes.push_back(write_of(ws[i], us[i], vs[i], kept));
  return writes;
}

bool all_finite_cpu(const Tensor& x) { return rose::cpu::all_finite(x.const_data_ptr<float>(), x.numel()); }

Tensor gram_cpu(const Tensor& k, const Tensor& p) {
  Tensor g = at::empty({k.size(0), k.size(0)}, k.options().dtype(at::kDouble));
  rose::cpu::gram(k.const_data_ptr<float>(), p.const_data_ptr<float>(), k.size(0), k.size(1), g.data_ptr<double>());
  return g;
}

std::tuple<Tensor, int64_t> solve_cpu(Tensor g, const Tensor& p) {
  const int64_t minor = rose::cpu::cholesky(g.data_ptr<double>(), g.size(0));
  Tensor v = at::empty(p.sizes(), p.options());
  if (!minor) rose::cpu::solve(g.const_data_ptr<double>(), p.const_data_ptr<float>(), p.size(0), p.size(1), v.data_ptr<float>());
  return {v, minor};
}

void add_low_rank_cpu(std::vector<Tensor> ws, std::vector<Tensor> us, std::vector<Tensor> vs) {
  for (const Tensor& w : ws) {
    if (!w.numel()) continue;
    char* data = static_cast<char*>(w.data_ptr());
    const int64_t last = (w.size(0) - 1) * w.stride(0) + (w.size(1) - 1) * w.stride(1);
    TORCH_CHECK_VALUE(writable(data) && writable(data + last * w.element_size()), "W is in memory that may only be read; clone it first");
  }
  std::vector<Tensor> kept;
  const auto writes = writes_of(ws, us, vs, kept);
  rose::cpu::add_low_rank(writes.data(), int64_t(writes.size()));
}

#ifdef ROSE_CUDA
std::tuple<Tensor, Tensor> factor_cuda(const Tensor& k, const Tensor& p, const Tensor& r, double ridge) {
  const c10::cuda::CUDAGuard guard(k.device());
  const int blocks = rose::cuda::factor_blocks();
  const int64_t n = k.size(0);
  Tensor v = at::empty(p.sizes(), p.options()), status = at::empty({1}, p.options().dtype(at::kInt));
  Tensor scratch = at::empty({rose::cuda::factor_scratch_bytes(n, blocks)}, p.options().dtype(at::kByte));
  C10_CUDA_CHECK(static_cast<cudaError_t>(
      rose::cuda::factor(k.const_data_ptr<float>(), p.const_data_ptr<float>(), r.const_data_ptr<float>(), r.numel(), n, k.size(1), ridge,
                         v.data_ptr<float>(), scratch.data_ptr(), blocks, status.data_ptr<int32_t>(), c10::cuda::getCurrentCUDAStream())));
  return {v, status};
}

void add_low_rank_cuda(std::vector<Tensor> ws, std::vector<Tensor> us, std::vector<Tensor> vs, const std::optional<Tensor>& status) {
  if (ws.empty()) return;
  const c10::cuda::CUDAGuard guard(ws[0].device());
  std::vector<Tensor> kept;
  const auto writes = writes_of(ws, us, vs, kept);
  const int32_t* flag = status ? status->const_data_ptr<int32_t>() : nullptr;
  for (size_t first = 0; first < writes.size();) {  // one launch for a run of weights of one dtype
    size_t last = first;
    while (last < writes.size() && last - first < rose::cuda::max_writes && writes[last].dtype == writes[first].dtype) ++last;
    C10_CUDA_CHECK(static_cast<cudaError_t>(
        rose::cuda::add_low_rank(&writes[first], int(last - first), flag, c10::cuda::getCurrentCUDAStream())));
    first = last;
  }
}
#endif

}  // namespace

TORCH_LIBRARY(rose_native, m) {
  m.def("all_finite(Tensor x) -> bool");
  m.def("gram(Tensor k, Tensor p) -> Tensor");
  m.def("solve(Tensor(a!) g, Tensor p) -> (Tensor, int)");
  m.def("add_low_rank_(Tensor(a!)[] w, Tensor[] u, Tensor[] v, Tensor? status=None) -> ()");
#ifdef ROSE_CUDA
  m.def("factor(Tensor k, Tensor p, Tensor r, float ridge) -> (Tensor, Tensor)");
#endif
}

TORCH_LIBRARY_IMPL(rose_native, CPU, m) {
  m.impl("all_finite", all_finite_cpu);
  m.impl("gram", gram_cpu);
  m.impl("solve", solve_cpu);
  m.impl("add_low_rank_", [](std::vector<Tensor> w, std::vector<Tensor> u, std::vector<Tensor> v, const std::optional<Tensor>&) {
    add_low_rank_cpu(std::move(w), std::move(u), std::move(v));
  });
}

#ifdef ROSE_CUDA
TORCH_LIBRARY_IMPL(rose_native, CUDA, m) {
  m.impl("factor", factor_cuda);
  m.impl("add_low_rank_", add_low_rank_cuda);
}
#endif
