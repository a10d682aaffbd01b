// SPDX-License-Identifier: Apache-2.0
// batch_norm_activation, forward and backward: two passes over the map each, one of sums and one that writes. Backward
// computes the normalised value and SiLU's derivative in both: that is less than half the time of writing the gradient
// behind SiLU and reading it again.
#include "batch_norm_blocks.h"

namespace mvit {
namespace MVIT_ISA {

// ---- the activation -------------------------------------------------------------------------------------------------

// y σ(y); rounding to bfloat16 is 30 times the estimate's error.
template <typename E, typename T>
MVIT_INLINE Vec<T> silu_to(Vec<T> y) {
#if MVIT_VECTOR_BYTES == 64
  if constexpr (sizeof(E) == 2)
    return y * Vec<float>(_mm512_maskz_rcp14_ps(-1, (Vec<float>(1.0f) + exp_of_minus(y)).native));
#endif
  return silu(y);
}

// ---- statistics -----------------------------------------------------------------------------------------------------

// Adds N sums of V vectors over `lines` lines to those in memory. add(d, sums) adds d, of a vector with its centre taken
// off; of the last vector the first n lanes are meant.
template <int V, int N, typename E, typename T, typename Add>
MVIT_INLINE void sum_lines(const E* x, int64_t lines, int64_t stride, int n, const T* centre, T* const (&sums)[N],
                           const Add& add) {
  constexpr int size = Vec<T>::size;
  Vec<T> middle[V], sum[V][N];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    middle[v] = load(centre + v * size);
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) sum[v][i] = load(sums[i] + v * size);
  }
  for (int64_t line = 0; line < lines; ++line, x += stride)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) add(load_first(x + v * size, v == V - 1 ? n : size) - middle[v], sum[v]);
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v)
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) store_first(sums[i] + v * size, sum[v][i], v == V - 1 ? n : size);
}

// The same for lines of any width.
template <int N, typename E, typename T, typename Add>
MVIT_INLINE void sum_stretch(const E* x, int64_t lines, int64_t width, const T* centre, T* const (&sums)[N],
                             const Add& add) {
  constexpr int size = Vec<T>::size;
  const int64_t stride = width;
  const auto at = [&](auto vectors, int64_t i, int n) {
    T* here[N];
    for (int s = 0; s < N; ++s) here[s] = sums[s] + i;
    sum_lines<decltype(vectors)::value>(x + i, lines, stride, n, centre + i, here, add);
  };
  int64_t i = 0;
  for (; i + kUnroll * size <= width; i += kUnroll * size) at(std::integral_constant<int, kUnroll>{}, i, size);
  if (i + kUnroll / 2 * size <= width) {
    at(std::integral_constant<int, kUnroll / 2>{}, i, size);
    i += kUnroll / 2 * size;
  }
  for (; i + size <= width; i += size) at(std::integral_constant<int, 1>{}, i, size);
  if (i < width) at(std::integral_constant<int, 1>{}, i, static_cast<int>(width - i));
}

// What the blocks leave for `combine`: two doubles a channel and block.
MVIT_INLINE double* sums_of(void* shared, int64_t block, int64_t channels) {
  return static_cast<double*>(shared) + 2 * block * channels;
}
template <typename T>
std::size_t shared_bytes(const Pixels& pixels) {
  return sizeof(double) * 2 * Blocks<T>(pixels).count * pixels.channels;
}

// Lines in scratch.
constexpr int kMostLines = 7;
template <typename T>
std::size_t scratch_bytes(const Pixels& pixels) {
  return sizeof(T) * kMostLines * Blocks<T>(pixels).room() + sizeof(double) * 2 * pixels.channels;
}
template <typename T>
struct Lines {
  T* memory;
  int64_t room;

  MVIT_INLINE Lines(void* memory, const Blocks<T>& blocks) : memory(static_cast<T*>(memory)), room(blocks.room()) {}
  MVIT_INLINE T* operator[](int i) const { return memory + i * room; }
  MVIT_INLINE void clear(int i) const { std::memset((*this)[i], 0, sizeof(T) * room); }
};

