// Looks up an operator in the dispatcher.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>

namespace dsnet {

inline c10::OperatorHandle find_operator(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "");
}

}  // namespace dsnet
