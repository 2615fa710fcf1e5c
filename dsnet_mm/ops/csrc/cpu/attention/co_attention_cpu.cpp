// dsnet_mm::co_attention and dsnet_mm::self_attention on the CPU: how the work is
// divided among threads. attention_kernel.h has the equations.
//
// Co-attention has two directions: the queries of one stream attend to the keys and
// values of the other. Self-attention is one direction, of a stream with itself.
//
// Forward: a task is a range of queries of one head in one direction, with all keys.
// Backward: a task is a chunk of the longer stream and all of the shorter stream, of
// one head in one direction. Each thread works in its own scratch memory.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../../co_attention.h"
#include "../../dropout.h"
#include "../common/memory.h"

namespace dsnet {

constexpr int64_t kTaskQueries = 256;  // Queries of a forward task, about.
constexpr int64_t kMaxTaskQueries = kTaskQueries * 3 / 2 + 64;  // The largest task.
constexpr int64_t kQueryGroup = 32;  // Queries of a matrix product, at most.
constexpr int64_t kKeyBlock = 128;   // Keys of a block in the forward.
constexpr int64_t kBackwardBlock =
    64;  // Queries, and keys, of a block in the backward.

alignas(64) constexpr uint32_t kIota[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                            8, 9, 10, 11, 12, 13, 14, 15};

// One head of one sample, in one direction.
template <typename S>
struct Head {
  const S *q, *k, *v;
  int64_t q_stride, kv_stride;  // from token to token
  int64_t keys, width;
  uint64_t first_query;    // number of the first query among all, for dropout
  const Dropout* dropout;  // or null
};

// Bytes that are enough for the forward or the backward of a head of this width, in any
// type and with AMX.
int64_t arena_size(int64_t width) {
  const int64_t padded = (width + 15) / 16 * 16;
  const int64_t forward_rows = 2 * kMaxTaskQueries + 2 * kKeyBlock + kQueryGroup;
  const int64_t forward_numbers = kQueryGroup * kKeyBlock + 2 * kMaxTaskQueries;
  return 8 * (std::max(forward_rows, 6 * kBackwardBlock) * padded +
              std::max(forward_numbers, 2 * kBackwardBlock * kBackwardBlock)) +
         64 * 64;
}

}  // namespace dsnet

#define DSNET_KERNEL "../attention/attention_kernel.h"
#include "../common/amx.h"
#include "../common/each_isa.h"
#ifdef DSNET_AMX
DSNET_AMX_BEGIN
#include "attention_amx.h"
DSNET_AMX_END
#endif

namespace dsnet {
namespace {

// The type of sums and of lse.
template <typename S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

// Runs tasks of unequal length on all threads: a free thread runs the next task.
template <typename Task>
void run_tasks(int64_t count, int64_t bytes, const Task& task) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    char* memory = scratch(bytes);
    for (int64_t i = next++; i < count; i = next++) task(i, memory);
  });
}

// The streams, and each direction as a list of heads. A direction is named by the
// stream of its queries, 0 the local and 1 the global one. For self-attention, both
// streams are the same, and there is direction 0 only.
template <typename S>
struct Streams {
  Streams(const Tensor& local_qkv, const Tensor& global_qkv, int64_t heads,
          double dropout_p, const Tensor& seed)
      : samples(local_qkv.size(0)),
        heads(heads),
        channels(local_qkv.size(2) / 3),
        tokens{local_qkv.size(1), global_qkv.size(1)},
        qkv{local_qkv, global_qkv} {
    if (dropout_p > 0) {
      dropout = make_dropout(dropout_p, seed.item<int64_t>());
      has_dropout = true;
    }
  }

  int64_t width() const { return channels / heads; }
  int64_t count() const { return samples * heads; }

  // Head ``i`` of all samples, in one direction.
  Head<S> head(int direction, int64_t i) const {
    const auto part = [&](const Tensor& x, int64_t n) {
      return x.const_data_ptr<S>() + i / heads * x.stride(0) + n * channels +
             i % heads * width();
    };
    const Tensor &queries = qkv[direction], &keys = qkv[1 - direction];
    return {
        part(queries, 0),
        part(keys, 1),
        part(keys, 2),
        queries.stride(1),
        keys.stride(1),
        tokens[1 - direction],
        width(),
        static_cast<uint64_t>(direction * count() * tokens[0] + i * tokens[direction]),
        has_dropout ? &dropout : nullptr};
  }

