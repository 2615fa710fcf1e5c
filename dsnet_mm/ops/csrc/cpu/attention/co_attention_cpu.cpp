// dsnet_mm::co_attention and dsnet_mm::self_attention on the CPU: how the work is
// divided among threads. attention_kernel.h has the equations.
//
// Co-attention has two directions: the queries of one stream attend to the keys and
// values of the other. Self-attention is one direction, of a stream with itself.
//
// Forward: a task is a range of queries of one head in one direction, with all keys.
// Backward: a task is a chunk of the longer stream and all of the shorter stream, of
// one head in one direction.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <optional>

#include "../../co_attention.h"

namespace dsnet {

constexpr int64_t kTaskQueries = 256;   // Queries of a forward task, about.
constexpr int64_t kQueryGroup = 32;     // Queries of a matrix product, at most.
constexpr int64_t kKeyBlock = 128;      // Keys of a block in the forward.
constexpr int64_t kBackwardBlock = 64;  // Queries, and keys, of one in the backward.

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

}  // namespace dsnet

#define DSNET_KERNEL "../attention/attention_kernel.h"
#include "../common/amx.h"
#include "../common/each_isa.h"
#ifdef DSNET_AMX
DSNET_AMX_BEGIN
#include "../common/amx_operands.h"
#include "attention_amx.h"
DSNET_AMX_END
#endif

namespace dsnet {
namespace {

// The best kernels of a type. Those of AMX have no dropout in the forward.
template <typename S>
auto forward_kernel(bool dropout) {
#ifdef DSNET_AMX
  if constexpr (std::is_same_v<S, at::BFloat16>)
    if (!dropout && amx::available()) return amx::attend_forward;
#endif
  return DSNET_BEST(attend_forward<S>);
}

template <typename S>
auto backward_kernel() {
#ifdef DSNET_AMX
  if constexpr (std::is_same_v<S, at::BFloat16>)
    if (amx::available()) return amx::attend_backward;
#endif
  return DSNET_BEST(attend_backward<S>);
}

// Runs tasks of unequal length on all threads: a free thread runs the next task.
template <typename Task>
void run_tasks(int64_t count, const Task& task) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) task(i);
  });
}

// The streams, and each direction as a list of heads. A direction is named by the
// stream of its queries, 0 the local and 1 the global one. For self-attention, both
// streams are the same, and there is direction 0 only.
struct Streams {
  Streams(const Tensor& local_qkv, const Tensor& global_qkv, int directions,
          int64_t heads, double dropout_p, const Tensor& seed)
      : samples(local_qkv.size(0)),
        heads(heads),
        channels(local_qkv.size(2) / 3),
        width(channels / heads),
        tokens{local_qkv.size(1), global_qkv.size(1)},
        qkv{local_qkv, global_qkv},
        directions(directions) {
    if (dropout_p > 0) dropout = make_dropout(dropout_p, seed.item<int64_t>());
  }

  int64_t count() const { return samples * heads; }

  // Where head ``i`` of all samples begins: in part 0, 1, 2 of packed q, k, v, or in a
  // tensor (N, L, C), which has one part. The last axis is contiguous.
  template <typename S>
  S* rows(const Tensor& x, int64_t i, int part = 0) const {
    return const_cast<S*>(x.const_data_ptr<S>()) + i / heads * x.stride(0) +
           part * channels + i % heads * width;
  }

  template <typename S>
  Head<S> head(int direction, int64_t i) const {
    const Tensor &queries = qkv[direction], &keys = qkv[1 - direction];
    return {
        rows<S>(queries, i, 0),
        rows<S>(keys, i, 1),
        rows<S>(keys, i, 2),
        queries.stride(1),
        keys.stride(1),
        tokens[1 - direction],
        width,
        static_cast<uint64_t>(direction * count() * tokens[0] + i * tokens[direction]),
        dropout ? &*dropout : nullptr};
  }

  const int64_t samples, heads, channels, width, tokens[2];
  const Tensor qkv[2];
  const int directions;
  std::optional<Dropout> dropout;
};

