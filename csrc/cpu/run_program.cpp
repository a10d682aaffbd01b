// SPDX-License-Identifier: Apache-2.0
// Runs a whole chain of frozen layers. mvit_kernels/freezing/network.py explains what it saves.
//
// With at least as many images as threads, each thread takes whole images through all steps, in its own workspace,
// which stays in its cache, without synchronisation. The remaining images are processed by all threads together, step
// by step. Either way each result is computed in the same order of operations, so its bits do not depend on the number
// of threads.
#include <cstring>
#include <vector>

#include "convolution.h"
#include "depthwise_convolution.h"
#include "inverted_residual.h"
#include "maps.h"
#include "parallel.h"
#include "program.h"
#include "scratch.h"
#include "transformer.h"

namespace mvit {
namespace {

// Runs the program for one image.
class Run {
 public:
  Run(const Program& program, const Images& x, const Images& out, const char* weights, int64_t image, char* workspace,
      bool alone)
      : program_(program), x_(x), out_(out), weights_(weights), image_(image), workspace_(workspace), alone_(alone) {}

  void operator()() const {
    for (const Step& step : program_.steps) {
      if (step.clears_border) clear_border(step);
      switch (step.kind) {
        case kCopy:
          copy(step);
          break;
        case kConvolution:
          convolution(step);
          break;
        case kDepthwiseConvolution:
          depthwise_convolution(step);
          break;
        case kInvertedResidual:
          inverted_residual(step);
          break;
        case kTransformer:
          transformer(step);
          break;
        case kToWholePatches:
        case kToSizeOf:
          resize(step);
          break;
        case kMean:
          mean(step);
          break;
      }
    }
  }

 private:
  const Value& value(const Place& place) const { return program_.at(place.value); }

  template <typename Body>
  void share_out(int64_t items, double flops_per_item, const Body& body) const {
    if (alone_) return body(0, items);
    parallel_for(items, flops_per_item, body);
  }

  // The channels of a place at pixel (0, 0). The result has no image stride, since the image is selected here.
  PlacedMap map(const Place& place) const {
    if (place.value == program_.last()) return image_map(out_, place.offset);
    const Value& shape = value(place);
    if (shape.storage == 0) return image_map(x_, place.offset);
    const Value& where = program_.at(shape.storage);
    const std::size_t element = program_.element();
    const int64_t column = shape.column_stride, row = (shape.width + 2 * shape.border) * column;
    const int64_t first = shape.border * (row + column) + place.offset;
    char* const data = workspace_ + where.offset + static_cast<std::size_t>(first) * element;
    return {{data, 0, row, column, shape.channel_step}, 1, program_.pairs};
  }

  PlacedMap image_map(const Images& of, int64_t channel) const {
    const int64_t first = image_ * of.image_stride + channel * of.channel_stride;
    char* data = static_cast<char*>(of.data) + first * (of.bf16 ? 2 : 4);
    return {{data, 0, of.row_stride, of.column_stride}, of.channel_stride, of.bf16};
  }

  void clear_border(const Step& step) const {
    const Value& target = value(step.target);
    const std::size_t element = program_.element();
    char* data = workspace_ + target.offset;
    const std::size_t pixel = static_cast<std::size_t>(target.column_stride) * element;
    const std::size_t side = static_cast<std::size_t>(target.border) * pixel;
    const std::size_t row = static_cast<std::size_t>(target.width + 2 * target.border) * pixel;
    const std::size_t band = static_cast<std::size_t>(target.border) * row;
    std::memset(data, 0, band + side);
    // The right border of a row and the left border of the next are adjacent.
    for (int64_t h = 0; h + 1 < target.height; ++h)
      std::memset(data + band + static_cast<std::size_t>(h + 1) * row - side, 0, 2 * side);
    std::memset(data + band + static_cast<std::size_t>(target.height) * row - side, 0, side + band);
  }

  void copy(const Step& step) const { copy(step, map(step.source), map(step.target)); }

  void copy(const Step& step, const PlacedMap& from, const PlacedMap& to) const {
    const Value& target = value(step.target);
    constexpr double ops = 16;  // cost of copying one element, in operations
    share_out(target.height, ops * static_cast<double>(target.width * step.target.channels), [&](int64_t begin, int64_t end) {
      copy_rows(from, step.source.channels, to, to.map.room(step.target.channels), target.width, begin, end);
    });
  }

  void convolution(const Step& step) const {
    ConvolutionArgs args{};
    args.shape = convolution_shape(program_, step);
    args.in = map(step.source).map;
    args.out = map(step.target).map;
    args.packed = weights_ + step.words[4];
    const ConvolutionKernels& kernels = program_.convolution_kernels();
    const int64_t units = kernels.units(args.shape);
    const double flops = 2.0 * static_cast<double>(args.shape.out_height() * args.shape.out_width() *
                                                   args.shape.out_channels * args.shape.in_channels *
                                                   args.shape.kernel * args.shape.kernel);
    const std::size_t bytes = kernels.scratch_bytes(args.shape);
    share_out(units, flops / static_cast<double>(units), [&](int64_t begin, int64_t end) {
      const Scratch scratch(bytes);
      kernels.run(args, 0, begin, end, scratch.data());
    });
  }

