// SPDX-License-Identifier: Apache-2.0
// network.cpu: a chain of frozen layers as one call. mvit_kernels/nn/network.py writes the program and says why.
//
// With at least as many images as threads, each thread takes whole images through all steps, in a workspace of its own
// that stays in its cache, and waits for nobody. Images left over are worked on by all threads together, step by step.
// Either way each result is computed in the same order of operations, so its bits do not depend on the threads.
#include <algorithm>
#include <cstring>
#include <vector>

#include "convolution.h"
#include "inverted_residual.h"
#include "isa.h"
#include "maps.h"
#include "tensors.h"
#include "transformer.h"

namespace mvit {
namespace {

// The program's words, as mvit_kernels/nn/network.py writes them.
constexpr int64_t kVersion = 1;
enum Kind : int64_t { kCopy, kConvolution, kInvertedResidual, kTransformer, kToWholePatches, kToSizeOf };

struct Value {
  int64_t channels, border;
  int64_t height = 0, width = 0;  // without the border; 0 until a step writes it
  int64_t storage = -1;           // values that are the same map under two names share one
  int first_step = -1, last_step = -1;
  std::size_t offset = 0;  // in the workspace

  std::size_t bytes(std::size_t element) const {
    return static_cast<std::size_t>((height + 2 * border) * (width + 2 * border) * channels) * element;
  }
};

// Some channels of a value.
struct Place {
  int64_t value, offset, channels;
};

struct Step {
  Kind kind;
  Place source, target;
  const int64_t* words;  // what more it has
  bool clears_border;    // it is the first to write a value that has one
};

struct Program {
  bool pairs;  // maps and matrices in bfloat16, else all in float32
  std::vector<Value> values;
  std::vector<Step> steps;
  std::size_t workspace = 0;
};

constexpr int64_t kStepWords = 8;  // its own length, kind, source and target

// Whether so many words beyond those are what a step of its kind reads.
bool has_its_words(const Step& step, int64_t more) {
  switch (step.kind) {
    case kCopy:
      return true;
    case kConvolution:
    case kInvertedResidual:
      return more >= 5;
    case kTransformer:
      return more >= 9 && step.words[3] >= 0 && step.words[3] <= (more - 9) / 12;
    case kToWholePatches:
      return more >= 2;
    case kToSizeOf:
      return more >= 1;
  }
  return false;
}

int64_t round_up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

Program parse(const Tensor& tensor) {
  const auto* word = static_cast<const int64_t*>(tensor.const_data_ptr());
  const int64_t* end = word + tensor.numel();
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Long && tensor.is_cpu() && tensor.is_contiguous() &&
                      tensor.numel() > 4 && word[0] == kVersion,
                  "network: this is no program of version ", kVersion);
  Program program;
  program.pairs = word[1] != 0;
  const int64_t values = word[2], steps = word[3];
  word += 4;
  STD_TORCH_CHECK(values > 1 && values <= (end - word) / 2, "network: the program ends before its steps");
  for (int64_t i = 0; i < values; ++i, word += 2) program.values.push_back({word[0], word[1]});
  const auto is_value = [&](int64_t value) { return value >= 0 && value < values; };
  const auto place = [&](const int64_t* p) {
    STD_TORCH_CHECK(is_value(p[0]) && p[1] >= 0 && p[1] + p[2] <= program.values[static_cast<std::size_t>(p[0])].channels,
                    "network: a step of the program reads or writes what there is not");
    return Place{p[0], p[1], p[2]};
  };
  for (int64_t i = 0; i < steps; ++i) {
    STD_TORCH_CHECK(end - word >= kStepWords && word[0] >= kStepWords && word[0] <= end - word,
                    "network: the program ends in the middle of a step");
    const Step step{static_cast<Kind>(word[1]), place(word + 2), place(word + 5), word + kStepWords, false};
    STD_TORCH_CHECK(has_its_words(step, word[0] - kStepWords) && (step.kind != kToSizeOf || is_value(step.words[0])),
                    "network: step ", i, " of the program is of kind ", word[1], " and has not the words of one");
    program.steps.push_back(step);
    word += word[0];
  }
  return program;
}

// Sizes of all values for an input of height × width, and where they lie in the workspace.
void lay_out(Program& program, int64_t height, int64_t width) {
  auto& values = program.values;
  values[0].height = height;
  values[0].width = width;
  for (std::size_t i = 0; i < values.size(); ++i) values[i].storage = static_cast<int64_t>(i);
  const auto storage = [&](int64_t value) -> Value& {
    return values[static_cast<std::size_t>(values[static_cast<std::size_t>(value)].storage)];
  };
  for (std::size_t i = 0; i < program.steps.size(); ++i) {
    Step& step = program.steps[i];
    const Value& source = values[static_cast<std::size_t>(step.source.value)];
    Value& target = values[static_cast<std::size_t>(step.target.value)];
    int64_t h = source.height, w = source.width;
    if (step.kind == kConvolution || step.kind == kInvertedResidual) {
      const int64_t stride = step.words[1];
      h = (h - 1) / stride + 1;
      w = (w - 1) / stride + 1;
    } else if (step.kind == kToWholePatches) {
      h = round_up_to(h, step.words[0]);
      w = round_up_to(w, step.words[1]);
    } else if (step.kind == kToSizeOf) {
      const Value& like = values[static_cast<std::size_t>(step.words[0])];
      h = like.height;
      w = like.width;
    }
    if ((step.kind == kToWholePatches || step.kind == kToSizeOf) && h == source.height && w == source.width)
      target.storage = source.storage;  // nothing to resize: another name
    STD_TORCH_CHECK(target.height == 0 || (target.height == h && target.width == w),
                    "network: two steps write one map in two sizes");
    target.height = h;
    target.width = w;
    const int now = static_cast<int>(i);
    step.clears_border = target.border > 0 && storage(step.target.value).first_step < 0;
    for (Value* value : {&storage(step.source.value), &storage(step.target.value)}) {
      if (value->first_step < 0) value->first_step = now;
      value->last_step = now;
    }
  }

  // First fit: the lowest place that nothing alive at the same time has.
  const std::size_t element = program.pairs ? 2 : 4;
  std::vector<const Value*> placed;
  for (std::size_t i = 1; i + 1 < values.size(); ++i) {
    Value& value = values[i];
    if (value.storage != static_cast<int64_t>(i) || value.first_step < 0) continue;
    const std::size_t size = value.bytes(element) + 64;  // vectors are read a little past the end
    value.offset = 0;
    for (const Value* other : placed) {  // in order of their offsets
      if (other->last_step < value.first_step || other->first_step > value.last_step) continue;
      if (value.offset + size <= other->offset) break;
      value.offset = std::max(value.offset, (other->offset + other->bytes(element) + 64 + 63) / 64 * 64);
    }
    program.workspace = std::max(program.workspace, value.offset + size);
    placed.insert(std::upper_bound(placed.begin(), placed.end(), &value,
                                   [](const Value* a, const Value* b) { return a->offset < b->offset; }),
                  &value);
  }
}

// One image on its way through the program.
class Run {
 public:
  Run(const Program& program, const Tensor& x, const Tensor& out, const char* weights, int64_t image, char* workspace,
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
      }
    }
  }

 private:
  const Value& value(const Place& place) const { return program_.values[static_cast<std::size_t>(place.value)]; }

  template <typename Body>
  void share_out(int64_t items, double flops_per_item, const Body& body) const {
    if (alone_) return body(0, items);
    parallel_for(items, flops_per_item, body);
  }

  // Where a place's channels of pixel (0, 0) are; `map` has no image stride, since the image is chosen here.
  PlacedMap map(const Place& place) const {
    const std::size_t at = static_cast<std::size_t>(place.value);
    if (at == 0) return tensor_map(x_, 2, 3, 1, place.offset);
    if (at + 1 == program_.values.size()) return tensor_map(out_, 1, 2, 3, place.offset);
    const Value& shape = program_.values[at];
    const Value& where = program_.values[static_cast<std::size_t>(shape.storage)];
    const std::size_t element = program_.pairs ? 2 : 4;
    const int64_t column = shape.channels, row = (shape.width + 2 * shape.border) * column;
    const int64_t first = shape.border * (row + column) + place.offset;
    if (shape.storage == 0) return tensor_map(x_, 2, 3, 1, place.offset);
    return {{workspace_ + where.offset + static_cast<std::size_t>(first) * element, 0, row, column}, 1, program_.pairs};
  }

  PlacedMap tensor_map(const Tensor& tensor, int64_t h, int64_t w, int64_t c, int64_t offset) const {
    const bool bf16 = tensor.scalar_type() == ScalarType::BFloat16;
    const int64_t first = image_ * tensor.stride(0) + offset * tensor.stride(c);
    char* data = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr())) + first * (bf16 ? 2 : 4);
    return {{data, 0, tensor.stride(h), tensor.stride(w)}, tensor.stride(c), bf16};
  }

  void clear_border(const Step& step) const {
    const Value& target = value(step.target);
    const std::size_t element = program_.pairs ? 2 : 4;
    char* data = workspace_ + target.offset;
    const std::size_t pixel = static_cast<std::size_t>(target.channels) * element;
    const std::size_t side = static_cast<std::size_t>(target.border) * pixel;
    const std::size_t row = static_cast<std::size_t>(target.width + 2 * target.border) * pixel;
    const std::size_t band = static_cast<std::size_t>(target.border) * row;
    std::memset(data, 0, band + side);
    for (int64_t h = 0; h + 1 < target.height; ++h)  // a row's right side and the next one's left side are adjacent
      std::memset(data + band + static_cast<std::size_t>(h + 1) * row - side, 0, 2 * side);
    std::memset(data + band + static_cast<std::size_t>(target.height) * row - side, 0, side + band);
  }

  void copy(const Step& step) const {
    const Value& source = value(step.source);
    const PlacedMap from = map(step.source), to = map(step.target);
    constexpr double ops = 16;  // as long as that many products, an element
    share_out(source.height, ops * static_cast<double>(source.width * step.target.channels), [&](int64_t begin, int64_t end) {
      copy_rows(from, step.source.channels, to, step.target.channels, source.width, begin, end);
    });
  }

  void convolution(const Step& step) const {
    const Value& source = value(step.source);
    ConvolutionArgs args{};
    args.shape = {source.height,           source.width,  step.source.channels, step.target.channels,
                  step.words[0],           step.words[1], step.words[2],        step.words[3] != 0};
    args.in = map(step.source).map;
    args.out = map(step.target).map;
    args.packed = weights_ + step.words[4];
    const ConvolutionTable& table = MVIT_KERNELS_WITH_BF16_PAIRS(convolution);
    const ConvolutionKernels& kernels = program_.pairs ? table.pairs : table.single;
    const int64_t units = kernels.units(args.shape);
    const double flops = 2.0 * static_cast<double>(args.shape.out_height() * args.shape.out_width() *
                                                   args.shape.out_channels * args.shape.in_channels *
                                                   args.shape.kernel * args.shape.kernel);
    share_out(units, flops / static_cast<double>(units),
              [&](int64_t begin, int64_t end) { kernels.run(args, 0, begin, end); });
  }

  void inverted_residual(const Step& step) const {
    const Value& source = value(step.source);
    InvertedResidualArgs args{};
    args.shape = {source.height, source.width,  step.source.channels, step.words[0],
                  step.target.channels, step.words[1], step.words[2], step.words[3] != 0};
    args.in = map(step.source).map;
    args.out = map(step.target).map;
    args.packed = weights_ + step.words[4];
    const InvertedResidualTable& table = MVIT_KERNELS_WITH_BF16_PAIRS(inverted_residual);
    const InvertedResidualKernels& kernels = program_.pairs ? table.pairs : table.single;
    const std::size_t bytes = kernels.scratch_bytes(args.shape);
    const double flops = 2.0 * static_cast<double>(args.shape.out_width() * args.shape.hidden *
                                                   (args.shape.in_channels + args.shape.out_channels + 9));
    share_out(args.shape.out_height(), flops,
              [&](int64_t begin, int64_t end) { kernels.run(args, 0, begin, end, scratch(bytes)); });
  }

  void transformer(const Step& step) const {
    const Value& source = value(step.source);
    const int64_t* w = step.words;
    TransformerArgs args{};
    TransformerShape& shape = args.shape;
    double eps;
    std::memcpy(&eps, w + 6, sizeof eps);
    shape.images = 1;
    shape.patch_height = w[4];
    shape.patch_width = w[5];
    shape.patch_rows = source.height / w[4];
    shape.patch_columns = source.width / w[5];
    shape.width = step.source.channels;
    shape.heads = w[0];
    shape.head_dim = w[1] / w[0];
    shape.hidden = w[2];
    shape.layers = w[3];
    shape.eps = static_cast<float>(eps);
    args.in = map(step.source).map;
    args.out = map(step.target).map;
    const auto vector = [&](int64_t at) { return at < 0 ? nullptr : reinterpret_cast<const float*>(weights_ + at); };
    args.final_norm_weight = vector(w[7]);
    args.final_norm_bias = vector(w[8]);
    std::vector<TransformerLayer> layers;
    for (const int64_t* at = w + 9; at < w + 9 + 12 * shape.layers; at += 12)
      layers.push_back({vector(at[0]), vector(at[1]), weights_ + at[2], vector(at[3]), weights_ + at[4], vector(at[5]),
                        vector(at[6]), vector(at[7]), weights_ + at[8], vector(at[9]), weights_ + at[10],
                        vector(at[11])});
    args.layers = layers.data();
    const TransformerTable& table = MVIT_KERNELS_WITH_BF16_PAIRS(transformer);
    run_transformer(program_.pairs ? table.pairs : table.single, args, alone_);
  }

  void resize(const Step& step) const {
    const Value &source = value(step.source), &target = value(step.target);
    if (source.storage == target.storage) return;
    const PlacedMap from = map(step.source), to = map(step.target);
    share_out(target.height, 64.0 * static_cast<double>(target.width * step.target.channels),
              [&](int64_t begin, int64_t end) {
                resize_rows(from, source.height, source.width, to, target.height, target.width, step.target.channels,
                            begin, end);
              });
  }

  const Program& program_;
  const Tensor& x_;
  const Tensor& out_;
  const char* weights_;
  int64_t image_;
  char* workspace_;
  bool alone_;
};

