// Looks up an operator in the dispatcher.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace dsnet {

template <typename Signature>
auto find(const char* name) {
  const auto schema = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  return schema.typed<Signature>();
}

}  // namespace dsnet