// Mean and sum of squared differences from it, for each block. Where |mean| ≫ σ the sum of squares would cancel, so a
// block is read twice, first for its mean and then around it. That mean starts from the block's first row, so that equal
// values have themselves as their mean, and no variance. Sums of huge values shrink on the way: the variance may be
// infinite, the mean not.
template <typename E, typename T>
void sum_statistics(const BatchNormActivation& args, int64_t begin, int64_t end, void* shared, void* scratch) {
  const Blocks<T> blocks(args.pixels);
  const Lines<T> lines(scratch, blocks);
  const int64_t channels = args.pixels.channels;
  T *const centre = lines[0], *const sum = lines[1], *const squares = lines[2], *const first = lines[3];
  const E* x = static_cast<const E*>(args.x);
  constexpr double kShrunk = 1 << 14;  // more than there are values of a channel in a block
  const auto shrink_and_add_rows = [&](T* line) {
    for (int64_t i = 0; i < blocks.room(); i += Vec<T>::size) store(line + i, load(line + i) * Vec<T>(T(1 / kShrunk)));
    add_rows(line, blocks);
  };
  for (int64_t block = begin; block < end; ++block) {
    const double count = static_cast<double>(blocks.rows_of(block));
    vectors_of<T>(channels, [&](int64_t i, int n) {
      store_first(first + i, load_first(x + blocks.start(block) + i, n), n);
    });
    repeat(centre, first, blocks);
    lines.clear(1);
    T* const one[1] = {sum};
    blocks.stretches(block, [&](int64_t offset, int64_t count, int64_t width) {
      sum_stretch(x + offset, count, width, centre, one, [](Vec<T> d, Vec<T>(&sums)[1]) { sums[0] = sums[0] + d; });
    });
    shrink_and_add_rows(sum);
    for (int64_t c = 0; c < channels; ++c) first[c] = static_cast<T>(first[c] + sum[c] * kShrunk / count);
    repeat(centre, first, blocks);
    lines.clear(1);
    lines.clear(2);
    T* const two[2] = {sum, squares};
    blocks.stretches(block, [&](int64_t offset, int64_t count, int64_t width) {
      sum_stretch(x + offset, count, width, centre, two, [](Vec<T> d, Vec<T>(&sums)[2]) {
        sums[0] = sums[0] + d;
        sums[1] = fma(d, d, sums[1]);
      });
    });
    shrink_and_add_rows(sum);
    add_rows(squares, blocks);
    double *__restrict means = sums_of(shared, block, channels), *__restrict spreads = means + channels;
    for (int64_t c = 0; c < channels; ++c) {
      const double rest = sum[c] * kShrunk;
      means[c] = first[c] + rest / count;
      spreads[c] = squares[c] - rest * rest / count;
    }
  }
}

// Chan et al. 1983: the mean and the squared differences of two samples together.
template <typename T>
void combine_statistics(const BatchNormActivation& args, void* shared, void*) {
  const Blocks<T> blocks(args.pixels);
  const int64_t channels = args.pixels.channels;
  double *__restrict mean = sums_of(shared, 0, channels), *__restrict spread = mean + channels;
  double count = static_cast<double>(blocks.rows_of(0));
  for (int64_t block = 1; block < blocks.count; ++block) {
    const double *__restrict means = sums_of(shared, block, channels), *__restrict spreads = means + channels;
    const double more = static_cast<double>(blocks.rows_of(block)), share = more / (count + more);
    const double between = count * share;
    for (int64_t c = 0; c < channels; ++c) {
      const double difference = means[c] - mean[c];
      mean[c] += difference * share;
      spread[c] += spreads[c] + difference * difference * between;
    }
    count += more;
  }
  T *out_mean = static_cast<T*>(args.mean), *rstd = static_cast<T*>(args.rstd), *variance = static_cast<T*>(args.variance);
  for (int64_t c = 0; c < channels; ++c) {
    out_mean[c] = static_cast<T>(mean[c]);
    rstd[c] = static_cast<T>(1 / __builtin_sqrt(spread[c] / count + args.eps));
    variance[c] = static_cast<T>(spread[c] / (count - 1));
  }
}

// ---- the result -----------------------------------------------------------------------------------------------------

// Lines of the map, from the last block to the first, whose end a core still has in its cache.
template <typename T, typename F>
MVIT_INLINE void backwards(const Blocks<T>& blocks, int64_t begin, int64_t end, const F& vector) {
  for (int64_t block = end - 1; block >= begin; --block)
    blocks.stretches(block, [&](int64_t offset, int64_t lines, int64_t width) {
      for (int64_t line = 0; line < lines; ++line, offset += width)
        vectors_of<T>(width, [&](int64_t i, int n) { vector(offset + i, i, n); });
    });
}

template <bool kSilu, typename E, typename T>
MVIT_INLINE void write_normalised_by(const BatchNormActivation& args, int64_t begin, int64_t end, void* scratch) {
  const Blocks<T> blocks(args.pixels);
  const Lines<T> lines(scratch, blocks);
  const int64_t channels = args.pixels.channels;
  const T *weight = static_cast<const T*>(args.weight), *rstd = static_cast<const T*>(args.rstd);
  T *mean = lines[0], *slope = lines[1], *bias = lines[2], *one = lines[3];
  repeat(mean, static_cast<const T*>(args.mean), blocks);
  for (int64_t c = 0; c < channels; ++c) one[c] = weight[c] * rstd[c];
  repeat(slope, one, blocks);
  repeat(bias, static_cast<const T*>(args.bias), blocks);
  const E* x = static_cast<const E*>(args.x);
  E* out = static_cast<E*>(args.out);
  backwards(blocks, begin, end, [&](int64_t at, int64_t i, int n) {
    const Vec<T> y = fma(load_first(x + at, n) - load(mean + i), load(slope + i), load(bias + i));
    store_first(out + at, kSilu ? silu_to<E>(y) : y, n);
  });
}

