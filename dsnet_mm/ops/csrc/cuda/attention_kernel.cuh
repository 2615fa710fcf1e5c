// Attention on CUDA, one direction: the queries of one stream attend to the keys and
// values of the other. For queries i and keys j:
//
// Forward:   s_ij = q_i k_j / sqrt(d) * log2(e)       scores
//            lse_i = log2 sum_j 2^s_ij                log-sum-exp
//            w_ij = 2^(s_ij - lse_i)                  weights
//            out_i = sum_j w_ij f_ij v_j              f is the dropout factor, or 1
//
// Backward:  delta_i = out_i grad_out_i
//            grad_v_j = sum_i w_ij f_ij grad_out_i
//            ds_ij = w_ij (f_ij grad_out_i v_j - delta_i) / sqrt(d)
//            grad_q_i = sum_j ds_ij k_j
//            grad_k_j = sum_i ds_ij q_i
//
// Memory: SPLIT neighbouring threads share a token, which is a query, or in
// grad_kv_kernel a key. Each holds every SPLIT-th channel of it, and of its
// accumulators, in registers. Tokens of the other stream pass through shared memory in
// tiles of kTile.
//
// Loop order: tiles, then the tokens of a tile. Nothing is added atomically, so results
// are deterministic.
//
// The file includes nothing of PyTorch: nvcc compiles it alone, and tests/cuda_on_cpu
// runs it without a GPU.
#pragma once

#include "../dropout.h"

namespace dsnet {

constexpr int kThreads = 128;  // of a block
constexpr int kTile = 16;      // tokens
constexpr int kChannels = 32;  // of a thread
constexpr float kLog2E = 1.44269504f;

template <typename S>
struct Direction {
  const S *query_stream, *key_stream;  // packed projections (N, tokens, 3 * C)
  int64_t q_sample_stride, q_stride, kv_sample_stride, kv_stride;  // q, kv: of a token
  int64_t queries, keys, heads, width;
  int64_t first_query;  // number of the first query among all, for dropout
  Dropout dropout;
  const int64_t* seed;  // or null: no dropout

  // ``head`` counts the heads of all samples.
  __device__ const S* q(int64_t head) const {
    return query_stream + head / heads * q_sample_stride + head % heads * width;
  }
  __device__ const S* k(int64_t head) const { return key_part(head, 1); }
  __device__ const S* v(int64_t head) const { return key_part(head, 2); }
  // Where a row of a head begins in a contiguous tensor (N, tokens, parts * C).
  __device__ int64_t row(int64_t head, int64_t token, int64_t tokens,
                         int parts = 1) const {
    return ((head / heads * tokens + token) * parts * heads + head % heads) * width;
  }

  __device__ uint64_t random_words(int64_t head, int64_t query) const {
    return query_words(*seed, first_query + head * queries + query);
  }
  // 1 / (1 - p) for a weight that is kept, 0 for one that is dropped.
  __device__ float dropout_factor(uint64_t words, int64_t key) const {
    const uint32_t x =
        random_word(uint32_t(words), uint32_t(words >> 32), uint32_t(key));
    return x >= dropout.threshold ? float(dropout.scale) : 0.f;
  }

 private:
  // Part 0, 1, 2 of a packed projection is q, k, v.
  __device__ const S* key_part(int64_t head, int part) const {
    return key_stream + head / heads * kv_sample_stride +
           (part * heads + head % heads) * width;
  }
};

// Sum over the SPLIT threads of a token.
template <int SPLIT>
__device__ __forceinline__ float sum_threads(float x) {
  for (int step = 1; step < SPLIT; step *= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// Loads tokens [first, first + kTile) to shared memory, with zeros beyond the last
// token and the last channel.
template <int SPLIT, typename S>
__device__ void load_tile(const S* src, int64_t src_stride, int64_t first,
                          int64_t tokens, int64_t width, float* tile) {
  constexpr int kWidth = SPLIT * kChannels;
  for (int i = threadIdx.x; i < kTile * kWidth; i += kThreads) {
    const int64_t token = first + i / kWidth, channel = i % kWidth;
    tile[i] = token < tokens && channel < width
                  ? static_cast<float>(src[token * src_stride + channel])
                  : 0.f;
  }
}

// Loads this thread's channels of its token, or zeros if there is no such token.
template <int SPLIT, typename S>
__device__ void load_channels(const S* src, int64_t width, bool exists, float factor,
                              float* x) {
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    const int channel = i * SPLIT + threadIdx.x % SPLIT;
    x[i] = exists && channel < width ? static_cast<float>(src[channel]) * factor : 0.f;
  }
}

template <int SPLIT, typename S>
__device__ void store_channels(const float* x, int64_t width, bool exists, float factor,
                               S* dst) {
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    const int channel = i * SPLIT + threadIdx.x % SPLIT;
    if (exists && channel < width) dst[channel] = static_cast<S>(x[i] * factor);
  }
}

// The product of this thread's token and a token of a tile.
template <int SPLIT>
__device__ __forceinline__ float dot(const float* x, const float* token) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kChannels; ++i)
    sum += x[i] * token[i * SPLIT + threadIdx.x % SPLIT];
  return sum_threads<SPLIT>(sum);
}

