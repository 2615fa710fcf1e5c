// Device code of the co-attention, one direction. It includes nothing of
// PyTorch: nvcc compiles it alone, and tests/cuda_on_cpu runs it without a GPU.
//
// A query (in grad_kv_kernel, a key) belongs to PARTS neighbouring threads, each
// with every PARTS-th channel in registers; the other stream passes by in tiles
// of shared memory. Nothing is added atomically: results are deterministic.
#pragma once

#include "../dropout.h"

namespace dsnet {

constexpr int kThreads = 128;
constexpr int kTile = 16;      // tokens of the other stream
constexpr int kChannels = 32;  // of a thread
constexpr float kLog2E = 1.44269504f;

template <typename S>
struct Direction {
  const S *own, *other;  // packed projections; queries are those of ``own``
  int64_t own_sample, own_row, other_sample, other_row;  // strides
  int64_t queries, keys, heads, width;
  int64_t row;  // number of the first query among all, for dropout
  Dropout dropout;
  const int64_t* seed;  // or null: no dropout

  // Part 0, 1, 2 of a packed projection is q, k, v.
  __device__ const S* q(int64_t head) const {
    return own + head / heads * own_sample + head % heads * width;
  }
  __device__ const S* other_part(int64_t head, int part) const {
    return other + head / heads * other_sample + (part * heads + head % heads) * width;
  }
  __device__ uint64_t words(int64_t head, int64_t query) const {
    return query_words(*seed, row + head * queries + query);
  }
  // What a weight is multiplied by.
  __device__ float kept(uint64_t words, int64_t key) const {
    const uint32_t x =
        random_word(uint32_t(words), uint32_t(words >> 32), uint32_t(key));
    return x >= dropout.threshold ? float(dropout.scale) : 0.f;
  }
};

// Sum over the PARTS threads of a query.
template <int PARTS>
__device__ __forceinline__ float sum_parts(float x) {
  for (int step = 1; step < PARTS; step *= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// Rows [first, first + kTile) of a stream to shared memory, with zeros beyond
// its end and its width.
template <int PARTS, typename S>
__device__ void load_tile(const S* src, int64_t src_row, int64_t first, int64_t rows,
                          int64_t width, float* tile) {
  constexpr int kWidth = PARTS * kChannels;
  for (int i = threadIdx.x; i < kTile * kWidth; i += kThreads) {
    const int64_t row = first + i / kWidth, channel = i % kWidth;
    tile[i] = row < rows && channel < width
                  ? static_cast<float>(src[row * src_row + channel])
                  : 0.f;
  }
}

template <int PARTS, typename S>
__device__ void load_channels(const S* src, int64_t width, bool there, float factor,
                              float* x) {
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    const int channel = i * PARTS + threadIdx.x % PARTS;
    x[i] = there && channel < width ? static_cast<float>(src[channel]) * factor : 0.f;
  }
}

template <int PARTS, typename S>
__device__ void store_channels(const float* x, int64_t width, bool there, float factor,
                               S* dst) {
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    const int channel = i * PARTS + threadIdx.x % PARTS;
    if (there && channel < width) dst[channel] = static_cast<S>(x[i] * factor);
  }
}

template <int PARTS>
__device__ __forceinline__ float dot(const float* x, const float* row) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kChannels; ++i)
    sum += x[i] * row[i * PARTS + threadIdx.x % PARTS];
  return sum_parts<PARTS>(sum);
}

template <int PARTS>
__device__ __forceinline__ void add(float weight, const float* row, float* x) {
#pragma unroll
  for (int i = 0; i < kChannels; ++i)
    x[i] += weight * row[i * PARTS + threadIdx.x % PARTS];
}