  int64_t samples, heads, channels, tokens[2];
  Tensor qkv[2];
  Dropout dropout{};
  bool has_dropout = false;
};

// Where the rows of a head begin in a tensor (N, L, C) whose last axis is contiguous.
template <typename S>
S* rows_of(const Tensor& x, int64_t head, int64_t heads) {
  const int64_t width = x.size(2) / heads;
  return const_cast<S*>(x.const_data_ptr<S>()) + head / heads * x.stride(0) +
         head % heads * width;
}

template <typename S>
void forward(const Streams<S>& s, Tensor (&out)[2], Tensor (&lse)[2],
             int directions = 2) {
  using T = Compute<S>;
  // Longer tasks are faster, as long as there are several for each thread.
  const int64_t all = s.count() * (s.tokens[0] + s.tokens[1]);
  const int64_t queries =
      std::clamp(all / (4 * at::get_num_threads()), kQueryGroup, kTaskQueries);
  // Ranges of nearly equal length.
  int64_t length[2], ranges[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t wanted = std::max<int64_t>((s.tokens[i] + queries / 2) / queries, 1);
    length[i] = ceil_div(ceil_div(s.tokens[i], wanted), kQueryGroup) * kQueryGroup;
    ranges[i] = i < directions ? ceil_div(s.tokens[i], length[i]) : 0;
  }
  // The tasks with more keys come first, so that all threads end at about the same
  // time.
  const int leading = s.tokens[0] > s.tokens[1];
  const int64_t split = s.count() * ranges[leading];
  const int64_t tasks = s.count() * (ranges[0] + ranges[1]);
  run_tasks(tasks, arena_size(s.width()), [&](int64_t i, char* memory) {
    const int direction = i < split ? leading : 1 - leading;
    if (i >= split) i -= split;
    const int64_t h = i / ranges[direction];
    const int64_t first = i % ranges[direction] * length[direction];
    const int64_t count = std::min(length[direction], s.tokens[direction] - first);
    const int64_t stride = out[direction].stride(1);
    const Head<S> head = s.head(direction, h);
    S* o = rows_of<S>(out[direction], h, s.heads) + first * stride;
    T* l = lse[direction].data_ptr<T>() + h * s.tokens[direction] + first;
#ifdef DSNET_AMX
    if constexpr (std::is_same_v<S, at::BFloat16>)
      if (!head.dropout && amx::available())
        return amx::attend_forward(head, first, count, o, stride, l, memory);
#endif
    DSNET_DISPATCH(attend_forward, head, first, count, o, stride, l, memory);
  });
}

// The kernel of the best instructions, with AMX where it can be used.
template <typename S, typename... Args>
void attend_backward(const Head<S>& head, Args... args) {
#ifdef DSNET_AMX
  if constexpr (std::is_same_v<S, at::BFloat16>)
    if (amx::available())
      return avx512::attend_backward<S, float, amx::PackedBlock>(head, args...);
#endif
  DSNET_DISPATCH(attend_backward, head, args...);
}