template <typename E, typename T>
void write_normalised(const BatchNormActivation& args, int64_t begin, int64_t end, void* scratch) {
  args.silu ? write_normalised_by<true, E, T>(args, begin, end, scratch)
            : write_normalised_by<false, E, T>(args, begin, end, scratch);
}

// ---- backward -------------------------------------------------------------------------------------------------------

// What every row needs, for each row of a line.
template <typename T>
struct Norm {
  T *mean, *rstd, *weight, *bias;

  MVIT_INLINE Norm(const BatchNormActivation& args, const Lines<T>& lines, const Blocks<T>& blocks)
      : mean(lines[0]), rstd(lines[1]), weight(lines[2]), bias(lines[3]) {
    repeat(mean, static_cast<const T*>(args.mean), blocks);
    repeat(rstd, static_cast<const T*>(args.rstd), blocks);
    repeat(weight, static_cast<const T*>(args.weight), blocks);
    repeat(bias, static_cast<const T*>(args.bias), blocks);
  }

  MVIT_INLINE Vec<T> normalised(Vec<T> x, int64_t i) const { return (x - load(mean + i)) * load(rstd + i); }

  // The gradient of weight · normalised + bias.
  template <bool kSilu>
  MVIT_INLINE Vec<T> gradient(Vec<T> grad, Vec<T> normalised, int64_t i) const {
    if constexpr (!kSilu) return grad;
    const Vec<T> one(T(1)), y = fma(normalised, load(weight + i), load(bias + i));
    const Vec<T> s = sigmoid(y);
    return grad * s * fma(y, one - s, one);
  }
};

// Sums of the gradient and of its product with the normalised value, for each block.
template <bool kSilu, typename E, typename T>
MVIT_INLINE void sum_gradients_by(const BatchNormActivation& args, int64_t begin, int64_t end, void* shared,
                                  void* scratch) {
  const Blocks<T> blocks(args.pixels);
  const Lines<T> lines(scratch, blocks);
  const int64_t channels = args.pixels.channels;
  const Norm<T> norm(args, lines, blocks);
  T *sum = lines[4], *products = lines[5];
  const E *x = static_cast<const E*>(args.x), *grad = static_cast<const E*>(args.grad_out);
  for (int64_t block = begin; block < end; ++block) {
    lines.clear(4);
    lines.clear(5);
    blocks.stretches(block, [&](int64_t offset, int64_t count, int64_t width) {
      for (int64_t line = 0; line < count; ++line, offset += width)
        vectors_of<T>(width, [&](int64_t i, int n) {
          const Vec<T> normalised = norm.normalised(load_first(x + offset + i, n), i);
          const Vec<T> g = norm.template gradient<kSilu>(load_first(grad + offset + i, n), normalised, i);
          store_first(sum + i, load_first(sum + i, n) + g, n);
          store_first(products + i, fma(g, normalised, load_first(products + i, n)), n);
        });
    });
    add_rows(sum, blocks);
    add_rows(products, blocks);
    double *__restrict of_bias = sums_of(shared, block, channels), *__restrict of_weight = of_bias + channels;
    for (int64_t c = 0; c < channels; ++c) {
      of_bias[c] = sum[c];
      of_weight[c] = products[c];
    }
  }
}

template <typename E, typename T>
void sum_gradients(const BatchNormActivation& args, int64_t begin, int64_t end, void* shared, void* scratch) {
  args.silu ? sum_gradients_by<true, E, T>(args, begin, end, shared, scratch)
            : sum_gradients_by<false, E, T>(args, begin, end, shared, scratch);
}

template <typename T>
void combine_gradients(const BatchNormActivation& args, void* shared, void*) {
  const Blocks<T> blocks(args.pixels);
  const int64_t channels = args.pixels.channels;
  double* __restrict sum = sums_of(shared, 0, channels);
  for (int64_t block = 1; block < blocks.count; ++block) {
    const double* __restrict more = sums_of(shared, block, channels);
    for (int64_t i = 0; i < 2 * channels; ++i) sum[i] += more[i];
  }
  T *grad_bias = static_cast<T*>(args.grad_bias), *grad_weight = static_cast<T*>(args.grad_weight);
  for (int64_t c = 0; c < channels; ++c) {
    grad_bias[c] = static_cast<T>(sum[c]);
    grad_weight[c] = static_cast<T>(sum[channels + c]);
  }
}

