// Joins the parts of a decoder layer to torch, in `torch.ops.rose_native`. Their one caller is rose_kernels/layer.py, which checks shapes.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "layer.h"
#include "matmul.h"

namespace {

using at::Tensor;

rose::Float type_of(const Tensor& x) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "float32 or bfloat16 is needed, given ", x.scalar_type());
  return x.scalar_type() == at::kFloat ? rose::Float::f32 : rose::Float::bf16;
}

Tensor rms_norm(const Tensor& x, const Tensor& w, double eps) {
  Tensor y = at::empty_like(x, w.options());
  const int64_t width = x.size(-1);
  rose::cpu::rms_norm(x.const_data_ptr<float>(), w.const_data_ptr(), x.numel() / width, width, float(eps), type_of(w), y.data_ptr());
  return y;
}

void rms_norm_backward(Tensor grad, const Tensor& dy, const Tensor& x, const Tensor& w, double eps) {
  const int64_t width = x.size(-1);
  rose::cpu::rms_norm_backward(dy.const_data_ptr<float>(), x.const_data_ptr<float>(), w.const_data_ptr(), x.numel() / width, width, float(eps), type_of(w),
                               grad.data_ptr<float>());
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  Tensor y = at::empty_like(gate);
  rose::cpu::swiglu(gate.const_data_ptr(), up.const_data_ptr(), gate.numel(), type_of(gate), y.data_ptr());
  return y;
}

void swiglu_backward(const Tensor& dy, Tensor gate, Tensor up) {
  rose::cpu::swiglu_backward(dy.const_data_ptr(), gate.data_ptr(), up.data_ptr(), gate.numel(), type_of(gate));
}

void rotate(Tensor x, const Tensor& cosine, const Tensor& sine, bool backward) {
  rose::cpu::rotate(x.data_ptr(), cosine.const_data_ptr<float>(), sine.const_data_ptr<float>(), x.size(0), x.size(1), x.size(2), backward, type_of(x));
}

rose::cpu::Suffixes suffixes_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& past_k, const Tensor& past_v, const Tensor& start,
                                const Tensor& length, const Tensor& prefix, const Tensor& prefix_length, double scale) {
  return {q.const_data_ptr(),
          k.const_data_ptr(),
          v.const_data_ptr(),
          past_k.const_data_ptr(),
          past_v.const_data_ptr(),
          type_of(q),
          start.size(0),
          q.size(1),
          k.size(1),
          q.size(2),
          start.const_data_ptr<int64_t>(),
          length.const_data_ptr<int64_t>(),
          prefix.const_data_ptr<int64_t>(),
          prefix_length.const_data_ptr<int64_t>(),
          prefix.size(1),
          float(scale)};
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& past_k, const Tensor& past_v, const Tensor& start,
                 const Tensor& length, const Tensor& prefix, const Tensor& prefix_length, double scale) {
  Tensor out = at::empty_like(q);
  rose::cpu::attention(suffixes_of(q, k, v, past_k, past_v, start, length, prefix, prefix_length, scale), out.data_ptr());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& past_k,
                                                      const Tensor& past_v, const Tensor& start, const Tensor& length, const Tensor& prefix,
                                                      const Tensor& prefix_length, double scale) {
  Tensor dq = at::empty_like(q), dk = at::empty_like(k), dv = at::empty_like(v);
  rose::cpu::attention_backward(suffixes_of(q, k, v, past_k, past_v, start, length, prefix, prefix_length, scale), dout.const_data_ptr(),
                                dq.data_ptr(), dk.data_ptr(), dv.data_ptr());
  return {dq, dk, dv};
}

bool products_serve(const Tensor& w) {
  return (w.scalar_type() == at::kFloat || w.scalar_type() == at::kBFloat16) && rose::cpu::products_serve(type_of(w));
}

void products(const Tensor& a, std::vector<Tensor> ws, std::vector<Tensor> outs, bool turned, bool add, int64_t parts) {
  std::vector<rose::cpu::Product> jobs;
  for (size_t i = 0; i < ws.size(); ++i) jobs.push_back({ws[i].const_data_ptr(), outs[i].size(1), outs[i].data_ptr(), type_of(outs[i])});
  if (jobs.empty()) return;
  rose::cpu::products(a.const_data_ptr(), type_of(a), a.size(0), a.size(1), jobs.data(), int64_t(jobs.size()), type_of(ws[0]), turned, add,
                      parts);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rose_native, m) {
  m.def("products_serve(Tensor w) -> bool");
  m.def("products(Tensor a, Tensor[] w, Tensor(a!)[] out, bool turned, bool add, int parts) -> ()");
  m.def("rms_norm(Tensor x, Tensor w, float eps) -> Tensor");
  m.def("rms_norm_backward(Tensor(a!) grad, Tensor dy, Tensor x, Tensor w, float eps) -> ()");
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor dy, Tensor(a!) gate, Tensor(b!) up) -> ()");
  m.def("rotate(Tensor(a!) x, Tensor cosine, Tensor sine, bool backward) -> ()");
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor past_k, Tensor past_v, Tensor start, Tensor length, Tensor prefix, Tensor prefix_length, "
      "float scale) -> Tensor");
  m.def(
      "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor past_k, Tensor past_v, Tensor start, Tensor length, Tensor prefix, "
      "Tensor prefix_length, float scale) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(rose_native, CPU, m) {
  m.impl("products_serve", products_serve);
  m.impl("products", products);
  m.impl("rms_norm", rms_norm);
  m.impl("rms_norm_backward", rms_norm_backward);
  m.impl("swiglu", swiglu);
  m.impl("swiglu_backward", swiglu_backward);
  m.impl("rotate", rotate);
  m.impl("attention", attention);
  m.impl("attention_backward", attention_backward);
}