// out = softmax(q k^T / sqrt(d)) v, lse = log2 of the softmax's denominator.
template <typename S, int PARTS>
__global__ void __launch_bounds__(kThreads)
    attend_kernel(Direction<S> d, S* out, float* lse) {
  constexpr int kWidth = PARTS * kChannels, kOwn = kThreads / PARTS;
  __shared__ float k[kTile * kWidth], v[kTile * kWidth];
  const int64_t blocks = (d.queries + kOwn - 1) / kOwn;
  const int64_t head = blockIdx.x / blocks;
  const int64_t query = blockIdx.x % blocks * kOwn + threadIdx.x / PARTS;
  const bool there = query < d.queries;
  float q[kChannels], sum[kChannels] = {}, top = -INFINITY, total = 0;
  load_channels<PARTS>(d.q(head) + query * d.own_row, d.width, there,
                       kLog2E * rsqrtf(float(d.width)), q);
  const uint64_t words = d.seed ? d.words(head, query) : 0;

  for (int64_t first = 0; first < d.keys; first += kTile) {
    __syncthreads();
    load_tile<PARTS>(d.other_part(head, 1), d.other_row, first, d.keys, d.width, k);
    load_tile<PARTS>(d.other_part(head, 2), d.other_row, first, d.keys, d.width, v);
    __syncthreads();
    float scores[kTile], peak = top;
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      const float s = dot<PARTS>(q, k + j * kWidth);
      scores[j] = first + j < d.keys ? s : -INFINITY;
      peak = fmaxf(peak, scores[j]);
    }
    const float shrink = exp2f(top - peak);
    top = peak;
    total *= shrink;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) sum[i] *= shrink;
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      float weight = exp2f(scores[j] - peak);
      total += weight;
      if (d.seed) weight *= d.kept(words, first + j);
      add<PARTS>(weight, v + j * kWidth, sum);
    }
  }
  const int64_t channels = d.heads * d.width;
  store_channels<PARTS>(
      sum, d.width, there, 1 / total,
      out + (head / d.heads * d.queries + query) * channels + head % d.heads * d.width);
  if (there && threadIdx.x % PARTS == 0)
    lse[head * d.queries + query] = top + log2f(total);
}

// Gradient of the queries, and delta = the product of each output with its
// gradient, which grad_kv_kernel needs. ``grad_q`` points at the q part of a
// packed gradient.
template <typename S, int PARTS>
__global__ void __launch_bounds__(kThreads)
    grad_q_kernel(Direction<S> d, const S* out, const S* grad_out, const float* lse,
                  float* delta, S* grad_q) {
  constexpr int kWidth = PARTS * kChannels, kOwn = kThreads / PARTS;
  __shared__ float k[kTile * kWidth], v[kTile * kWidth];
  const int64_t blocks = (d.queries + kOwn - 1) / kOwn;
  const int64_t head = blockIdx.x / blocks;
  const int64_t query = blockIdx.x % blocks * kOwn + threadIdx.x / PARTS;
  const bool there = query < d.queries;
  const int64_t channels = d.heads * d.width;
  const int64_t at =
      (head / d.heads * d.queries + query) * channels + head % d.heads * d.width;
  const float scale = rsqrtf(float(d.width));
  float q[kChannels], g[kChannels], sum[kChannels];
  load_channels<PARTS>(grad_out + at, d.width, there, 1.f, g);
  load_channels<PARTS>(out + at, d.width, there, 1.f, q);
  float product = 0;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    product += q[i] * g[i];
    sum[i] = 0;
  }
  product = sum_parts<PARTS>(product);
  if (there && threadIdx.x % PARTS == 0) delta[head * d.queries + query] = product;
  load_channels<PARTS>(d.q(head) + query * d.own_row, d.width, there, kLog2E * scale,
                       q);
  const float norm = there ? lse[head * d.queries + query] : 0;
  const uint64_t words = d.seed ? d.words(head, query) : 0;

  for (int64_t first = 0; first < d.keys; first += kTile) {
    __syncthreads();
    load_tile<PARTS>(d.other_part(head, 1), d.other_row, first, d.keys, d.width, k);
    load_tile<PARTS>(d.other_part(head, 2), d.other_row, first, d.keys, d.width, v);
    __syncthreads();
    for (int j = 0; j < kTile; ++j) {
      const float score = dot<PARTS>(q, k + j * kWidth);
      // A key beyond the end has the score 0, and exp2(0 - lse) may be infinite.
      const float weight = first + j < d.keys ? exp2f(score - norm) : 0.f;
      float slope = dot<PARTS>(g, v + j * kWidth);
      if (d.seed) slope *= d.kept(words, first + j);
      add<PARTS>(weight * (slope - product), k + j * kWidth, sum);
    }
  }
  store_channels<PARTS>(sum, d.width, there, scale,
                        grad_q + (head / d.heads * d.queries + query) * 3 * channels +
                            head % d.heads * d.width);
}