Tensor network(const Tensor& x, const Tensor& weights, const Tensor& program_tensor) {
  Program program = parse(program_tensor);
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && x.size(1) == program.values[0].channels && x.numel() > 0,
                  "network: x must be a (B, ", program.values[0].channels, ", H, W) map on the CPU, and not empty");
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                  "network: x must be of float32 or bfloat16");
  STD_TORCH_CHECK(!program.pairs || (type == ScalarType::BFloat16 && current_isa() == Isa::avx512bf16),
                  "network: the weights were packed for products of bfloat16 pairs");
  lay_out(program, x.size(2), x.size(3));
  const Value& last = program.values.back();
  const Tensor out = new_empty(x, {x.size(0), last.height, last.width, last.channels}, type);
  const char* bytes = static_cast<const char*>(weights.const_data_ptr());

  const int64_t images = x.size(0), threads = torch::stable::get_num_threads();
  const int64_t whole = threads == 1 ? images : images / threads * threads;
  const auto run = [&](int64_t begin, int64_t end, bool alone) {
    char* workspace = static_cast<char*>(kept_memory<ScratchUse::network>(program.workspace));
    for (int64_t image = begin; image < end; ++image) Run(program, x, out, bytes, image, workspace, alone)();
  };
  if (threads == 1) {
    run(0, images, true);
  } else {
    if (whole > 0)
      torch::stable::parallel_for(0, whole, 1, [&](int64_t begin, int64_t end) { run(begin, end, true); });
    run(whole, images, false);
  }
  return out;
}

