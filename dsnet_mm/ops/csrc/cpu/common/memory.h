// Working memory of the kernels.

#pragma once

#include <c10/core/CPUAllocator.h>

namespace dsnet {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Divides a block of memory into arrays. Each array begins at a multiple of 64 bytes.
class Arena {
 public:
  explicit Arena(char* memory) : next_(memory) {}

  template <typename T>
  T* allocate(int64_t count) {
    T* array = reinterpret_cast<T*>(next_);
    next_ += (count * sizeof(T) + 63) / 64 * 64;
    return array;
  }

 private:
  char* next_;
};

// Returns a block of at least ``bytes`` bytes, aligned to 64. The calling thread keeps
// it and gets the same one again in later calls. A new block each time would be slow:
// the system clears the pages of new memory, which takes longer than a small attention.
inline char* scratch(int64_t bytes) {
  thread_local c10::DataPtr memory;
  thread_local int64_t size = 0;
#ifdef __SANITIZE_ADDRESS__
  size = 0;  // A new block of this exact size, so that its end is checked.
#endif
  if (size < bytes) {
    memory = c10::GetCPUAllocator()->allocate(bytes);
    size = bytes;
  }
  return static_cast<char*>(memory.get());
}

}  // namespace dsnet
