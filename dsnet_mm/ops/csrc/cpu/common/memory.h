// Working memory of the kernels.

#pragma once

#include <c10/core/CPUAllocator.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace dsnet {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Divides a block of memory into arrays. Each array begins at a multiple of 64 bytes.
class Arena {
 public:
  explicit Arena(char* memory) : next_(memory) {}

  template <typename T>
  T* allocate(int64_t count) {
    T* array = reinterpret_cast<T*>(next_);
    const int64_t bytes = count * sizeof(T);
    next_ += (bytes + 63) / 64 * 64;
#ifdef __SANITIZE_ADDRESS__
    next_ += 64;  // A gap between arrays, where accesses are errors.
    __asan_unpoison_memory_region(array, bytes);
    char* end = reinterpret_cast<char*>(array) + bytes;
    __asan_poison_memory_region(end, next_ - end);
#endif
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