// accumulator += factor * token
template <int SPLIT>
__device__ __forceinline__ void accumulate(float factor, const float* token,
                                           float* accumulator) {
#pragma unroll
  for (int i = 0; i < kChannels; ++i)
    accumulator[i] += factor * token[i * SPLIT + threadIdx.x % SPLIT];
}

// Forward: out and lse. Holds the running maximum of the scores, the denominator and an
// accumulator of the values for each query; a new maximum rescales the last two.
template <typename S, int SPLIT>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(Direction<S> d, S* out, float* lse) {
  constexpr int kWidth = SPLIT * kChannels, kTokens = kThreads / SPLIT;
  __shared__ float k[kTile * kWidth], v[kTile * kWidth];
  const int64_t blocks = (d.queries + kTokens - 1) / kTokens;
  const int64_t head = blockIdx.x / blocks;
  const int64_t query = blockIdx.x % blocks * kTokens + threadIdx.x / SPLIT;
  const bool exists = query < d.queries;
  float q[kChannels], accumulator[kChannels] = {};
  float running_max = -INFINITY, denominator = 0;
  load_channels<SPLIT>(d.q(head) + query * d.q_stride, d.width, exists,
                       kLog2E * rsqrtf(float(d.width)), q);
  const uint64_t words = d.seed ? d.random_words(head, query) : 0;

  for (int64_t first = 0; first < d.keys; first += kTile) {
    __syncthreads();
    load_tile<SPLIT>(d.k(head), d.kv_stride, first, d.keys, d.width, k);
    load_tile<SPLIT>(d.v(head), d.kv_stride, first, d.keys, d.width, v);
    __syncthreads();
    float scores[kTile], new_max = running_max;
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      const float score = dot<SPLIT>(q, k + j * kWidth);
      scores[j] = first + j < d.keys ? score : -INFINITY;
      new_max = fmaxf(new_max, scores[j]);
    }
    const float rescale = exp2f(running_max - new_max);
    running_max = new_max;
    denominator *= rescale;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) accumulator[i] *= rescale;
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      float weight = exp2f(scores[j] - new_max);
      denominator += weight;
      if (d.seed) weight *= d.dropout_factor(words, first + j);
      accumulate<SPLIT>(weight, v + j * kWidth, accumulator);
    }
  }
  store_channels<SPLIT>(accumulator, d.width, exists, 1 / denominator,
                        out + d.row(head, query, d.queries));
  if (exists && threadIdx.x % SPLIT == 0)
    lse[head * d.queries + query] = running_max + log2f(denominator);
}

// Backward of the queries, and delta, which grad_kv_kernel reads. ``grad_q`` is the q
// part of a packed gradient.
template <typename S, int SPLIT>
__global__ void __launch_bounds__(kThreads)
    grad_q_kernel(Direction<S> d, const S* out, const S* grad_out, const float* lse,
                  float* delta, S* grad_q) {
  constexpr int kWidth = SPLIT * kChannels, kTokens = kThreads / SPLIT;
  __shared__ float k[kTile * kWidth], v[kTile * kWidth];
  const int64_t blocks = (d.queries + kTokens - 1) / kTokens;
  const int64_t head = blockIdx.x / blocks;
  const int64_t query = blockIdx.x % blocks * kTokens + threadIdx.x / SPLIT;
  const bool exists = query < d.queries;
  const int64_t at = d.row(head, query, d.queries);
  const float scale = rsqrtf(float(d.width));
  float q[kChannels], g[kChannels], accumulator[kChannels];
  load_channels<SPLIT>(grad_out + at, d.width, exists, 1.f, g);
  load_channels<SPLIT>(out + at, d.width, exists, 1.f, q);  // for delta only
  float query_delta = 0;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    query_delta += q[i] * g[i];
    accumulator[i] = 0;
  }
  query_delta = sum_threads<SPLIT>(query_delta);
  if (exists && threadIdx.x % SPLIT == 0) delta[head * d.queries + query] = query_delta;
  load_channels<SPLIT>(d.q(head) + query * d.q_stride, d.width, exists, kLog2E * scale,
                       q);
  const float query_lse = exists ? lse[head * d.queries + query] : 0;
  const uint64_t words = d.seed ? d.random_words(head, query) : 0;

  for (int64_t first = 0; first < d.keys; first += kTile) {
    __syncthreads();
    load_tile<SPLIT>(d.k(head), d.kv_stride, first, d.keys, d.width, k);
    load_tile<SPLIT>(d.v(head), d.kv_stride, first, d.keys, d.width, v);
    __syncthreads();
    for (int j = 0; j < kTile; ++j) {
      const float score = dot<SPLIT>(q, k + j * kWidth);
      // A key beyond the last one has the score 0, and 2^(0 - lse) may be infinite.
      const float weight = first + j < d.keys ? exp2f(score - query_lse) : 0.f;
      float grad_weight = dot<SPLIT>(g, v + j * kWidth);
      if (d.seed) grad_weight *= d.dropout_factor(words, first + j);
      accumulate<SPLIT>(weight * (grad_weight - query_delta), k + j * kWidth,
                        accumulator);
    }
  }
  store_channels<SPLIT>(accumulator, d.width, exists, scale,
                        grad_q + d.row(head, query, d.queries, 3));
}