// The gradients that a task computes for its chunk of the longer stream are complete.
// Those for the shorter stream are one term of a sum over the chunks: they go to
// ``partials`` and are summed afterwards. A chunk is about as long as the shorter
// stream or longer, so all partials together are about as long as the streams. Chunks
// depend on the shapes only, so sums do not depend on the number of threads.
template <typename S>
void backward(const Streams<S>& s, const Tensor (&grad_out)[2], const Tensor (&out)[2],
              const Tensor (&lse)[2], Tensor (&grad)[2], int directions = 2) {
  using T = Compute<S>;
  const int longer = s.tokens[1] > s.tokens[0], shorter = 1 - longer;
  const int64_t long_tokens = s.tokens[longer], short_tokens = s.tokens[shorter];
  const int64_t width = s.width(), lanes = vector_bytes() / sizeof(T);
  const int64_t padded = ceil_div(width, lanes) * lanes;  // as in attend_backward
  const int64_t wanted = std::max<int64_t>(ceil_div(short_tokens, 64) * 64, 512);
  const int64_t chunks = ceil_div(long_tokens, wanted);
  const int64_t size = ceil_div(ceil_div(long_tokens, chunks), 64) * 64;
  const int64_t tasks = s.count() * chunks;
  // [head][chunk][q, k, v][token][channel]
  const Tensor partials = at::empty({tasks, 3, short_tokens, padded}, lse[0].options());
  const int64_t partial_size = short_tokens * padded;

  // Stores rows of a packed gradient. Part 0, 1, 2 of it is that of q, k, v.
  const auto store_rows = [&](int stream, int64_t h, int part, int64_t first,
                              int64_t count, const T* src, int64_t src_stride) {
    const int64_t stride = grad[stream].stride(1);
    S* dst = grad[stream].data_ptr<S>() + h / s.heads * grad[stream].stride(0) +
             part * s.channels + h % s.heads * width + first * stride;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < width; ++c)
        dst[r * stride + c] = static_cast<S>(src[r * src_stride + c]);
  };

  const int64_t bytes = arena_size(width) +
                        (2 * size * padded + std::max(size, short_tokens)) * sizeof(T);
  run_tasks(directions * tasks, bytes, [&](int64_t i, char* memory) {
    T* grad_chunk = reinterpret_cast<T*>(memory);  // of q, or of k and v
    memory += 2 * size * padded * sizeof(T);
    const int64_t task = i / directions, h = task / chunks;
    const int64_t begin = task % chunks * size;
    const int64_t end = std::min(begin + size, long_tokens);
    T* partial = partials.data_ptr<T>() + task * 3 * partial_size;
    const int direction = i % directions ? shorter : longer;
    const Head<S> head = s.head(direction, h);
    const int64_t stride = out[direction].stride(1);
    const int64_t grad_stride = grad_out[direction].stride(1);
    const S* o = rows_of<S>(out[direction], h, s.heads);
    const S* g = rows_of<S>(grad_out[direction], h, s.heads);
    const T* l = lse[direction].data_ptr<T>() + h * s.tokens[direction];
    if (direction == longer) {
      attend_backward(head, o, stride, g, grad_stride, l, begin, end, int64_t(0),
                      short_tokens, grad_chunk, partial + partial_size,
                      partial + 2 * partial_size, padded, memory);
      store_rows(longer, h, 0, begin, end - begin, grad_chunk, padded);
    } else {
      T* grad_v = grad_chunk + size * padded;
      attend_backward(head, o, stride, g, grad_stride, l, int64_t(0), short_tokens,
                      begin, end, partial, grad_chunk, grad_v, padded, memory);
      store_rows(longer, h, 1, begin, end - begin, grad_chunk, padded);
      store_rows(longer, h, 2, begin, end - begin, grad_v, padded);
    }
  });

  at::parallel_for(0, s.count() * 3, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      // Self-attention has no second direction, whose queries are the shorter stream's.
      if (directions == 1 && i % 3 == 0) continue;
      T* sum = partials.data_ptr<T>() + (i / 3 * chunks * 3 + i % 3) * partial_size;
      for (int64_t chunk = 1; chunk < chunks; ++chunk) {
        const T* partial = sum + chunk * 3 * partial_size;
        for (int64_t j = 0; j < partial_size; ++j) sum[j] += partial[j];
      }
      store_rows(shorter, i / 3, i % 3, 0, short_tokens, sum, padded);
    }
  });
}

}  // namespace

Outputs co_attention_cpu(const Tensor& local_qkv, const Tensor& global_qkv,
                         const Tensor& seed, int64_t num_heads, double dropout_p) {
  const auto options = local_qkv.options();
  const auto exact =
      options.dtype(options.dtype() == at::kDouble ? at::kDouble : at::kFloat);
  const int64_t n = local_qkv.size(0), channels = local_qkv.size(2) / 3;
  const int64_t l = local_qkv.size(1), g = global_qkv.size(1);
  Tensor out[2] = {at::empty({n, l, channels}, options),
                   at::empty({n, g, channels}, options)};
  Tensor lse[2] = {at::empty({n, num_heads, l}, exact),
                   at::empty({n, num_heads, g}, exact)};
  if (n > 0)
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, local_qkv.scalar_type(), "co_attention", [&] {
          forward(Streams<scalar_t>(local_qkv, global_qkv, num_heads, dropout_p, seed),
                  out, lse);
        });
  return {out[0], out[1], lse[0], lse[1]};
}