Tensor bytes_like(const Tensor& tensor, std::size_t size) {
  return new_empty(tensor, {static_cast<int64_t>(size)}, ScalarType::Byte);
}

// Of the dtype of `weight`: bfloat16 for products of pairs, else float32.
Tensor pack_convolution(const Tensor& weight, const Tensor& bias) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.is_contiguous() && bias.is_contiguous() &&
                      bias.scalar_type() == ScalarType::Float && bias.numel() == weight.size(0),
                  "pack_convolution: (out, in, k, k) and (out,) are wanted");
  const ConvolutionTable& table = MVIT_KERNELS_WITH_BF16_PAIRS(convolution);
  const ConvolutionKernels& kernels = weight.scalar_type() == ScalarType::BFloat16 ? table.pairs : table.single;
  STD_TORCH_CHECK(kernels.pack != nullptr, "pack_convolution: there are no products of bfloat16 pairs here");
  const ConvolutionShape shape{1, 1, weight.size(1), weight.size(0), weight.size(2), 1, 1, false};
  const Tensor packed = bytes_like(weight, kernels.packed_bytes(shape));
  kernels.pack(shape, weight.const_data_ptr(), static_cast<const float*>(bias.const_data_ptr()),
               packed.mutable_data_ptr());
  return packed;
}

