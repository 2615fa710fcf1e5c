// The CUDA kernels as a library for the CPU; see cuda_on_cpu.h. Its one function
// computes the co-attention and its gradients, in float.
#include "cuda_on_cpu.h"
// After cuda_on_cpu.h, which stands in for CUDA.
#include "attention_kernel.cuh"

using namespace dsnet;

namespace {

template <int SPLIT>
void run(const float* const* qkv, const int64_t* tokens, int64_t samples, int64_t heads,
         int64_t width, const int64_t* seed, double dropout_p, float* const* out,
         float* const* lse, const float* const* grad_out, float* const* delta,
         float* const* grad) {
  const int64_t channels = heads * width, all = samples * heads;
  for (int i = 0; i < 2; ++i) {  // the stream of the queries
    const int other = 1 - i;
    const Direction<float> d{
        qkv[i],
        qkv[other],
        tokens[i] * 3 * channels,
        3 * channels,
        tokens[other] * 3 * channels,
        3 * channels,
        tokens[i],
        tokens[other],
        heads,
        width,
        i * all * tokens[0],
        Dropout{0, uint32_t(dropout_p * 4294967296.), 1 / (1 - dropout_p)},
        dropout_p > 0 ? seed : nullptr};
    const auto launch = [&](int64_t rows, auto kernel) {
      cuda_on_cpu::launch(num_blocks(all, rows, SPLIT), kThreads, kernel);
    };
    launch(d.queries, [&] { forward_kernel<float, SPLIT>(d, out[i], lse[i]); });
    launch(d.queries, [&] {
      grad_q_kernel<float, SPLIT>(d, out[i], grad_out[i], lse[i], delta[i], grad[i]);
    });
    launch(d.keys, [&] {
      grad_kv_kernel<float, SPLIT>(d, grad_out[i], lse[i], delta[i], grad[other]);
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
