// Memory of a thread for what it computes with.

#pragma once

#include <c10/core/CPUAllocator.h>

namespace dsnet {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Hands out aligned pieces of a block of memory.
class Arena {
 public:
  explicit Arena(char* memory) : next_(memory) {}

  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += (count * sizeof(T) + 63) / 64 * 64;
    return piece;
  }

 private:
  char* next_;
};

// Memory that a thread keeps from call to call. Given back, the system would
// have to find and clear its pages each time, which takes longer than a small
// attention.
inline char* scratch(int64_t bytes) {
  thread_local c10::DataPtr memory;
  thread_local int64_t size = 0;
#ifdef __SANITIZE_ADDRESS__
  size = 0;  // a block of exactly this size, whose end is checked
#endif
  if (size < bytes) {
    memory = c10::GetCPUAllocator()->allocate(bytes);
    size = bytes;
  }
  return static_cast<char*>(memory.get());
}

}  // namespace dsnet