Tensor pack_inverted_residual(const Tensor& expand, const Tensor& expand_bias, const Tensor& depthwise,
                              const Tensor& depthwise_bias, const Tensor& project, const Tensor& project_bias) {
  for (const Tensor* tensor : {&expand, &expand_bias, &depthwise, &depthwise_bias, &project, &project_bias})
    STD_TORCH_CHECK(tensor->is_contiguous(), "pack_inverted_residual: contiguous weights are wanted");
  const InvertedResidualTable& table = MVIT_KERNELS_WITH_BF16_PAIRS(inverted_residual);
  const InvertedResidualKernels& kernels = expand.scalar_type() == ScalarType::BFloat16 ? table.pairs : table.single;
  STD_TORCH_CHECK(kernels.pack != nullptr, "pack_inverted_residual: there are no products of bfloat16 pairs here");
  const InvertedResidualShape shape{1, 1, expand.size(1), expand.size(0), project.size(0), 1, 1, false};
  const auto floats = [](const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); };
  const Tensor packed = bytes_like(expand, kernels.packed_bytes(shape));
  kernels.pack(shape,
               {expand.const_data_ptr(), floats(expand_bias), depthwise.const_data_ptr(), floats(depthwise_bias),
                project.const_data_ptr(), floats(project_bias)},
               packed.mutable_data_ptr());
  return packed;
}

}  // namespace
}  // namespace mvit

STABLE_TORCH_LIBRARY_IMPL(mvit_kernels, CPU, m) {
  m.impl("network.cpu", TORCH_BOX(&mvit::network));
  m.impl("pack_convolution.cpu", TORCH_BOX(&mvit::pack_convolution));
  m.impl("pack_inverted_residual.cpu", TORCH_BOX(&mvit::pack_inverted_residual));
}