template <bool kSilu, typename E, typename T>
MVIT_INLINE void write_gradients_by(const BatchNormActivation& args, int64_t begin, int64_t end, void* scratch) {
  const Blocks<T> blocks(args.pixels);
  const Lines<T> lines(scratch, blocks);
  const int64_t channels = args.pixels.channels;
  const Norm<T> norm(args, lines, blocks);
  T *mean = lines[4], *projection = lines[5], *slope = lines[6];
  T* one = reinterpret_cast<T*>(lines[kMostLines]);
  const auto fill = [&](T* line, const auto& value) {
    for (int64_t c = 0; c < channels; ++c) one[c] = value(c);
    repeat(line, one, blocks);
  };
  const T count = static_cast<T>(static_cast<double>(args.pixels.images) * static_cast<double>(args.pixels.rows));
  fill(mean, [&](int64_t c) { return static_cast<const T*>(args.grad_bias)[c] / count; });
  fill(projection, [&](int64_t c) { return static_cast<const T*>(args.grad_weight)[c] / count; });
  fill(slope, [&](int64_t c) { return norm.weight[c] * norm.rstd[c]; });
  const E *x = static_cast<const E*>(args.x), *grad = static_cast<const E*>(args.grad_out);
  E* out = static_cast<E*>(args.out);
  backwards(blocks, begin, end, [&](int64_t at, int64_t i, int n) {
    const Vec<T> normalised = norm.normalised(load_first(x + at, n), i);
    const Vec<T> g = norm.template gradient<kSilu>(load_first(grad + at, n), normalised, i) - load(mean + i);
    store_first(out + at, fma(-normalised, load(projection + i), g) * load(slope + i), n);
  });
}

template <typename E, typename T>
void write_gradients(const BatchNormActivation& args, int64_t begin, int64_t end, void* scratch) {
  args.silu ? write_gradients_by<true, E, T>(args, begin, end, scratch)
            : write_gradients_by<false, E, T>(args, begin, end, scratch);
}

// ---- planes ---------------------------------------------------------------------------------------------------------

template <typename T>
MVIT_INLINE const void* at(const void* values, int64_t i) {
  return values == nullptr ? nullptr : static_cast<const T*>(values) + i;
}
template <typename T>
MVIT_INLINE void* at(void* values, int64_t i) {
  return values == nullptr ? nullptr : static_cast<T*>(values) + i;
}

template <typename E, typename T, auto kSum, auto kCombine, auto kWrite>
void planes(const BatchNormActivation& args, int64_t begin, int64_t end, void* shared, void* scratch) {
  const int64_t blocks = Blocks<T>(args.pixels).count;
  for (int64_t c = begin; c < end; ++c) {
    BatchNormActivation one = args;
    const int64_t plane = c * args.pixels.rows;
    one.x = at<E>(args.x, plane);
    one.grad_out = at<E>(args.grad_out, plane);
    one.out = at<E>(args.out, plane);
    one.weight = at<T>(args.weight, c);
    one.bias = at<T>(args.bias, c);
    one.mean = at<T>(args.mean, c);
    one.rstd = at<T>(args.rstd, c);
    one.variance = at<T>(args.variance, c);
    one.grad_weight = at<T>(args.grad_weight, c);
    one.grad_bias = at<T>(args.grad_bias, c);
    kSum(one, 0, blocks, shared, scratch);
    kCombine(one, shared, scratch);
    kWrite(one, 0, blocks, scratch);
  }
}

template <typename T>
int64_t blocks_of(const Pixels& pixels) {
  return Blocks<T>(pixels).count;
}

template <typename P, typename E, typename T = typename P::Value>
constexpr BatchNormActivationPasses batch_norm_forward_of() {
  return {blocks_of<T>,
          shared_bytes<T>,
          scratch_bytes<T>,
          sum_statistics<E, T>,
          combine_statistics<T>,
          write_normalised<E, T>,
          planes<E, T, sum_statistics<E, T>, combine_statistics<T>, write_normalised<E, T>>};
}

template <typename P, typename E, typename T = typename P::Value>
constexpr BatchNormActivationPasses batch_norm_backward_of() {
  return {blocks_of<T>,
          shared_bytes<T>,
          scratch_bytes<T>,
          sum_gradients<E, T>,
          combine_gradients<T>,
          write_gradients<E, T>,
          planes<E, T, sum_gradients<E, T>, combine_gradients<T>, write_gradients<E, T>>};
}

}  // namespace MVIT_ISA

extern const BatchNormActivationKernels MVIT_TABLE(batch_norm_activation) = {MVIT_ROW_TABLE(batch_norm_forward_of),
                                                                             MVIT_ROW_TABLE(batch_norm_backward_of)};

}  // namespace mvit