void check_self(const Tensor& qkv, const Tensor& seed, int64_t num_heads,
                double dropout_p) {
  TORCH_CHECK(qkv.dim() == 3 && qkv.size(1) > 0 && num_heads > 0 && qkv.size(2) > 0 &&
                  qkv.size(2) % (3 * num_heads) == 0 && 0 <= dropout_p &&
                  dropout_p < 1 && seed.scalar_type() == at::kLong && seed.numel() == 1,
              "self_attention takes (N, L, 3 * C) with C a multiple of num_heads=",
              num_heads, ", one int64 number, and a dropout in [0, 1), got ",
              qkv.sizes(), ", ", seed.sizes(), " and ", dropout_p);
}

std::tuple<Tensor, Tensor> self_attention_cpu(const Tensor& qkv, const Tensor& seed,
                                              int64_t num_heads, double dropout_p) {
  check_self(qkv, seed, num_heads, dropout_p);
  const Tensor x = with_rows(qkv);
  const auto exact = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const int64_t n = x.size(0), l = x.size(1);
  Tensor out[2] = {at::empty({n, l, x.size(2) / 3}, x.options())};
  Tensor lse[2] = {at::empty({n, num_heads, l}, x.options().dtype(exact))};
  if (n > 0)
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, x.scalar_type(), "self_attention", [&] {
          forward(Streams<scalar_t>(x, x, num_heads, dropout_p, seed), out, lse, 1);
        });
  return {out[0], lse[0]};
}

Tensor self_attention_backward_cpu(const Tensor& grad, const Tensor& qkv,
                                   const Tensor& out, const Tensor& lse,
                                   const Tensor& seed, int64_t num_heads,
                                   double dropout_p) {
  check_self(qkv, seed, num_heads, dropout_p);
  TORCH_CHECK(
      is_output(grad, qkv) && is_output(out, qkv) && is_lse(lse, qkv, num_heads),
      "self_attention_backward takes what self_attention returned and a "
      "gradient of its first output, got ",
      grad.sizes(), ", ", out.sizes(), " and ", lse.sizes());
  const Tensor x = with_rows(qkv), g = with_rows(grad), o = with_rows(out);
  const Tensor gs[2] = {g, g}, outs[2] = {o, o},
               lses[2] = {lse.contiguous(), lse.contiguous()};
  const Tensor result = at::empty(x.sizes(), x.options());
  Tensor results[2] = {result, result};
  if (x.size(0) > 0)
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, x.scalar_type(), "self_attention_backward", [&] {
          backward(Streams<scalar_t>(x, x, num_heads, dropout_p, seed), gs, outs, lses,
                   results, 1);
        });
  return result;
}

Gradients co_attention_backward_cpu(const Tensor& grad_local, const Tensor& grad_global,
                                    const Tensor& local_qkv, const Tensor& global_qkv,
                                    const Tensor& local_out, const Tensor& global_out,
                                    const Tensor& local_lse, const Tensor& global_lse,
                                    const Tensor& seed, int64_t num_heads,
                                    double dropout_p) {
  const Tensor grad_out[2] = {grad_local, grad_global};
  const Tensor out[2] = {local_out, global_out};
  const Tensor lse[2] = {local_lse, global_lse};
  Tensor grad[2] = {at::empty(local_qkv.sizes(), local_qkv.options()),
                    at::empty(global_qkv.sizes(), global_qkv.options())};
  if (local_qkv.size(0) > 0)
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, local_qkv.scalar_type(), "co_attention_backward",
        [&] {
          backward(Streams<scalar_t>(local_qkv, global_qkv, num_heads, dropout_p, seed),
                   grad_out, out, lse, grad);
        });
  return {grad[0], grad[1]};
}

TORCH_LIBRARY_FRAGMENT(dsnet_mm, m) {
  m.def(
      "self_attention(Tensor qkv, Tensor seed, int num_heads, float dropout_p) -> "
      "(Tensor, Tensor)");
  m.def(
      "self_attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, "
      "Tensor seed, int num_heads, float dropout_p) -> Tensor");
}

TORCH_LIBRARY_IMPL(dsnet_mm, CPU, m) {
  m.impl("self_attention", self_attention_cpu);
  m.impl("self_attention_backward", self_attention_backward_cpu);
}

REGISTER_DEVICE_IMPL(co_attention_impl, CPU, co_attention_cpu);
REGISTER_DEVICE_IMPL(co_attention_backward_impl, CPU, co_attention_backward_cpu);

}  // namespace dsnet