// Backward of the keys and values. ``grad`` is the packed gradient of their stream.
template <typename S, int SPLIT>
__global__ void __launch_bounds__(kThreads)
    grad_kv_kernel(Direction<S> d, const S* grad_out, const float* lse,
                   const float* delta, S* grad) {
  constexpr int kWidth = SPLIT * kChannels, kTokens = kThreads / SPLIT;
  __shared__ float q[kTile * kWidth], g[kTile * kWidth];
  __shared__ float tile_lse[kTile], tile_delta[kTile];
  __shared__ uint64_t words[kTile];
  const int64_t blocks = (d.keys + kTokens - 1) / kTokens;
  const int64_t head = blockIdx.x / blocks;
  const int64_t key = blockIdx.x % blocks * kTokens + threadIdx.x / SPLIT;
  const bool exists = key < d.keys;
  const int64_t channels = d.heads * d.width;
  const float scale = rsqrtf(float(d.width));
  float k[kChannels], v[kChannels], grad_k[kChannels] = {}, grad_v[kChannels] = {};
  load_channels<SPLIT>(d.k(head) + key * d.kv_stride, d.width, exists, kLog2E * scale,
                       k);
  load_channels<SPLIT>(d.v(head) + key * d.kv_stride, d.width, exists, 1.f, v);
  const S* grad_rows = grad_out + d.row(head, 0, d.queries);

  for (int64_t first = 0; first < d.queries; first += kTile) {
    __syncthreads();
    load_tile<SPLIT>(d.q(head), d.q_stride, first, d.queries, d.width, q);
    load_tile<SPLIT>(grad_rows, channels, first, d.queries, d.width, g);
    if (threadIdx.x < kTile) {
      const int64_t query = first + threadIdx.x;
      const bool query_exists = query < d.queries;
      tile_lse[threadIdx.x] = query_exists ? lse[head * d.queries + query] : 0;
      tile_delta[threadIdx.x] = query_exists ? delta[head * d.queries + query] : 0;
      words[threadIdx.x] = d.seed ? d.random_words(head, query) : 0;
    }
    __syncthreads();
    for (int j = 0; j < kTile; ++j) {
      const float score = dot<SPLIT>(k, q + j * kWidth);
      const float weight = first + j < d.queries ? exp2f(score - tile_lse[j]) : 0.f;
      const float grad_weight = dot<SPLIT>(v, g + j * kWidth);
      const float factor = d.seed ? d.dropout_factor(words[j], key) : 1.f;
      accumulate<SPLIT>(weight * factor, g + j * kWidth, grad_v);
      accumulate<SPLIT>(weight * (grad_weight * factor - tile_delta[j]), q + j * kWidth,
                        grad_k);
    }
  }
  S* row = grad + d.row(head, key, d.keys, 3);
  store_channels<SPLIT>(grad_k, d.width, exists, scale, row + channels);
  store_channels<SPLIT>(grad_v, d.width, exists, 1.f, row + 2 * channels);
}

// The number of blocks of a launch, for the tokens of ``heads`` heads.
inline int64_t num_blocks(int64_t heads, int64_t tokens, int split) {
  const int64_t block_tokens = kThreads / split;
  return heads * ((tokens + block_tokens - 1) / block_tokens);
}

}  // namespace dsnet
