// The part of CUDA that the kernels use, for the CPU. Blocks run one after another. The
// threads of a block are fibres, which take turns at barriers and shuffles. All threads
// of a block must pass the same barriers and shuffles.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static

namespace cuda_on_cpu {

struct Index {
  unsigned x;
};

constexpr size_t kStack = 1 << 16;

struct Block {
  std::function<void()> kernel;
  ucontext_t scheduler;
  std::vector<ucontext_t> fibres;
  std::vector<bool> ended;
  std::vector<float> values;  // of the threads in a shuffle
};

inline Block block;
inline Index thread_index, block_index;

// Returns when all other threads have come to a wait as well.
inline void wait() {
  const unsigned self = thread_index.x;
  swapcontext(&block.fibres[self], &block.scheduler);
}

inline void run_thread() {
  block.kernel();
  block.ended[thread_index.x] = true;
}

inline void launch(int64_t blocks, unsigned threads, std::function<void()> kernel) {
  const auto stacks = std::make_unique<char[]>(threads * kStack);
  block.kernel = std::move(kernel);
  block.fibres.resize(threads);
  block.values.resize(threads);
  for (int64_t b = 0; b < blocks; ++b) {
    block_index.x = b;
    block.ended.assign(threads, false);
    for (unsigned t = 0; t < threads; ++t) {
      getcontext(&block.fibres[t]);
      block.fibres[t].uc_stack.ss_sp = stacks.get() + t * kStack;
      block.fibres[t].uc_stack.ss_size = kStack;
      block.fibres[t].uc_link = &block.scheduler;
      makecontext(&block.fibres[t], run_thread, 0);
    }
    for (unsigned running = threads; running > 0;)
      for (unsigned t = 0; t < threads; ++t) {
        if (block.ended[t]) continue;
        thread_index.x = t;
        swapcontext(&block.scheduler, &block.fibres[t]);
        running -= block.ended[t];
      }
  }
}

}  // namespace cuda_on_cpu

#define threadIdx cuda_on_cpu::thread_index
#define blockIdx cuda_on_cpu::block_index

inline void __syncthreads() { cuda_on_cpu::wait(); }

inline float __shfl_xor_sync(unsigned, float x, int mask) {
  auto& values = cuda_on_cpu::block.values;
  const unsigned self = threadIdx.x;
  values[self] = x;
  cuda_on_cpu::wait();
  const float other = values[self ^ mask];
  cuda_on_cpu::wait();
  return other;
}

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
