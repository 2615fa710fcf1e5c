// Autograd and autocast of the operators of this library.
//
// co_attention and self_attention have a backward. A second derivative is an error. The
// operators of inference and of the feed-forward network have none: an input that
// requires a gradient is an error.

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "call_operator.h"

namespace dsnet {
namespace {

using at::Tensor;
using c10::DispatchKey;
using torch::autograd::variable_list;
using torch::jit::Stack;

void refuse_forward_gradient(const std::string& name, const Tensor& x) {
  TORCH_CHECK(!x.defined() || !x._fw_grad(/*level=*/0).defined(), name,
              " has no forward-mode derivative");
}

// -------------------------------------------------- operators without a backward

void refuse_gradients(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                      Stack* stack) {
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
    refuse_forward_gradient(schema.name(), x);
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

// ----------------------------------------------------- operators with a backward
//
// co_attention has two streams and self_attention one. Both take the packed projections
// of their streams, the seed, num_heads and dropout_p. Both return the outputs and the
// log-sum-exps of the streams. The backward takes the gradients of the outputs, the
// projections, the outputs, the log-sum-exps, the seed, num_heads and dropout_p.

class Attention : public torch::autograd::Function<Attention> {
 public:
  static variable_list forward(torch::autograd::AutogradContext* ctx,
                               at::TensorList qkv, const Tensor& seed,
                               int64_t num_heads, double dropout_p,
                               const std::string& name) {
    const at::AutoDispatchBelowADInplaceOrView below;
    Stack stack(qkv.begin(), qkv.end());
    torch::jit::push(stack, seed, num_heads, dropout_p);
    call_boxed(name, stack);
    const variable_list outputs = to_tensors(stack);
    ctx->mark_non_differentiable({outputs.begin() + qkv.size(), outputs.end()});
    variable_list saved = qkv.vec();
    saved.insert(saved.end(), outputs.begin(), outputs.end());
    saved.push_back(seed);
    ctx->save_for_backward(saved);
    ctx->saved_data["num_heads"] = num_heads;
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["backward"] = name + "_backward";
    return outputs;
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx,
                                variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    Stack stack(grads.begin(), grads.begin() + grads.size() / 2);
    stack.insert(stack.end(), saved.begin(), saved.end());
    stack.push_back(ctx->saved_data["num_heads"]);
    stack.push_back(ctx->saved_data["dropout_p"]);
    call_boxed(ctx->saved_data["backward"].toStringRef(), stack);
    variable_list result = to_tensors(stack);
    result.resize(result.size() + 4);  // Other arguments of forward have no gradient.
    return result;
  }

 private:
  static variable_list to_tensors(const Stack& stack) {
    variable_list tensors;
    for (const c10::IValue& value : stack) tensors.push_back(value.toTensor());
    return tensors;
  }
};

// The last three arguments are the seed, num_heads and dropout_p.
void attention_autograd(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                        Stack* stack) {
  if (!at::GradMode::is_enabled()) return refuse_gradients(op, keys, stack);
  const size_t count = op.schema().arguments().size(), streams = count - 3;
  const auto arguments = torch::jit::last(*stack, count);
  variable_list qkv;
  for (size_t i = 0; i < streams; ++i) qkv.push_back(arguments[i].toTensor());
  const auto outputs =
      Attention::apply(at::TensorList(qkv), arguments[streams].toTensor(),
                       arguments[streams + 1].toInt(),
                       arguments[streams + 2].toDouble(), op.schema().name());
  torch::jit::drop(*stack, count);
  stack->insert(stack->end(), outputs.begin(), outputs.end());
}

// ----------------------------------------------------------------------- autocast

template <DispatchKey key, c10::DeviceType device>
void attention_autocast(const c10::OperatorHandle& op, Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const size_t count = op.schema().arguments().size();
  for (size_t i = 0; i < count; ++i) {
    c10::IValue& value = torch::jit::peek(*stack, i, count);
    if (value.isTensor())
      value = at::autocast::cached_cast(dtype, value.toTensor(), device);
  }
  op.callBoxed(stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(dsnet_mm, Autograd, m) {
  for (const char* name : {"co_attention", "self_attention"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&attention_autograd>());
  for (const char* name :
       {"co_attention_backward", "self_attention_backward", "ffn_backward"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  for (const char* name :
       {"ffn", "linear", "linear_", "merge_", "residual_conv", "resize_add_"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_gradients>());
}

TORCH_LIBRARY_IMPL(dsnet_mm, AutocastCPU, m) {
  for (const char* name : {"co_attention", "self_attention"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<
                     &attention_autocast<DispatchKey::AutocastCPU, at::kCPU>>());
}

TORCH_LIBRARY_IMPL(dsnet_mm, AutocastCUDA, m) {
  m.impl("co_attention",
         torch::CppFunction::makeFromBoxedFunction<
             &attention_autocast<DispatchKey::AutocastCUDA, at::kCUDA>>());
}

}  // namespace dsnet
