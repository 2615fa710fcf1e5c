// Co-attention on the CPU: what runs in parallel.

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

constexpr int64_t kQueries = 256;  // of a task, about, that share blocks of keys,
constexpr int64_t kTogether = 32;  // of these, at most, that are multiplied at a time,
constexpr int64_t kColumns = 128;  // and keys in such a block
constexpr int64_t kBlock = 64;     // queries, and keys, of a block in backward
constexpr int64_t kMost = kQueries * 3 / 2 + 64;  // queries that a task can get

alignas(64) constexpr uint32_t kIota[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                            8, 9, 10, 11, 12, 13, 14, 15};

// One head of one sample, in one direction.
template <typename S>
struct Head {
  const S *q, *k, *v;
  int64_t q_row, kv_row;  // strides
  int64_t keys, width;
  uint64_t row;            // number of its first query among all, for dropout
  const Dropout* dropout;  // or null
};

// Enough for either pass of a head of this width in double, and for AMX.
int64_t arena_size(int64_t width) {
  const int64_t padded = (width + 15) / 16 * 16;
  return 8 * (std::max(2 * kMost + 2 * kColumns + kTogether, 6 * kBlock) * padded +
              std::max(kTogether * kColumns + 2 * kMost, 2 * kBlock * kBlock)) +
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

template <typename S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

// Runs tasks of unequal length on all threads: whoever is free takes the next.
template <typename Task>
void run(int64_t count, int64_t bytes, const Task& task) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    char* memory = scratch(bytes);
    for (int64_t i = next++; i < count; i = next++) task(i, memory);
  });
}

// Both directions, each as a list of heads.
template <typename S>
struct Directions {
  Directions(const Tensor& local_qkv, const Tensor& global_qkv, int64_t heads,
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

  // Head ``i`` of stream ``reader``, 0 the local and 1 the global one.
  Head<S> head(int reader, int64_t i) const {
    const auto part = [&](const Tensor& x, int64_t n) {
      return x.const_data_ptr<S>() + i / heads * x.stride(0) + n * channels +
             i % heads * width();
    };
    const Tensor &own = qkv[reader], &other = qkv[1 - reader];
    return {part(own, 0),
            part(other, 1),
            part(other, 2),
            own.stride(1),
            other.stride(1),
            tokens[1 - reader],
            width(),
            static_cast<uint64_t>(reader * count() * tokens[0] + i * tokens[reader]),
            has_dropout ? &dropout : nullptr};
  }

  int64_t samples, heads, channels, tokens[2];
  Tensor qkv[2];
  Dropout dropout{};
  bool has_dropout = false;
};

// (N, L, C) -> where the rows of a head begin; C is contiguous.
template <typename S>
S* rows_of(const Tensor& x, int64_t head, int64_t heads) {
  const int64_t width = x.size(2) / heads;
  return const_cast<S*>(x.const_data_ptr<S>()) + head / heads * x.stride(0) +
         head % heads * width;
}

// Of both streams as readers, or of the first.
template <typename S>
void forward(const Directions<S>& d, Tensor (&out)[2], Tensor (&lse)[2],
             bool both = true) {
  using T = Compute<S>;
  // Longer tasks are faster, as long as there are several for each thread.
  const int64_t all = d.count() * (d.tokens[0] + d.tokens[1]);
  const int64_t queries =
      std::clamp(all / (4 * at::get_num_threads()), kTogether, kQueries);
  // Of nearly equal length. Every task reads all keys.
  int64_t length[2], parts[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t wanted = std::max<int64_t>((d.tokens[i] + queries / 2) / queries, 1);
    length[i] = ceil_div(ceil_div(d.tokens[i], wanted), kTogether) * kTogether;
    parts[i] = i == 0 || both ? ceil_div(d.tokens[i], length[i]) : 0;
  }
  // The longer tasks first: those that read the longer stream.
  const int order = d.tokens[0] > d.tokens[1];
  const int64_t split = d.count() * parts[order];
  const int64_t tasks = d.count() * (parts[0] + parts[1]);
  run(tasks, arena_size(d.width()), [&](int64_t i, char* memory) {
    const int reader = i < split ? order : 1 - order;
    if (i >= split) i -= split;
    const int64_t h = i / parts[reader], first = i % parts[reader] * length[reader];
    const int64_t count = std::min(length[reader], d.tokens[reader] - first);
    const int64_t row = out[reader].stride(1);
    const Head<S> head = d.head(reader, h);
    S* o = rows_of<S>(out[reader], h, d.heads) + first * row;
    T* l = lse[reader].data_ptr<T>() + h * d.tokens[reader] + first;
#ifdef DSNET_AMX
    if constexpr (std::is_same_v<S, at::BFloat16>)
      if (!head.dropout && amx::available())
        return amx::attend(head, first, count, o, row, l, memory);
#endif
    DSNET_BEST(attend, head, first, count, o, row, l, memory);
  });
}

// By the best instructions, as DSNET_BEST, and by AMX where it can be.
template <typename S, typename... Args>
void differentiate(const Head<S>& head, Args... args) {
#ifdef DSNET_AMX
  if constexpr (std::is_same_v<S, at::BFloat16>)
    if (amx::available())
      return avx512::differentiate<S, float, amx::Block>(head, args...);
#endif
  DSNET_BEST(differentiate, head, args...);
}

// A task takes a chunk of the longer stream and all of the shorter one. What it
// finds for its chunk is final; for the shorter stream the parts of all chunks
// are summed after. Chunks are about as long as the shorter stream or longer, so
// the parts together are about as long as the streams; and they depend on the
// shapes alone, so that sums do not change with the number of threads. Of streams that
// are one, only the first is a reader.
template <typename S>
void backward(const Directions<S>& d, const Tensor (&grad_out)[2],
              const Tensor (&out)[2], const Tensor (&lse)[2], Tensor (&grad)[2],
              bool both = true) {
  using T = Compute<S>;
  const int longer = d.tokens[1] > d.tokens[0], shorter = 1 - longer;
  const int64_t length = d.tokens[longer], rest = d.tokens[shorter];
  const int64_t width = d.width(), lanes = vector_bytes() / sizeof(T);
  // The length of a row in ``differentiate``, pad<T>(width).
  const int64_t padded = ceil_div(width, lanes) * lanes;
  const int64_t wanted = std::max<int64_t>(ceil_div(rest, 64) * 64, 512);
  const int64_t chunks = ceil_div(length, wanted);
  const int64_t size = ceil_div(ceil_div(length, chunks), 64) * 64;
  const int64_t tasks = d.count() * chunks;
  // Of the shorter stream, for each task: the gradients of q, k and v.
  const Tensor parts = at::empty({tasks, 3, rest, padded}, lse[0].options());
  const int64_t part_size = rest * padded;

  // Writes rows of a packed gradient: part 0, 1, 2 of it is q, k, v.
  const auto write = [&](int stream, int64_t h, int part, int64_t first, int64_t count,
                         const T* src, int64_t src_row) {
    const int64_t row = grad[stream].stride(1);
    S* dst = grad[stream].data_ptr<S>() + h / d.heads * grad[stream].stride(0) +
             part * d.channels + h % d.heads * width + first * row;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < width; ++c)
        dst[r * row + c] = static_cast<S>(src[r * src_row + c]);
  };