template <typename S>
void forward(const Streams& s, const Tensor (&out)[2], const Tensor (&lse)[2]) {
  using T = at::opmath_type<S>;
  // Longer tasks are faster, as long as there are several for each thread.
  const int64_t all = s.count() * (s.tokens[0] + s.tokens[1]);
  const int64_t queries =
      std::clamp(all / (4 * at::get_num_threads()), kQueryGroup, kTaskQueries);
  // Ranges of nearly equal length.
  int64_t length[2], ranges[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t wanted = std::max<int64_t>((s.tokens[i] + queries / 2) / queries, 1);
    length[i] = round_up(ceil_div(s.tokens[i], wanted), kQueryGroup);
    ranges[i] = i < s.directions ? ceil_div(s.tokens[i], length[i]) : 0;
  }
  // The tasks with more keys come first, so that all threads end at about the same
  // time.
  const int leading = s.tokens[0] > s.tokens[1];
  const int64_t split = s.count() * ranges[leading];
  const auto kernel = forward_kernel<S>(s.dropout.has_value());
  run_tasks(s.count() * (ranges[0] + ranges[1]), [&](int64_t i) {
    const int direction = i < split ? leading : 1 - leading;
    if (i >= split) i -= split;
    const int64_t h = i / ranges[direction];
    const int64_t first = i % ranges[direction] * length[direction];
    const int64_t count = std::min(length[direction], s.tokens[direction] - first);
    const int64_t stride = out[direction].stride(1);
    in_scratch(kernel, s.head<S>(direction, h), first, count,
               s.rows<S>(out[direction], h) + first * stride, stride,
               lse[direction].data_ptr<T>() + h * s.tokens[direction] + first);
  });
}

// The gradients that a task computes for its chunk of the longer stream are complete.
// Those for the shorter stream are one term of a sum over the chunks: they go to
// ``partials`` and are summed afterwards. A chunk is about as long as the shorter
// stream or longer, so all partials together are about as long as the streams. Chunks
// depend on the shapes only, so sums do not depend on the number of threads.
template <typename S>
void backward(const Streams& s, const Tensor (&grad_out)[2], const Tensor (&out)[2],
              const Tensor (&lse)[2], const Tensor (&grad)[2]) {
  using T = at::opmath_type<S>;
  const int longer = s.tokens[1] > s.tokens[0], shorter = 1 - longer;
  const int64_t long_tokens = s.tokens[longer], short_tokens = s.tokens[shorter];
  // Kernels write whole vectors, or whole tiles of 32 x 32.
  const int64_t row = round_up(s.width, 32), short_rows = round_up(short_tokens, 64);
  const int64_t wanted = std::max<int64_t>(round_up(short_tokens, 64), 512);
  const int64_t chunks = ceil_div(long_tokens, wanted);
  const int64_t size = round_up(ceil_div(long_tokens, chunks), 64);
  const int64_t tasks = s.count() * chunks;
  // [head][chunk][q, k, v][token][channel]
  const Tensor partials = at::empty({tasks, 3, short_rows, row}, lse[0].options());
  const int64_t partial_size = short_rows * row;

  // Stores rows of a packed gradient. Part 0, 1, 2 of it is that of q, k, v.
  const auto store_rows = [&](int stream, int64_t h, int part, int64_t first,
                              int64_t count, const T* src) {
    const int64_t stride = grad[stream].stride(1);
    S* dst = s.rows<S>(grad[stream], h, part) + first * stride;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < s.width; ++c)
        dst[r * stride + c] = static_cast<S>(src[r * row + c]);
  };

  const auto kernel = backward_kernel<S>();
  run_tasks(s.directions * tasks, [&](int64_t i) {
    const int64_t task = i / s.directions, h = task / chunks;
    const int64_t begin = task % chunks * size;
    const int64_t end = std::min(begin + size, long_tokens);
    const int direction = i % s.directions ? shorter : longer;
    T* partial = partials.data_ptr<T>() + task * 3 * partial_size;
    in_scratch([&](Arena& arena) {
      // The gradients of the chunk: of its queries, or of its keys and values.
      T* chunk = arena.allocate<T>(size * row);
      T* chunk_v = arena.allocate<T>(size * row);
      const auto attend = [&](auto... ranges_and_gradients) {
        kernel(s.head<S>(direction, h), s.rows<S>(out[direction], h),
               out[direction].stride(1), s.rows<S>(grad_out[direction], h),
               grad_out[direction].stride(1),
               lse[direction].data_ptr<T>() + h * s.tokens[direction],
               ranges_and_gradients..., row, arena);
      };
      if (direction == longer)
        attend(begin, end, 0, short_tokens, chunk, partial + partial_size,
               partial + 2 * partial_size);
      else
        attend(0, short_tokens, begin, end, partial, chunk, chunk_v);
      if (arena.counts()) return;
      store_rows(longer, h, direction == longer ? 0 : 1, begin, end - begin, chunk);
      if (direction == shorter) store_rows(longer, h, 2, begin, end - begin, chunk_v);
    });
  });

  at::parallel_for(0, s.count() * 3, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      // Self-attention has no second direction, whose queries are the shorter stream's.
      if (s.directions == 1 && i % 3 == 0) continue;
      T* sum = partials.data_ptr<T>() + (i / 3 * chunks * 3 + i % 3) * partial_size;
      for (int64_t chunk = 1; chunk < chunks; ++chunk) {
        const T* partial = sum + chunk * 3 * partial_size;
        for (int64_t j = 0; j < short_tokens * row; ++j) sum[j] += partial[j];
      }
      store_rows(shorter, i / 3, i % 3, 0, short_tokens, sum);
    }
  });
}