// Gradients of the keys and values; ``grad`` is the packed gradient of the
// stream that is read.
template <typename S, int PARTS>
__global__ void __launch_bounds__(kThreads)
    grad_kv_kernel(Direction<S> d, const S* grad_out, const float* lse,
                   const float* delta, S* grad) {
  constexpr int kWidth = PARTS * kChannels, kOwn = kThreads / PARTS;
  __shared__ float q[kTile * kWidth], g[kTile * kWidth];
  __shared__ float norms[kTile], products[kTile];
  __shared__ uint64_t words[kTile];
  const int64_t blocks = (d.keys + kOwn - 1) / kOwn;
  const int64_t head = blockIdx.x / blocks;
  const int64_t key = blockIdx.x % blocks * kOwn + threadIdx.x / PARTS;
  const bool there = key < d.keys;
  const int64_t channels = d.heads * d.width;
  const float scale = rsqrtf(float(d.width));
  float k[kChannels], v[kChannels], grad_k[kChannels] = {}, grad_v[kChannels] = {};
  load_channels<PARTS>(d.other_part(head, 1) + key * d.other_row, d.width, there,
                       kLog2E * scale, k);
  load_channels<PARTS>(d.other_part(head, 2) + key * d.other_row, d.width, there, 1.f,
                       v);
  const S* grad_rows =
      grad_out + head / d.heads * d.queries * channels + head % d.heads * d.width;

  for (int64_t first = 0; first < d.queries; first += kTile) {
    __syncthreads();
    load_tile<PARTS>(d.q(head), d.own_row, first, d.queries, d.width, q);
    load_tile<PARTS>(grad_rows, channels, first, d.queries, d.width, g);
    if (threadIdx.x < kTile) {
      const int64_t query = first + threadIdx.x;
      const bool is = query < d.queries;
      norms[threadIdx.x] = is ? lse[head * d.queries + query] : 0;
      products[threadIdx.x] = is ? delta[head * d.queries + query] : 0;
      words[threadIdx.x] = d.seed ? d.words(head, query) : 0;
    }
    __syncthreads();
    for (int j = 0; j < kTile; ++j) {
      const float score = dot<PARTS>(k, q + j * kWidth);
      const float weight = first + j < d.queries ? exp2f(score - norms[j]) : 0.f;
      const float slope = dot<PARTS>(v, g + j * kWidth);
      const float keep = d.seed ? d.kept(words[j], key) : 1.f;
      add<PARTS>(weight * keep, g + j * kWidth, grad_v);
      add<PARTS>(weight * (slope * keep - products[j]), q + j * kWidth, grad_k);
    }
  }
  S* row =
      grad + (head / d.heads * d.keys + key) * 3 * channels + head % d.heads * d.width;
  store_channels<PARTS>(grad_k, d.width, there, scale, row + channels);
  store_channels<PARTS>(grad_v, d.width, there, 1.f, row + 2 * channels);
}

inline int64_t blocks_of(int64_t heads, int64_t tokens, int parts) {
  const int64_t own = kThreads / parts;
  return heads * ((tokens + own - 1) / own);
}

}  // namespace dsnet
