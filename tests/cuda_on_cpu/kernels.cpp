// The CUDA kernels as a library for the CPU; see cuda_on_cpu.h.
#include "cuda_on_cpu.h"
// The kernels come after what stands in for CUDA.
#include "attention_kernel.cuh"

using namespace dsnet;

namespace {

template <int PARTS>
void run(const float* const* qkv, const int64_t* tokens, int64_t samples, int64_t heads,
         int64_t width, const int64_t* seed, double dropout_p, float* const* out,
         float* const* lse, const float* const* grad_out, float* const* delta,
         float* const* grad) {
  const int64_t channels = heads * width, all = samples * heads;
  for (int reader = 0; reader < 2; ++reader) {
    const int other = 1 - reader;
    const Direction<float> d{
        qkv[reader],
        qkv[other],
        tokens[reader] * 3 * channels,
        3 * channels,
        tokens[other] * 3 * channels,
        3 * channels,
        tokens[reader],
        tokens[other],
        heads,
        width,
        reader * all * tokens[0],
        Dropout{0, uint32_t(dropout_p * 4294967296.), 1 / (1 - dropout_p)},
        dropout_p > 0 ? seed : nullptr};
    const auto launch = [&](int64_t rows, auto kernel) {
      cuda_on_cpu::launch(blocks_of(all, rows, PARTS), kThreads, kernel);
    };
    launch(d.queries,
           [&] { attend_kernel<float, PARTS>(d, out[reader], lse[reader]); });
    launch(d.queries, [&] {
      grad_q_kernel<float, PARTS>(d, out[reader], grad_out[reader], lse[reader],
                                  delta[reader], grad[reader]);
    });
    launch(d.keys, [&] {
      grad_kv_kernel<float, PARTS>(d, grad_out[reader], lse[reader], delta[reader],
                                   grad[other]);
    });
  }
}

}  // namespace

extern "C" void co_attention(const float* const* qkv, const int64_t* tokens,
                             int64_t samples, int64_t heads, int64_t width,
                             const int64_t* seed, double dropout_p, float* const* out,
                             float* const* lse, const float* const* grad_out,
                             float* const* delta, float* const* grad) {
  const auto kernels = width <= 32 ? run<1> : width <= 64 ? run<2> : run<4>;
  kernels(qkv, tokens, samples, heads, width, seed, dropout_p, out, lse, grad_out,
          delta, grad);
}
