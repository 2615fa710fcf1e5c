// dsnet_mm::co_attention and its backward: schemas, checks, autograd, autocast.

#include "co_attention.h"

#include <ATen/autocast_mode.h>
#include <Python.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace dsnet {

Outputs co_attention_impl(const Tensor& local_qkv, const Tensor& global_qkv,
                          const Tensor& seed, int64_t num_heads, double dropout_p) {
  return DISPATCH_DEVICE_IMPL(co_attention_impl, local_qkv, global_qkv, seed, num_heads,
                              dropout_p);
}

Gradients co_attention_backward_impl(const Tensor& grad_local,
                                     const Tensor& grad_global, const Tensor& local_qkv,
                                     const Tensor& global_qkv, const Tensor& local_out,
                                     const Tensor& global_out, const Tensor& local_lse,
                                     const Tensor& global_lse, const Tensor& seed,
                                     int64_t num_heads, double dropout_p) {
  return DISPATCH_DEVICE_IMPL(co_attention_backward_impl, grad_local, grad_global,
                              local_qkv, global_qkv, local_out, global_out, local_lse,
                              global_lse, seed, num_heads, dropout_p);
}

namespace {

void check(const Tensor& local_qkv, const Tensor& global_qkv, const Tensor& seed,
           int64_t num_heads, double dropout_p) {
  TORCH_CHECK(local_qkv.dim() == 3 && global_qkv.dim() == 3 &&
                  local_qkv.size(0) == global_qkv.size(0) &&
                  local_qkv.size(2) == global_qkv.size(2) && num_heads > 0 &&
                  local_qkv.size(2) > 0 && local_qkv.size(2) % (3 * num_heads) == 0 &&
                  local_qkv.size(1) > 0 && global_qkv.size(1) > 0,
              "co_attention takes (N, L, 3 * C) and (N, G, 3 * C) with C a multiple "
              "of num_heads=",
              num_heads, ", got ", local_qkv.sizes(), " and ", global_qkv.sizes());
  TORCH_CHECK(local_qkv.scalar_type() == global_qkv.scalar_type(),
              "co_attention takes one dtype, got ", local_qkv.scalar_type(), " and ",
              global_qkv.scalar_type());
  TORCH_CHECK(0 <= dropout_p && dropout_p < 1, "dropout_p lies in [0, 1), got ",
              dropout_p);
  TORCH_CHECK(seed.scalar_type() == at::kLong && seed.numel() == 1,
              "seed is one int64 number, got ", seed.scalar_type(), " of shape ",
              seed.sizes());
}

Outputs co_attention(const Tensor& local_qkv, const Tensor& global_qkv,
                     const Tensor& seed, int64_t num_heads, double dropout_p) {
  check(local_qkv, global_qkv, seed, num_heads, dropout_p);
  return co_attention_impl(with_rows(local_qkv), with_rows(global_qkv), seed, num_heads,
                           dropout_p);
}

Gradients co_attention_backward(const Tensor& grad_local, const Tensor& grad_global,
                                const Tensor& local_qkv, const Tensor& global_qkv,
                                const Tensor& local_out, const Tensor& global_out,
                                const Tensor& local_lse, const Tensor& global_lse,
                                const Tensor& seed, int64_t num_heads,
                                double dropout_p) {
  check(local_qkv, global_qkv, seed, num_heads, dropout_p);
  TORCH_CHECK(is_output(grad_local, local_qkv) && is_output(local_out, local_qkv) &&
                  is_output(grad_global, global_qkv) &&
                  is_output(global_out, global_qkv) &&
                  is_lse(local_lse, local_qkv, num_heads) &&
                  is_lse(global_lse, global_qkv, num_heads),
              "co_attention_backward takes what co_attention returned and gradients "
              "of its first two outputs");
  return co_attention_backward_impl(
      with_rows(grad_local), with_rows(grad_global), with_rows(local_qkv),
      with_rows(global_qkv), with_rows(local_out), with_rows(global_out),
      local_lse.contiguous(), global_lse.contiguous(), seed, num_heads, dropout_p);
}

// The operator as the dispatcher knows it.
const auto& dispatched() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("dsnet_mm::co_attention", "")
                             .typed<decltype(co_attention)>();
  return op;
}

const auto& dispatched_backward() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("dsnet_mm::co_attention_backward", "")
                             .typed<decltype(co_attention_backward)>();
  return op;
}

class CoAttention : public torch::autograd::Function<CoAttention> {
  using Context = torch::autograd::AutogradContext;

 public:
  static std::vector<Tensor> forward(Context* ctx, const Tensor& local_qkv,
                                     const Tensor& global_qkv, const Tensor& seed,
                                     int64_t num_heads, double dropout_p) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [local, global, local_lse, global_lse] =
        dispatched().call(local_qkv, global_qkv, seed, num_heads, dropout_p);
    ctx->saved_data["num_heads"] = num_heads;
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->save_for_backward(
        {local_qkv, global_qkv, local, global, local_lse, global_lse, seed});
    ctx->mark_non_differentiable({local_lse, global_lse});
    ctx->set_materialize_grads(false);
    return {local, global, local_lse, global_lse};
  }

  static std::vector<Tensor> backward(Context* ctx, std::vector<Tensor> grads) {
    const auto saved = ctx->get_saved_variables();
    for (int i = 0; i < 2; ++i)
      if (!grads[i].defined()) grads[i] = at::zeros_like(saved[2 + i]);
    const auto [local, global] = dispatched_backward().call(
        grads[0], grads[1], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5],
        saved[6], ctx->saved_data["num_heads"].toInt(),
        ctx->saved_data["dropout_p"].toDouble());
    return {local, global, Tensor(), Tensor(), Tensor()};
  }
};

Outputs co_attention_autograd(const Tensor& local_qkv, const Tensor& global_qkv,
                              const Tensor& seed, int64_t num_heads, double dropout_p) {
  if (!at::GradMode::is_enabled()) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return dispatched().call(local_qkv, global_qkv, seed, num_heads, dropout_p);
  }
  const auto out =
      CoAttention::apply(local_qkv, global_qkv, seed, num_heads, dropout_p);
  return {out[0], out[1], out[2], out[3]};
}

template <c10::DispatchKey key, c10::DeviceType device>
Outputs co_attention_autocast(const Tensor& local_qkv, const Tensor& global_qkv,
                              const Tensor& seed, int64_t num_heads, double dropout_p) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  return dispatched().call(at::autocast::cached_cast(dtype, local_qkv, device),
                           at::autocast::cached_cast(dtype, global_qkv, device), seed,
                           num_heads, dropout_p);
}

}  // namespace

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

#define DSNET_REGISTER(DEVICE)                                                       \
  TORCH_LIBRARY_IMPL(dsnet_mm, DEVICE, m) {                                          \
    m.impl("co_attention", co_attention);                                            \
    m.impl("co_attention_backward", co_attention_backward);                          \
  }                                                                                  \
  TORCH_LIBRARY_IMPL(dsnet_mm, Autocast##DEVICE, m) {                                \
    m.impl("co_attention", co_attention_autocast<c10::DispatchKey::Autocast##DEVICE, \
                                                 c10::DeviceType::DEVICE>);          \
  }

TORCH_LIBRARY_IMPL(dsnet_mm, Autograd, m) {
  m.impl("co_attention", co_attention_autograd);
}

DSNET_REGISTER(CPU)
#ifdef MMCV_WITH_CUDA
DSNET_REGISTER(CUDA)
#endif

}  // namespace dsnet

// ``import dsnet_mm.ops._C`` loads the registrations above; there is no more.
extern "C" PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