  void depthwise_convolution(const Step& step) const {
    DepthwiseConvolutionArgs args{};
    args.shape = depthwise_convolution_shape(program_, step);
    args.in = map(step.source).map;
    args.out = map(step.target).map;
    args.weights = reinterpret_cast<const float*>(weights_ + step.words[3]);
    const double flops = 18.0 * static_cast<double>(args.shape.out_width() * args.shape.channels);
    share_out(args.shape.out_height(), flops, [&](int64_t begin, int64_t end) {
      program_.depthwise_convolution_kernels().run(args, begin, end);
    });
  }

  void inverted_residual(const Step& step) const {
    InvertedResidualArgs args{};
    args.shape = inverted_residual_shape(program_, step);
    args.in = map(step.source).map;
    args.out = map(step.target).map;
    args.packed = weights_ + step.words[4];
    const InvertedResidualKernels& kernels = program_.inverted_residual_kernels();
    const std::size_t bytes = kernels.scratch_bytes(args.shape);
    const double flops = 2.0 * static_cast<double>(args.shape.out_width() * args.shape.hidden *
                                                   (args.shape.in_channels + args.shape.out_channels + 9));
    share_out(args.shape.out_height(), flops, [&](int64_t begin, int64_t end) {
      const Scratch scratch(bytes);
      kernels.run(args, 0, begin, end, scratch.data());
    });
  }

  void transformer(const Step& step) const {
    const int64_t* w = step.words;
    TransformerArgs args{};
    args.shape = transformer_shape(program_, step);
    args.in = map(step.source).map;
    args.out = map(step.target).map;
    const auto vector = [&](int64_t at) { return at < 0 ? nullptr : reinterpret_cast<const float*>(weights_ + at); };
    args.final_norm_weight = vector(w[7]);
    args.final_norm_bias = vector(w[8]);
    std::vector<TransformerLayer> layers;
    const int64_t* const end = w + kTransformerWords + kLayerWords * args.shape.layers;
    for (const int64_t* at = w + kTransformerWords; at < end; at += kLayerWords)
      layers.push_back({vector(at[0]), vector(at[1]), weights_ + at[2], vector(at[3]), weights_ + at[4], vector(at[5]),
                        vector(at[6]), vector(at[7]), weights_ + at[8], vector(at[9]), weights_ + at[10],
                        vector(at[11])});
    args.layers = layers.data();
    run_transformer(program_.transformer_kernels(), args, alone_);
  }

  void resize(const Step& step) const {
    const Value &source = value(step.source), &target = value(step.target);
    if (step.renames) return;
    if (source.height == target.height && source.width == target.width) return copy(step);
    PlacedMap from = map(step.source);
    const PlacedMap to = map(step.target);
    if (source.height == 1 && source.width == 1) {  // one pixel for all, bit by bit
      from.map.row_stride = from.map.column_stride = 0;
      return copy(step, from, to);
    }
    share_out(target.height, 64.0 * static_cast<double>(target.width * step.target.channels),
              [&](int64_t begin, int64_t end) {
                resize_rows(from, source.height, source.width, to, target.height, target.width, step.target.channels,
                            to.map.room(step.target.channels), begin, end);
              });
  }

  void mean(const Step& step) const {
    const Value& source = value(step.source);
    const PlacedMap from = map(step.source), to = map(step.target);
    share_out(step.source.channels, 4.0 * static_cast<double>(source.height * source.width),
              [&](int64_t begin, int64_t end) { mean_channels(from, source.height, source.width, to, begin, end); });
    const int64_t channels = step.target.channels;
    zero_channels(to, channels, to.map.room(channels));
  }

  const Program& program_;
  const Images& x_;
  const Images& out_;
  const char* weights_;
  int64_t image_;
  char* workspace_;
  bool alone_;
};

}  // namespace

void run_program(const Program& program, const Images& x, const Images& out, const char* weights) {
  const int64_t images = x.count, threads = thread_count();
  const int64_t whole = threads == 1 ? images : images / threads * threads;
  const auto run = [&](int64_t begin, int64_t end, bool alone) {
    const FlushSubnormals flush;  // not by parallel_for where a thread is alone with an image
    const Scratch workspace(program.workspace, ScratchUse::network);
    for (int64_t image = begin; image < end; ++image) Run(program, x, out, weights, image, workspace.data(), alone)();
  };
  if (threads == 1) return run(0, images, true);
  if (whole > 0) run_each(whole, [&](int64_t begin, int64_t end) { run(begin, end, true); });
  run(whole, images, false);
}

}  // namespace mvit
