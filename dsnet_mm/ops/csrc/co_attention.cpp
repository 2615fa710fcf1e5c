// dsnet_mm::co_attention and its backward: schemas and checks. MMCV's registry chooses
// the implementation of the device.
//
//   h_L = softmax(Q_L K_G^T / sqrt(d)) V_G
//   h_G = softmax(Q_G K_L^T / sqrt(d)) V_L

#include "co_attention.h"

#include <Python.h>
#include <torch/library.h>

namespace dsnet {

void check_attention(const char* name, const Tensor& local_qkv,
                     const Tensor& global_qkv, const Tensor& seed, int64_t num_heads,
                     double dropout_p) {
  TORCH_CHECK(local_qkv.dim() == 3 && global_qkv.dim() == 3 &&
                  local_qkv.size(0) == global_qkv.size(0) &&
                  local_qkv.size(2) == global_qkv.size(2) && num_heads > 0 &&
                  local_qkv.size(2) > 0 && local_qkv.size(2) % 3 == 0 &&
                  local_qkv.size(2) / 3 % num_heads == 0 && local_qkv.size(1) > 0 &&
                  global_qkv.size(1) > 0,
              name, " takes projections (N, L, 3 * C) and, of a second stream, ",
              "(N, G, 3 * C) with C a multiple of num_heads=", num_heads, ", got ",
              local_qkv.sizes(), " and ", global_qkv.sizes());
  TORCH_CHECK(local_qkv.scalar_type() == global_qkv.scalar_type(), name,
              " takes one dtype, got ", local_qkv.scalar_type(), " and ",
              global_qkv.scalar_type());
  TORCH_CHECK(0 <= dropout_p && dropout_p < 1, name,
              " takes a dropout_p in [0, 1), got ", dropout_p);
  TORCH_CHECK(seed.scalar_type() == at::kLong && seed.numel() == 1, name,
              " takes one int64 number as its seed, got ", seed.scalar_type(),
              " of shape ", seed.sizes());
}

Outputs co_attention(const Tensor& local_qkv, const Tensor& global_qkv,
                     const Tensor& seed, int64_t num_heads, double dropout_p) {
  check_attention("co_attention", local_qkv, global_qkv, seed, num_heads, dropout_p);
  return DISPATCH_DEVICE_IMPL(co_attention, with_rows(local_qkv), with_rows(global_qkv),
                              seed, num_heads, dropout_p);
}

Gradients co_attention_backward(const Tensor& grad_local, const Tensor& grad_global,
                                const Tensor& local_qkv, const Tensor& global_qkv,
                                const Tensor& local_out, const Tensor& global_out,
                                const Tensor& local_lse, const Tensor& global_lse,
                                const Tensor& seed, int64_t num_heads,
                                double dropout_p) {
  check_attention("co_attention_backward", local_qkv, global_qkv, seed, num_heads,
                  dropout_p);
  TORCH_CHECK(is_output(grad_local, local_qkv) && is_output(local_out, local_qkv) &&
                  is_output(grad_global, global_qkv) &&
                  is_output(global_out, global_qkv) &&
                  is_lse(local_lse, local_qkv, num_heads) &&
                  is_lse(global_lse, global_qkv, num_heads),
              "co_attention_backward takes what co_attention returned and gradients "
              "of its first two outputs");
  return DISPATCH_DEVICE_IMPL(co_attention_backward, with_rows(grad_local),
                              with_rows(grad_global), with_rows(local_qkv),
                              with_rows(global_qkv), with_rows(local_out),
                              with_rows(global_out), local_lse.contiguous(),
                              global_lse.contiguous(), seed, num_heads, dropout_p);
}

TORCH_LIBRARY(dsnet_mm, m) {
  m.def(
      "co_attention(Tensor local_qkv, Tensor global_qkv, Tensor seed, int num_heads, "
      "float dropout_p) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "co_attention_backward(Tensor grad_local, Tensor grad_global, "
      "Tensor local_qkv, Tensor global_qkv, Tensor local_out, Tensor global_out, "
      "Tensor local_lse, Tensor global_lse, Tensor seed, int num_heads, "
      "float dropout_p) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(dsnet_mm, CPU, m) {
  m.impl("co_attention", co_attention);
  m.impl("co_attention_backward", co_attention_backward);
}

#ifdef MMCV_WITH_CUDA
TORCH_LIBRARY_IMPL(dsnet_mm, CUDA, m) {
  m.impl("co_attention", co_attention);
  m.impl("co_attention_backward", co_attention_backward);
}
#endif

}  // namespace dsnet

// ``import dsnet_mm.ops._C`` loads the registrations above; there is no more.
extern "C" PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