// ------------------------------------------------------------------- operators

Outputs forward(const Streams& s) {
  Tensor out[2], lse[2];
  for (int i = 0; i < s.directions; ++i) {
    const auto options = s.qkv[i].options();
    out[i] = at::empty({s.samples, s.tokens[i], s.channels}, options);
    lse[i] = at::empty({s.samples, s.heads, s.tokens[i]},
                       options.dtype(at::toOpMathType(s.qkv[i].scalar_type())));
  }
  if (s.samples > 0)
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, s.qkv[0].scalar_type(),
                                    "attention",
                                    [&] { forward<scalar_t>(s, out, lse); });
  return {out[0], out[1], lse[0], lse[1]};
}

void backward(const Streams& s, const Tensor (&grad_out)[2], const Tensor (&out)[2],
              const Tensor (&lse)[2], const Tensor (&grad)[2]) {
  if (s.samples > 0)
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, s.qkv[0].scalar_type(), "attention_backward",
        [&] { backward<scalar_t>(s, grad_out, out, lse, grad); });
}

Outputs co_attention_cpu(const Tensor& local_qkv, const Tensor& global_qkv,
                         const Tensor& seed, int64_t num_heads, double dropout_p) {
  return forward({local_qkv, global_qkv, 2, num_heads, dropout_p, seed});
}

Gradients co_attention_backward_cpu(const Tensor& grad_local, const Tensor& grad_global,
                                    const Tensor& local_qkv, const Tensor& global_qkv,
                                    const Tensor& local_out, const Tensor& global_out,
                                    const Tensor& local_lse, const Tensor& global_lse,
                                    const Tensor& seed, int64_t num_heads,
                                    double dropout_p) {
  const Tensor grad[2] = {at::empty(local_qkv.sizes(), local_qkv.options()),
                          at::empty(global_qkv.sizes(), global_qkv.options())};
  backward({local_qkv, global_qkv, 2, num_heads, dropout_p, seed},
           {grad_local, grad_global}, {local_out, global_out}, {local_lse, global_lse},
           grad);
  return {grad[0], grad[1]};
}

std::tuple<Tensor, Tensor> self_attention(const Tensor& qkv, const Tensor& seed,
                                          int64_t num_heads, double dropout_p) {
  check_attention("self_attention", qkv, qkv, seed, num_heads, dropout_p);
  const Tensor x = with_rows(qkv);
  const Outputs outputs = forward({x, x, 1, num_heads, dropout_p, seed});
  return {std::get<0>(outputs), std::get<2>(outputs)};
}

Tensor self_attention_backward(const Tensor& grad, const Tensor& qkv, const Tensor& out,
                               const Tensor& lse, const Tensor& seed, int64_t num_heads,
                               double dropout_p) {
  check_attention("self_attention_backward", qkv, qkv, seed, num_heads, dropout_p);
  TORCH_CHECK(
      is_output(grad, qkv) && is_output(out, qkv) && is_lse(lse, qkv, num_heads),
      "self_attention_backward takes what self_attention returned and a "
      "gradient of its first output, got ",
      grad.sizes(), ", ", out.sizes(), " and ", lse.sizes());
  const Tensor x = with_rows(qkv), result = at::empty(x.sizes(), x.options());
  backward({x, x, 1, num_heads, dropout_p, seed}, {with_rows(grad)}, {with_rows(out)},
           {lse.contiguous()}, {result, result});
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dsnet_mm, m) {
  m.def(
      "self_attention(Tensor qkv, Tensor seed, int num_heads, float dropout_p) -> "
      "(Tensor, Tensor)");
  m.def(
      "self_attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, "
      "Tensor seed, int num_heads, float dropout_p) -> Tensor");
}

TORCH_LIBRARY_IMPL(dsnet_mm, CPU, m) {
  m.impl("self_attention", self_attention);
  m.impl("self_attention_backward", self_attention_backward);
}

REGISTER_DEVICE_IMPL(co_attention, CPU, co_attention_cpu);
REGISTER_DEVICE_IMPL(co_attention_backward, CPU, co_attention_backward_cpu);

}  // namespace dsnet
