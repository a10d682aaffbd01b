// SPDX-License-Identifier: Apache-2.0
// Parses, checks and lays out the program of a frozen network (see program.h). Every word is checked before anything
// runs.
#include "program.h"

#include <algorithm>
#include <cstring>

#include "isa.h"

namespace mvit {
namespace {

constexpr int64_t kMostSide = int64_t{1} << 31;
constexpr int64_t kMostPatch = 1024;  // pixels of a patch's side, to which maps are resized
constexpr double kMostBytes = 0x1p44;  // per map

bool is_patch(int64_t height, int64_t width) {
  return height > 0 && height <= kMostPatch && width > 0 && width <= kMostPatch;
}

int64_t round_up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

bool is_resize(Kind kind) { return kind == kToWholePatches || kind == kToSizeOf; }

// Whether a step of this kind may read one dtype and write the other.
bool converts(Kind kind) { return kind == kCopy || kind == kMean || is_resize(kind); }

// Whether a step reads and writes whole maps without borders.
bool takes_whole_maps(const Program& program, const Step& step) {
  const Value &source = program.at(step.source.value), &target = program.at(step.target.value);
  return step.source.channels == source.channels && step.target.channels == target.channels && source.border == 0 &&
         target.border == 0;
}

bool overlap(const Place& a, const Place& b) {
  return a.offset < b.offset + b.channels && b.offset < a.offset + a.channels;
}

// Whether `more`, the number of words after those common to all steps, is what a step of this kind has.
bool has_its_words(const Step& step, int64_t more) {
  switch (step.kind) {
    case kCopy:
    case kMean:
      return more == 0;
    case kConvolution:
    case kInvertedResidual:
      return more == 5;
    case kTransformer:
      return more >= kTransformerWords + kLayerWords && (more - kTransformerWords) % kLayerWords == 0 &&
             step.words[3] == (more - kTransformerWords) / kLayerWords;
    case kDepthwiseConvolution:
      return more == 4;
    case kToWholePatches:
      return more == 2;
    case kToSizeOf:
      return more == 1;
  }
  return false;
}

// Checks everything about a step that does not depend on the sizes of maps.
void check_step(const Program& program, const Step& step, const StepCheck& require) {
  const int64_t* w = step.words;
  const Value& source = program.at(step.source.value);
  require(step.target.value != 0 && step.source.value != program.last(), "writes the input or reads the output");
  const bool even = !program.pairs || step.source.channels % 2 == 0;
  switch (step.kind) {
    case kCopy:
      require(step.target.channels >= step.source.channels, "copies more channels than there is room for");
      break;
    case kConvolution:
      require((w[0] == 1 || w[0] == 3) && (w[1] == 1 || w[1] == 2) && is_size(w[2]) && is_activation(w[3]) &&
                  even,
              "has a kernel, stride, dilation, activation or number of channels that there is not");
      require(w[0] == 1 || source.border >= w[2], "reads a border that is not there");
      break;
    case kDepthwiseConvolution:
      require((w[0] == 1 || w[0] == 2) && is_size(w[1]) && is_activation(w[2]),
              "has a stride, dilation or activation that there is not");
      require(step.source.channels == step.target.channels, "has two widths");
      break;
    case kMean:
      require(step.source.channels == step.target.channels, "has two widths");
      break;
    case kInvertedResidual:
      require(is_size(w[0]) && (w[1] == 1 || w[1] == 2) && is_size(w[2]) && even,
              "has hidden channels, a stride, dilation or number of channels that there are not");
      require(w[3] == 0 || (w[1] == 1 && step.source.channels == step.target.channels),
              "has a residual of another shape");
      break;
    case kTransformer:
      require(is_size(w[0]) && is_size(w[1]) && w[1] % w[0] == 0 && is_size(w[2]) && is_patch(w[4], w[5]),
              "has heads, widths or a patch that there are not");
      require(!program.pairs || (even && w[1] / w[0] % 2 == 0 && w[2] % 2 == 0), "has pairs of an odd width");
      require(step.source.channels == step.target.channels, "has two widths");
      break;
    case kToWholePatches:
    case kToSizeOf:
      require(step.source.channels == step.target.channels, "resizes to another number of channels");
      if (step.kind == kToWholePatches) require(is_patch(w[0], w[1]), "has no patch, or one too large");
      if (step.kind == kToSizeOf) require(w[0] >= 0 && w[0] <= program.last(), "takes the size of what there is not");
      break;
  }
}

}  // namespace

const ConvolutionKernels& Program::convolution_kernels() const {
  const ConvolutionTable& table = MVIT_KERNELS_FOR(convolution, pairs);
  return pairs ? table.pairs : table.single;
}

const DepthwiseConvolutionKernels& Program::depthwise_convolution_kernels() const {
  const DepthwiseConvolutionTable& table = MVIT_KERNELS_FOR(depthwise_convolution, pairs);
  return pairs ? table.pairs : table.single;
}

const InvertedResidualKernels& Program::inverted_residual_kernels() const {
  const InvertedResidualTable& table = MVIT_KERNELS_FOR(inverted_residual, pairs);
  return pairs ? table.pairs : table.single;
}

const TransformerKernels& Program::transformer_kernels() const {
  const TransformerTable& table = MVIT_KERNELS_FOR(transformer, pairs);
  return pairs ? table.pairs : table.single;
}

ConvolutionShape convolution_shape(const Program& program, const Step& step) {
  const Value& source = program.at(step.source.value);
  return {source.height, source.width,  step.source.channels, step.target.channels,
          step.words[0], step.words[1], step.words[2],        static_cast<Activation>(step.words[3])};
}

DepthwiseConvolutionShape depthwise_convolution_shape(const Program& program, const Step& step) {
  const Value& source = program.at(step.source.value);
  return {source.height, source.width,  step.source.channels,
          step.words[0], step.words[1], static_cast<Activation>(step.words[2])};
}

InvertedResidualShape inverted_residual_shape(const Program& program, const Step& step) {
  const Value& source = program.at(step.source.value);
  const InvertedResidualShape shape{source.height,        source.width,  step.source.channels, step.words[0],
                                    step.target.channels, step.words[1], step.words[2],        step.words[3] != 0};
  return shape.with_least_dilation();
}

TransformerShape transformer_shape(const Program& program, const Step& step) {
  const Value& source = program.at(step.source.value);
  const int64_t* w = step.words;
  double eps;
  std::memcpy(&eps, w + 6, sizeof eps);
  TransformerShape shape{};
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
  return shape;
}

Program parse_program(Words words) {
  const int64_t* word = words.data;
  const int64_t* const end = word + words.count;
  MVIT_CHECK(words.count > 4 && word[0] == kProgramVersion, "network: this is no program of version ",
             kProgramVersion);
  Program program;
  MVIT_CHECK(word[1] >= 0 && word[1] <= static_cast<int64_t>(Bf16Products::tiles),
                  "network: the program is for products of a kind ", word[1], " that there is not");
  const auto products = static_cast<Bf16Products>(word[1]);
  program.pairs = products != Bf16Products::none;
  program.tiles = products == Bf16Products::tiles;
  MVIT_CHECK(!program.pairs || products == this_cpus_bf16_products(),
                  "network: the weights were packed for products of bfloat16 pairs that are not this processor's");
  const int64_t values = word[2], steps = word[3];
  word += 4;
  MVIT_CHECK(values > 1 && values <= (end - word) / 2, "network: the program ends before its steps");
  program.values.reserve(static_cast<std::size_t>(values));
  for (int64_t i = 0; i < values; ++i, word += 2) {
    MVIT_CHECK(is_size(word[0]) && word[1] >= 0 && word[1] <= kMost && (word[1] == 0 || (i > 0 && i + 1 < values)),
                    "network: value ", i, " of the program has ", word[0], " channels and a border of ", word[1]);
    Value value{word[0], word[1]};
    if (program.tiles && i > 0 && i + 1 < values) {
      value.channel_step = word[0] <= 4 ? 4 : word[0] <= 16 ? 16 : 32;
      value.column_stride = round_up_to(word[0], value.channel_step);
    }
    program.values.push_back(value);
  }
  const auto place = [&](const int64_t* p) {
    MVIT_CHECK(p[0] >= 0 && p[0] < values && p[1] >= 0 && p[2] > 0 && p[1] <= kMost && p[2] <= kMost &&
                        p[1] + p[2] <= program.at(p[0]).channels,
                    "network: a step of the program reads or writes what there is not");
    MVIT_CHECK(p[1] % program.at(p[0]).channel_step == 0,
                    "network: a step of the program reads or writes channels that begin inside a tile's");
    return Place{p[0], p[1], p[2]};
  };
  MVIT_CHECK(steps > 0 && steps <= (end - word) / kStepWords, "network: the program ends in the middle of a step");
  program.steps.reserve(static_cast<std::size_t>(steps));
  for (int64_t i = 0; i < steps; ++i) {
    MVIT_CHECK(end - word >= kStepWords && word[0] >= kStepWords && word[0] <= end - word,
                    "network: the program ends in the middle of a step");
    const Step step{static_cast<Kind>(word[1]), place(word + 2), place(word + 5), word + kStepWords, false, false};
    MVIT_CHECK(has_its_words(step, word[0] - kStepWords), "network: step ", i, " of the program is of kind ", word[1],
                    " and has not the words of one");
    check_step(program, step, {i, step});
    program.steps.push_back(step);
    word += word[0];
  }
  MVIT_CHECK(word == end, "network: the program goes on after its steps");
  return program;
}

void lay_out(Program& program, const Images& x) {
  auto& values = program.values;
  values[0].height = x.height;
  values[0].width = x.width;
  MVIT_CHECK(values[0].height < kMostSide && values[0].width < kMostSide, "network: x is too large a map");
  for (std::size_t i = 0; i < values.size(); ++i) values[i].storage = static_cast<int64_t>(i);
  const auto storage = [&](int64_t value) -> Value& { return program.at(program.at(value).storage); };
  // Whether x and the result have the dtype of the arithmetic. All kernels but copies and resizes require it.
  const bool same_type = x.bf16 == program.pairs;
  const bool has_rows = x.channels == 1 || x.channel_stride == 1;
  for (std::size_t i = 0; i < program.steps.size(); ++i) {
    Step& step = program.steps[i];
    const StepCheck require{static_cast<int64_t>(i), step};
    const Value& source = program.at(step.source.value);
    Value& target = program.at(step.target.value);
    int64_t h = source.height, w = source.width;
    require(h > 0, "reads what no step wrote");
    if (step.kind == kConvolution || step.kind == kInvertedResidual || step.kind == kDepthwiseConvolution) {
      const int64_t stride = step.words[step.kind == kDepthwiseConvolution ? 0 : 1];
      h = (h - 1) / stride + 1;
      w = (w - 1) / stride + 1;
    } else if (step.kind == kTransformer) {
      require(h % step.words[4] == 0 && w % step.words[5] == 0, "has a map that does not divide into patches");
    } else if (step.kind == kMean) {
      h = w = 1;
    } else if (step.kind == kToWholePatches) {
      h = round_up_to(h, step.words[0]);
      w = round_up_to(w, step.words[1]);
    } else if (step.kind == kToSizeOf) {
      const Value& like = program.at(step.words[0]);
      h = like.height;
      w = like.width;
      require(h > 0, "takes the size of what no step wrote");
    }
    require(target.height == 0 || (target.height == h && target.width == w),
            "writes a map in another size than the step before it");
    const bool from_x = source.storage == 0;
    require(!from_x || has_rows || step.kind == kCopy, "reads rows of x, whose channels are not adjacent");
    require(!from_x || !program.tiles || step.kind == kCopy, "multiplies rows of x, which do not end at whole tiles");
    require(same_type || converts(step.kind) || !(from_x || step.target.value == program.last()),
            "wants x in the dtype of the weights");
    step.renames = is_resize(step.kind) && h == source.height && w == source.width && target.height == 0 &&
                   step.target.value != program.last() && takes_whole_maps(program, step);
    if (step.renames)
      target.storage = source.storage;
    else
      require(target.storage != 0 && (source.storage != target.storage || !overlap(step.source, step.target) ||
                                      (step.kind == kTransformer && step.source.offset == step.target.offset)),
              "writes what it reads");
    target.height = h;
    target.width = w;
    const double border = 2.0 * static_cast<double>(target.border);
    require((static_cast<double>(h) + border) * (static_cast<double>(w) + border) * static_cast<double>(target.column_stride) <
                kMostBytes,
            "writes a map that is too large");
    if (step.kind == kInvertedResidual)
      require(inverted_residual_shape(program, step).has_scratch(), "has more hidden rows than there is memory for");
    const int now = static_cast<int>(i);
    step.clears_border = target.border > 0 && storage(step.target.value).first_step < 0;
    for (Value* value : {&storage(step.source.value), &storage(step.target.value)}) {
      if (value->first_step < 0) value->first_step = now;
      value->last_step = now;
    }
  }
  MVIT_CHECK(values.back().height > 0, "network: no step of the program writes the result");

  // The largest first, each in the first gap between maps that are alive at the same time. In the order of steps the image's
  // copy would take the place where the largest map has no room then: S in bfloat16 would have 2.1 instead of 1.6 MB, lines
  // that are in no cache when its first steps write them. In the middle of the gap, since threads share maps by rows: what
  // lay there before is then in the cache of the same core (1 % of S at batch 1 with two threads).
  const std::size_t element = program.element();
  std::vector<Value*> by_size;
  for (std::size_t i = 1; i + 1 < values.size(); ++i)
    if (values[i].storage == static_cast<int64_t>(i) && values[i].first_step >= 0) by_size.push_back(&values[i]);
  std::stable_sort(by_size.begin(), by_size.end(),
                   [&](const Value* a, const Value* b) { return a->bytes(element) > b->bytes(element); });
  std::vector<const Value*> placed;
  for (Value* const largest : by_size) {
    Value& value = *largest;
    const std::size_t size = value.bytes(element);
    value.offset = 0;
    std::size_t end = program.workspace;
    for (const Value* other : placed) {  // sorted by offset
      if (other->last_step < value.first_step || other->first_step > value.last_step) continue;
      if (value.offset + size <= other->offset) {
        end = other->offset;
        break;
      }
      value.offset = std::max(value.offset, (other->offset + other->bytes(element) + 63) / 64 * 64);
    }
    if (value.offset + size < end) value.offset += (end - value.offset - size) / 128 * 64;
    program.workspace = std::max(program.workspace, value.offset + size);
    placed.insert(std::upper_bound(placed.begin(), placed.end(), &value,
                                   [](const Value* a, const Value* b) { return a->offset < b->offset; }),
                  &value);
  }
}

void check_weights(const Program& program, Bytes weights) {
  MVIT_CHECK(reinterpret_cast<uintptr_t>(weights.data) % 64 == 0, "network: the weights must be at a multiple of 64");
  const std::size_t all = weights.count;
  for (std::size_t i = 0; i < program.steps.size(); ++i) {
    const Step& step = program.steps[i];
    const int64_t* w = step.words;
    const StepCheck require{static_cast<int64_t>(i), step};
    const auto has = [&](int64_t at, std::size_t bytes) {
      require(at >= 0 && at % 64 == 0 && bytes <= all && static_cast<std::size_t>(at) <= all - bytes,
              "has weights where there are none");
    };
    if (step.kind == kConvolution) {
      has(w[4], program.convolution_kernels().packed_bytes(convolution_shape(program, step)));
    } else if (step.kind == kDepthwiseConvolution) {
      has(w[3], depthwise_convolution_shape(program, step).weight_bytes());
    } else if (step.kind == kInvertedResidual) {
      has(w[4], program.inverted_residual_kernels().packed_bytes(inverted_residual_shape(program, step)));
    } else if (step.kind == kTransformer) {
      const int64_t width = step.source.channels;
      const auto d = static_cast<std::size_t>(width), inner = static_cast<std::size_t>(w[1]),
                 hidden = static_cast<std::size_t>(w[2]), wide = sizeof(float);
      const auto matrix = program.transformer_kernels().matrix_bytes;
      require((w[7] < 0) == (w[8] < 0), "has half a norm");
      for (int64_t norm = 7; norm < 9; ++norm)
        if (w[norm] >= 0) has(w[norm], wide * d);
      const std::size_t bytes[kLayerWords] = {
          wide * d, wide * d, 3 * matrix(w[1], width), wide * 3 * inner, matrix(width, w[1]), wide * d,
          wide * d, wide * d, matrix(w[2], width),     wide * hidden,    matrix(width, w[2]), wide * d};
      for (int64_t layer = 0; layer < w[3]; ++layer)
        for (int64_t part = 0; part < kLayerWords; ++part) {
          const int64_t at = w[kTransformerWords + kLayerWords * layer + part];
          if (part != kQkvBias || at >= 0) has(at, bytes[part]);
        }
    }
  }
}

}  // namespace mvit