  const int64_t bytes =
      arena_size(width) + (2 * size * padded + std::max(size, rest)) * sizeof(T);
  const int readers = both ? 2 : 1;
  run(readers * tasks, bytes, [&](int64_t i, char* memory) {
    T* own = reinterpret_cast<T*>(memory);
    memory += 2 * size * padded * sizeof(T);
    const int64_t task = i / readers, h = task / chunks;
    const int64_t begin = task % chunks * size;
    const int64_t end = std::min(begin + size, length);
    T* part = parts.data_ptr<T>() + task * 3 * part_size;
    const int reader = i % readers ? shorter : longer;
    const Head<S> head = d.head(reader, h);
    const int64_t row = out[reader].stride(1), grad_row = grad_out[reader].stride(1);
    const S* o = rows_of<S>(out[reader], h, d.heads);
    const S* g = rows_of<S>(grad_out[reader], h, d.heads);
    const T* l = lse[reader].data_ptr<T>() + h * d.tokens[reader];
    if (reader == longer) {
      differentiate(head, o, row, g, grad_row, l, begin, end, int64_t(0), rest, own,
                    part + part_size, part + 2 * part_size, padded, memory);
      write(longer, h, 0, begin, end - begin, own, padded);
    } else {
      T* own_v = own + size * padded;
      differentiate(head, o, row, g, grad_row, l, int64_t(0), rest, begin, end, part,
                    own, own_v, padded, memory);
      write(longer, h, 1, begin, end - begin, own, padded);
      write(longer, h, 2, begin, end - begin, own_v, padded);
    }
  });

  at::parallel_for(0, d.count() * 3, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!both && i % 3 == 0) continue;  // no queries of the second stream
      T* sum = parts.data_ptr<T>() + (i / 3 * chunks * 3 + i % 3) * part_size;
      for (int64_t chunk = 1; chunk < chunks; ++chunk) {
        const T* part = sum + chunk * 3 * part_size;
        for (int64_t j = 0; j < part_size; ++j) sum[j] += part[j];
      }
      write(shorter, i / 3, i % 3, 0, rest, sum, padded);
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
          forward(
              Directions<scalar_t>(local_qkv, global_qkv, num_heads, dropout_p, seed),
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
          forward(Directions<scalar_t>(x, x, num_heads, dropout_p, seed), out, lse,
                  false);
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
          backward(Directions<scalar_t>(x, x, num_heads, dropout_p, seed), gs, outs,
                   lses, results, false);
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
          backward(
              Directions<scalar_t>(local_qkv, global_qkv, num_heads, dropout_p, seed),
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
