// Scratch memory of the kernels.
//
// A kernel takes an arena as its last argument. It allocates all its arrays first, and
// returns if the arena only counts:
//
//   void kernel(int64_t n, float* out, Arena& arena) {
//     float* sums = arena.allocate<float>(n);
//     if (arena.counts()) return;
//     ...
//
// in_scratch(kernel, n, out) calls it twice: the first call tells how much memory the
// second one gets.
#pragma once

#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace dsnet {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// Divides a block of memory into arrays. Each array begins at a multiple of 64 bytes.
class Arena {
 public:
  // Without memory, the arena only counts: its arrays are null.
  explicit Arena(char* memory = nullptr) : memory_(memory) {}

  template <typename T>
  T* allocate(int64_t count) {
    const int64_t begin = size_, bytes = count * sizeof(T);
    size_ += round_up(bytes, 64);
#ifdef __SANITIZE_ADDRESS__
    size_ += 64;  // A gap between arrays, where accesses are errors.
    if (memory_) __asan_poison_memory_region(memory_ + begin, size_ - begin);
    if (memory_) __asan_unpoison_memory_region(memory_ + begin, bytes);
#endif
    return counts() ? nullptr : reinterpret_cast<T*>(memory_ + begin);
  }

  bool counts() const { return !memory_; }
  int64_t size() const { return size_; }  // in bytes, of all arrays so far

 private:
  char* memory_;
  int64_t size_ = 0;
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

// Calls kernel(args..., arena) with as much scratch memory as it allocates. There is
// one block for each thread: a kernel must not call another one through in_scratch.
template <typename Kernel, typename... Args>
void in_scratch(const Kernel& kernel, const Args&... args) {
  Arena counted;
  kernel(args..., counted);
  Arena arena(scratch(counted.size()));
  kernel(args..., arena);
  TORCH_INTERNAL_ASSERT(arena.size() == counted.size());
}

}  // namespace dsnet
