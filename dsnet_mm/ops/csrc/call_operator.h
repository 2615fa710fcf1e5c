// Calls an operator of this library through the dispatcher, as Python does.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <string>

namespace dsnet {

// Replaces the arguments on the stack by what the operator returns.
inline void call_boxed(const std::string& name, torch::jit::Stack& stack) {
  c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "").callBoxed(&stack);
}

template <typename... Args>
torch::jit::Stack call(const std::string& name, const Args&... args) {
  torch::jit::Stack stack;
  torch::jit::push(stack, args...);
  call_boxed(name, stack);
  return stack;
}

}  // namespace dsnet
