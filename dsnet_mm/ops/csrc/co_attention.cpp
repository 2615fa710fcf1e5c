// dsnet_mm::co_attention and its backward: schemas, checks and autocast; and autograd
// of all operators of this library.
//
//   h_L = softmax(Q_L K_G^T / sqrt(d)) V_G
//   h_G = softmax(Q_G K_L^T / sqrt(d)) V_L

#include "co_attention.h"

#include <ATen/autocast_mode.h>
#include <Python.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
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

// --------------------------------------------------------------------- autograd

using torch::autograd::AutogradContext;

// The operators as the dispatcher knows them.
#define DSNET_FIND(NAME, SIGNATURE)                                    \
  static const auto op = c10::Dispatcher::singleton()                  \
                             .findSchemaOrThrow("dsnet_mm::" NAME, "") \
                             .typed<SIGNATURE>()

Outputs call(const Tensor& local_qkv, const Tensor& global_qkv, const Tensor& seed,
             int64_t num_heads, double dropout_p) {
  DSNET_FIND("co_attention", decltype(co_attention));
  return op.call(local_qkv, global_qkv, seed, num_heads, dropout_p);
}

SelfOutputs call(const Tensor& qkv, const Tensor& seed, int64_t num_heads,
                 double dropout_p) {
  DSNET_FIND("self_attention",
             SelfOutputs(const Tensor&, const Tensor&, int64_t, double));
  return op.call(qkv, seed, num_heads, dropout_p);
}

class CoAttention : public torch::autograd::Function<CoAttention> {
 public:
  static std::vector<Tensor> forward(AutogradContext* ctx, const Tensor& local_qkv,
                                     const Tensor& global_qkv, const Tensor& seed,
                                     int64_t num_heads, double dropout_p) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [local, global, local_lse, global_lse] =
        call(local_qkv, global_qkv, seed, num_heads, dropout_p);
    ctx->saved_data["num_heads"] = num_heads;
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->save_for_backward(
        {local_qkv, global_qkv, local, global, local_lse, global_lse, seed});
    ctx->mark_non_differentiable({local_lse, global_lse});
    ctx->set_materialize_grads(false);
    return {local, global, local_lse, global_lse};
  }

  static std::vector<Tensor> backward(AutogradContext* ctx, std::vector<Tensor> grads) {
    DSNET_FIND("co_attention_backward", decltype(co_attention_backward));
    const auto saved = ctx->get_saved_variables();
    for (int i = 0; i < 2; ++i)
      if (!grads[i].defined()) grads[i] = at::zeros_like(saved[2 + i]);
    const auto [local, global] =
        op.call(grads[0], grads[1], saved[0], saved[1], saved[2], saved[3], saved[4],
                saved[5], saved[6], ctx->saved_data["num_heads"].toInt(),
                ctx->saved_data["dropout_p"].toDouble());
    return {local, global, Tensor(), Tensor(), Tensor()};
  }
};

class SelfAttention : public torch::autograd::Function<SelfAttention> {
 public:
  static std::vector<Tensor> forward(AutogradContext* ctx, const Tensor& qkv,
                                     const Tensor& seed, int64_t num_heads,
                                     double dropout_p) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [out, lse] = call(qkv, seed, num_heads, dropout_p);
    ctx->saved_data["num_heads"] = num_heads;
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->save_for_backward({qkv, out, lse, seed});
    ctx->mark_non_differentiable({lse});
    return {out, lse};
  }

  static std::vector<Tensor> backward(AutogradContext* ctx, std::vector<Tensor> grads) {
    DSNET_FIND("self_attention_backward",
               Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                      const Tensor&, int64_t, double));
    const auto saved = ctx->get_saved_variables();
    const Tensor grad = op.call(grads[0], saved[0], saved[1], saved[2], saved[3],
                                ctx->saved_data["num_heads"].toInt(),
                                ctx->saved_data["dropout_p"].toDouble());
    return {grad, Tensor(), Tensor(), Tensor()};
  }
};

Outputs co_attention_autograd(const Tensor& local_qkv, const Tensor& global_qkv,
                              const Tensor& seed, int64_t num_heads, double dropout_p) {
  if (!at::GradMode::is_enabled()) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return call(local_qkv, global_qkv, seed, num_heads, dropout_p);
  }
  const auto out =
      CoAttention::apply(local_qkv, global_qkv, seed, num_heads, dropout_p);
  return {out[0], out[1], out[2], out[3]};
}

SelfOutputs self_attention_autograd(const Tensor& qkv, const Tensor& seed,
                                    int64_t num_heads, double dropout_p) {
  if (!at::GradMode::is_enabled()) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return call(qkv, seed, num_heads, dropout_p);
  }
  const auto out = SelfAttention::apply(qkv, seed, num_heads, dropout_p);
  return {out[0], out[1]};
}

// For operators without a backward: an input that requires a gradient is an error.
void refuse_gradients(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                      torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  for (const auto& argument : torch::jit::last(*stack, schema.arguments().size()))
    TORCH_CHECK(!at::GradMode::is_enabled() || !argument.isTensor() ||
                    !argument.toTensor().requires_grad(),
                schema.name(), " has no backward, and one of its inputs requires a ",
                "gradient; call it under torch.no_grad()");
  const at::AutoDispatchBelowADInplaceOrView below;
  op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
}

// --------------------------------------------------------------------- autocast

template <c10::DispatchKey key, c10::DeviceType device>
Outputs co_attention_autocast(const Tensor& local_qkv, const Tensor& global_qkv,
                              const Tensor& seed, int64_t num_heads, double dropout_p) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  return call(at::autocast::cached_cast(dtype, local_qkv, device),
              at::autocast::cached_cast(dtype, global_qkv, device), seed, num_heads,
              dropout_p);
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
  m.impl("self_attention", self_attention_autograd);
  // A second derivative is an error.
  for (const char* name :
       {"co_attention_backward", "self_attention_backward", "ffn_backward"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  for (const char* name : {"ffn", "ffn_hidden", "linear", "linear_", "merge_",
                           "residual_conv", "resize_add_"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_gradients>());
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
