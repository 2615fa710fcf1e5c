// Autograd and autocast of the operators of this library.
//
// co_attention and self_attention have a backward. A second derivative is an error. The
// operators of inference and of the feed-forward network have none: an input that
// requires a gradient is an error.

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "co_attention.h"
#include "find_operator.h"

namespace dsnet {
namespace {

using torch::autograd::AutogradContext;
using SelfOutputs = std::tuple<Tensor, Tensor>;

Outputs co_attention(const Tensor& local_qkv, const Tensor& global_qkv,
                     const Tensor& seed, int64_t num_heads, double dropout_p) {
  static const auto op =
      find<Outputs(const Tensor&, const Tensor&, const Tensor&, int64_t, double)>(
          "dsnet_mm::co_attention");
  return op.call(local_qkv, global_qkv, seed, num_heads, dropout_p);
}

SelfOutputs self_attention(const Tensor& qkv, const Tensor& seed, int64_t num_heads,
                           double dropout_p) {
  static const auto op =
      find<SelfOutputs(const Tensor&, const Tensor&, int64_t, double)>(
          "dsnet_mm::self_attention");
  return op.call(qkv, seed, num_heads, dropout_p);
}

// ----------------------------------------------------- operators with a backward

class CoAttention : public torch::autograd::Function<CoAttention> {
 public:
  static std::vector<Tensor> forward(AutogradContext* ctx, const Tensor& local_qkv,
                                     const Tensor& global_qkv, const Tensor& seed,
                                     int64_t num_heads, double dropout_p) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [local, global, local_lse, global_lse] =
        co_attention(local_qkv, global_qkv, seed, num_heads, dropout_p);
    ctx->saved_data["num_heads"] = num_heads;
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->save_for_backward(
        {local_qkv, global_qkv, local, global, local_lse, global_lse, seed});
    ctx->mark_non_differentiable({local_lse, global_lse});
    return {local, global, local_lse, global_lse};
  }

  static std::vector<Tensor> backward(AutogradContext* ctx, std::vector<Tensor> grads) {
    static const auto op = find<Gradients(
        const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
        const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, double)>(
        "dsnet_mm::co_attention_backward");
    const auto saved = ctx->get_saved_variables();
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
    const auto [out, lse] = self_attention(qkv, seed, num_heads, dropout_p);
    ctx->saved_data["num_heads"] = num_heads;
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->save_for_backward({qkv, out, lse, seed});
    ctx->mark_non_differentiable({lse});
    return {out, lse};
  }

  static std::vector<Tensor> backward(AutogradContext* ctx, std::vector<Tensor> grads) {
    static const auto op = find<Tensor(const Tensor&, const Tensor&, const Tensor&,
                                       const Tensor&, const Tensor&, int64_t, double)>(
        "dsnet_mm::self_attention_backward");
    const auto saved = ctx->get_saved_variables();
    const Tensor grad = op.call(grads[0], saved[0], saved[1], saved[2], saved[3],
                                ctx->saved_data["num_heads"].toInt(),
                                ctx->saved_data["dropout_p"].toDouble());
    return {grad, Tensor(), Tensor(), Tensor()};
  }
};

void refuse_forward_gradient(const char* name, const Tensor& x) {
  TORCH_CHECK(!x.defined() || !x._fw_grad(/*level=*/0).defined(), name,
              " has no forward-mode derivative");
}

Outputs co_attention_autograd(const Tensor& local_qkv, const Tensor& global_qkv,
                              const Tensor& seed, int64_t num_heads, double dropout_p) {
  if (at::GradMode::is_enabled()) {
    const auto out =
        CoAttention::apply(local_qkv, global_qkv, seed, num_heads, dropout_p);
    return {out[0], out[1], out[2], out[3]};
  }
  refuse_forward_gradient("co_attention", local_qkv);
  refuse_forward_gradient("co_attention", global_qkv);
  const at::AutoDispatchBelowADInplaceOrView below;
  return co_attention(local_qkv, global_qkv, seed, num_heads, dropout_p);
}

SelfOutputs self_attention_autograd(const Tensor& qkv, const Tensor& seed,
                                    int64_t num_heads, double dropout_p) {
  if (at::GradMode::is_enabled()) {
    const auto out = SelfAttention::apply(qkv, seed, num_heads, dropout_p);
    return {out[0], out[1]};
  }
  refuse_forward_gradient("self_attention", qkv);
  const at::AutoDispatchBelowADInplaceOrView below;
  return self_attention(qkv, seed, num_heads, dropout_p);
}

// -------------------------------------------------- operators without a backward

void refuse_gradients(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                      torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();
  std::vector<Tensor> written;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const c10::IValue& value = torch::jit::peek(*stack, i, arguments.size());
    if (!value.isTensor()) continue;
    const Tensor& x = value.toTensor();
    TORCH_CHECK(!at::GradMode::is_enabled() || !x.requires_grad(), schema.name(),
                " has no backward, and one of its inputs requires a gradient; call it ",
                "under torch.no_grad()");
    refuse_forward_gradient(schema.name().c_str(), x);
    const auto* alias = arguments[i].alias_info();
    if (alias && alias->isWrite() && !x.is_inference()) written.push_back(x);
  }
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  }
  // Autograd of other operators detects that a tensor it saved was changed.
  for (const Tensor& x : written) x.unsafeGetTensorImpl()->bump_version();
}

// ----------------------------------------------------------------------- autocast

template <c10::DispatchKey key, c10::DeviceType device>
Outputs co_attention_autocast(const Tensor& local_qkv, const Tensor& global_qkv,
                              const Tensor& seed, int64_t num_heads, double dropout_p) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  return co_attention(at::autocast::cached_cast(dtype, local_qkv, device),
                      at::autocast::cached_cast(dtype, global_qkv, device), seed,
                      num_heads, dropout_p);
}

template <c10::DispatchKey key, c10::DeviceType device>
SelfOutputs self_attention_autocast(const Tensor& qkv, const Tensor& seed,
                                    int64_t num_heads, double dropout_p) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  return self_attention(at::autocast::cached_cast(dtype, qkv, device), seed, num_heads,
                        dropout_p);
}

}  // namespace

TORCH_LIBRARY_IMPL(dsnet_mm, Autograd, m) {
  m.impl("co_attention", co_attention_autograd);
  m.impl("self_attention", self_attention_autograd);
  for (const char* name :
       {"co_attention_backward", "self_attention_backward", "ffn_backward"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  for (const char* name : {"ffn", "ffn_hidden", "linear", "linear_", "merge_",
                           "residual_conv", "resize_add_"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_gradients>());
}

TORCH_LIBRARY_IMPL(dsnet_mm, AutocastCPU, m) {
  constexpr auto key = c10::DispatchKey::AutocastCPU;
  m.impl("co_attention", co_attention_autocast<key, c10::DeviceType::CPU>);
  m.impl("self_attention", self_attention_autocast<key, c10::DeviceType::CPU>);
}

#ifdef MMCV_WITH_CUDA
TORCH_LIBRARY_IMPL(dsnet_mm, AutocastCUDA, m) {
  constexpr auto key = c10::DispatchKey::AutocastCUDA;
  m.impl("co_attention", co_attention_autocast<key, c10::DeviceType::CUDA>);
}
#endif

}  // namespace dsnet
