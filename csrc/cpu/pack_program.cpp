// SPDX-License-Identifier: Apache-2.0
// Reads a stored network, checks it word by word, and packs it for this processor (see pack_program.h).
#include "pack_program.h"

#include <array>
#include <cstring>
#include <memory>
#include <utility>

#include "half.h"
#include "huge_pages.h"
#include "maps.h"
#include "parallel.h"

namespace mvit {
namespace {

constexpr int64_t kTile = 32;  // channels at whose multiples parts begin on matrix tiles

std::size_t aligned(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

struct StoredValue {
  int64_t channels, border;
  std::vector<int64_t> widths;  // of the parts, one or more
};

struct StoredStep {
  Kind kind;
  Place source, target;
  const int64_t* words;
  int64_t count;
};

struct Stored {
  StoredType type;
  std::vector<StoredValue> values;
  std::vector<StoredStep> steps;
};

bool has_its_words(const StoredStep& step) {
  constexpr int64_t counts[] = {0, 6, 10, 0, 2, 1, 5, 0};  // by kind; a transformer's depend on its layers
  if (step.kind < 0 || step.kind > kMean) return false;
  if (step.kind != kTransformer) return step.count == counts[step.kind];
  return step.count >= kTransformerWords + kLayerWords && (step.count - kTransformerWords) % kLayerWords == 0 &&
         step.words[3] == (step.count - kTransformerWords) / kLayerWords;
}

Stored parse(Words words) {
  MVIT_CHECK(words.count > 4 && words.data[0] == kStoredVersion, "pack_network: this is no stored network of version ",
             kStoredVersion);
  const int64_t *word = words.data, *const end = word + words.count;
  const int64_t values = word[2], steps = word[3];
  MVIT_CHECK(word[1] >= 0 && word[1] <= static_cast<int64_t>(StoredType::float16), "pack_network: weights of a type ",
             word[1], " that there is not");
  Stored stored{static_cast<StoredType>(word[1]), {}, {}};
  word += 4;
  MVIT_CHECK(values > 1 && values <= (end - word) / 4 && steps > 0 && steps <= (end - word) / kStepWords,
             "pack_network: the words end before the network does");
  for (int64_t i = 0; i < values; ++i) {
    MVIT_CHECK(end - word > 3 && word[2] > 0 && word[2] <= end - word - 3, "pack_network: the words end in value ", i);
    StoredValue value{word[0], word[1], {word + 3, word + 3 + word[2]}};
    int64_t sum = 0;
    bool sizes = is_size(value.channels) && value.border >= 0 && value.border <= kMost;
    for (const int64_t width : value.widths) {
      sizes = sizes && is_size(width) && sum <= kMost;
      sum += sizes ? width : 0;
    }
    MVIT_CHECK(sizes && sum == value.channels, "pack_network: value ", i, " has ", value.channels,
               " channels, which its parts are not, or a border that cannot be");
    word += 3 + word[2];
    stored.values.push_back(std::move(value));
  }
  const auto place = [&](const int64_t* p) {
    MVIT_CHECK(p[0] >= 0 && p[0] < values && p[1] >= 0 && is_size(p[2]) && p[1] <= kMost &&
                   p[1] + p[2] <= stored.values[static_cast<std::size_t>(p[0])].channels,
               "pack_network: a step reads or writes what there is not");
    return Place{p[0], p[1], p[2]};
  };
  for (int64_t i = 0; i < steps; ++i) {
    MVIT_CHECK(end - word >= kStepWords && word[0] >= kStepWords && word[0] <= end - word,
               "pack_network: the words end in step ", i);
    const StoredStep step{static_cast<Kind>(word[1]), place(word + 2), place(word + 5), word + kStepWords,
                          word[0] - kStepWords};
    MVIT_CHECK(has_its_words(step), "pack_network: step ", i, " is of kind ", word[1], " and has not the words of one");
    stored.steps.push_back(step);
    word += word[0];
  }
  MVIT_CHECK(word == end, "pack_network: the words go on after the steps");
  return stored;
}

bool is_odd(int64_t n) { return n % 2 != 0; }

// A stored tensor as operands of another type.
void convert(const char* from, StoredType type, int64_t count, float* to) {
  const auto* bits = reinterpret_cast<const uint16_t*>(from);
  if (type == StoredType::float32) std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
  for (int64_t i = 0; type != StoredType::float32 && i < count; ++i)
    to[i] = type == StoredType::bfloat16 ? to_float(bits[i]) : half_to_float(bits[i]);
}

}  // namespace

class Packing {
 public:
  Packing(PackedProgram& result, Words words, Bytes weights)
      : result_(result), stored_(parse(words)), weights_(weights) {
    choose_arithmetic();
    place_values();
    for (const StoredStep& step : stored_.steps) steps_.push_back(packed(step));
    finish();
  }

 private:
  const StoredValue& value(int64_t index) const { return stored_.values[static_cast<std::size_t>(index)]; }
  int64_t last() const { return static_cast<int64_t>(stored_.values.size()) - 1; }

  // Whether the network begins by copying the image whole, so that its layout is free.
  bool copies_image() const {
    const StoredStep& first = stored_.steps.front();
    const StoredValue& to = value(first.target.value);
    return first.kind == kCopy && first.source.value == 0 && to.widths.size() == 1 &&
           first.target.channels == to.channels;
  }

  // Products of pairs want even numbers of channels everywhere. An image of three gets a fourth channel of zeros, with
  // zero weights; with any other odd number the arithmetic is float32.
  void choose_arithmetic() {
    products_ = stored_.type == StoredType::bfloat16 ? this_cpus_bf16_products() : Bf16Products::none;
    if (products_ == Bf16Products::none) return;
    const int64_t image = copies_image() ? stored_.steps.front().target.value : -1;
    bool odd = stored_.steps.front().kind != kCopy && is_odd(value(0).channels);
    for (int64_t i = 1; i <= last(); ++i)
      for (const int64_t width : value(i).widths) odd = odd || (i != image && is_odd(width));
    for (const StoredStep& step : stored_.steps) {
      const int64_t* w = step.words;
      if (step.kind == kInvertedResidual) odd = odd || is_odd(w[0]);
      if (step.kind == kTransformer) odd = odd || w[0] <= 0 || is_odd(w[1] / w[0]) || is_odd(w[2]);
    }
    if (odd)
      products_ = Bf16Products::none;
    else if (image >= 0 && is_odd(value(image).channels))
      padded_image_ = image;
  }

  bool pairs() const { return products_ != Bf16Products::none; }
  bool tiles() const { return products_ == Bf16Products::tiles; }
  bool converts() const { return stored_.type == StoredType::bfloat16 && !pairs(); }  // float32 inside
  StoredType operands() const { return pairs() ? StoredType::bfloat16 : StoredType::float32; }

  // Values between a copy of the image, where kernels cannot read it in place, and one of the result.
  void place_values() {
    copies_x_ = (converts() || tiles()) && stored_.steps.front().kind != kCopy;
    values_.push_back({value(0).channels, value(0).border});
    if (copies_x_) values_.push_back({value(0).channels, 0});
    for (int64_t i = 0; i <= last(); ++i) {
      int64_t at = 0, end = 0;
      std::vector<int64_t> starts;
      for (const int64_t width : value(i).widths) {
        starts.push_back(at);
        end = at + width;
        at += tiles() ? (width + kTile - 1) / kTile * kTile : width;
      }
      if (i > 0) values_.push_back({end + (i == padded_image_), value(i).border});
      starts_.push_back(std::move(starts));
    }
    if (converts()) values_.push_back({values_.back()[0], 0});
  }

  int64_t index_of(int64_t stored) const { return stored + copies_x_; }

  bool is_whole(const Place& place) const { return place.channels == value(place.value).channels; }

  Place placed(const Place& place) const {
    const int64_t index = index_of(place.value);
    if (is_whole(place)) return {index, 0, values_[static_cast<std::size_t>(index)][0]};
    const auto& widths = value(place.value).widths;
    const auto& starts = starts_[static_cast<std::size_t>(place.value)];
    int64_t at = 0;
    for (std::size_t part = 0; part < widths.size(); at += widths[part++])
      if (at == place.offset && widths[part] == place.channels) return {index, starts[part], place.channels};
    raise_error("pack_network: a step reads or writes channels ", place.offset, " to ", place.offset + place.channels,
                " of value ", place.value, ", which are no part of it");
  }

  // ---- weights ------------------------------------------------------------------------------------------------------

  const char* tensor(int64_t address, int64_t count, std::size_t element) const {
    MVIT_CHECK(address >= 0 && address % 64 == 0 && static_cast<std::size_t>(address) <= weights_.count &&
                   static_cast<std::size_t>(count) <= (weights_.count - static_cast<std::size_t>(address)) / element,
               "pack_network: a step has weights where there are none");
    return weights_.data + address;
  }
  const float* vector(int64_t address, int64_t count) const {
    return reinterpret_cast<const float*>(tensor(address, count, sizeof(float)));
  }
  const char* matrix(int64_t address, int64_t count) const {
    return tensor(address, count, stored_.type == StoredType::float32 ? 4 : 2);
  }

  // Space for packed weights that `write` fills.
  int64_t add(std::size_t bytes, std::function<void(char*)> write) {
    const std::size_t at = result_.bytes_;
    MVIT_CHECK(bytes < std::size_t{1} << 48, "pack_network: the weights are too many");
    result_.bytes_ += aligned(bytes);
    result_.parts_.push_back({at, std::move(write)});
    return static_cast<int64_t>(at);
  }

  int64_t add_vector(int64_t address, int64_t count) {
    const float* from = vector(address, count);
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(float);
    return add(bytes, [=](char* to) { std::memcpy(to, from, bytes); });
  }

  // A stored tensor in the operands' type, for as long as the object lives.
  class Operands {
   public:
    Operands(const char* from, StoredType type, StoredType wanted, int64_t count) : data_(from) {
      if (type == wanted) return;
      copy_ = std::make_unique<float[]>(static_cast<std::size_t>(count));  // wanted is float32
      convert(from, type, count, copy_.get());
      data_ = reinterpret_cast<const char*>(copy_.get());
    }
    const char* data() const { return data_; }

   private:
    const char* data_;
    std::unique_ptr<float[]> copy_;
  };

  int64_t add_convolution(const StoredStep& step) {
    const int64_t *w = step.words, out = step.target.channels, in = step.source.channels, kernel = w[0];
    MVIT_CHECK(kernel == 1 || kernel == 3, "pack_network: a convolution of ", kernel, " x ", kernel);
    const int64_t taps = kernel * kernel, count = out * in * taps;
    const char* weight = matrix(w[4], count);
    const float* bias = vector(w[5], out);
    const int64_t wide = placed(step.source).channels;
    const ConvolutionTable& table = MVIT_KERNELS_FOR(convolution, pairs());
    const ConvolutionKernels* kernels = pairs() ? &table.pairs : &table.single;
    const ConvolutionShape shape{1, 1, wide, out, kernel, w[1], w[2], Activation::none};
    const StoredType type = stored_.type, wanted = operands();
    if (wide == in)
      return add(kernels->packed_bytes(shape), [=](char* to) {
        kernels->pack(shape, Operands(weight, type, wanted, count).data(), bias, to);
      });
    // Weights of zero for channels that the map has and the convolution has not. (A tile's layout, so bfloat16.)
    MVIT_CHECK(static_cast<double>(out) * static_cast<double>(wide) * static_cast<double>(taps) < 0x1p40,
               "pack_network: a convolution is too large");
    const auto widths = value(step.source.value).widths;
    const auto starts = starts_[static_cast<std::size_t>(step.source.value)];
    return add(kernels->packed_bytes(shape), [=](char* to) {
      std::vector<uint16_t> padded(static_cast<std::size_t>(out * wide * taps));
      const auto* from = reinterpret_cast<const uint16_t*>(weight);
      for (int64_t o = 0; o < out; ++o)
        for (std::size_t part = 0; part < widths.size(); from += widths[part++] * taps)
          std::memcpy(padded.data() + (o * wide + starts[part]) * taps, from,
                      static_cast<std::size_t>(widths[part] * taps) * sizeof *from);
      kernels->pack(shape, padded.data(), bias, to);
    });
  }

  int64_t add_depthwise(const StoredStep& step) {
    const int64_t* w = step.words, channels = step.target.channels;
    MVIT_CHECK(step.source.channels == channels, "pack_network: a depthwise convolution has two widths");
    const char* weight = matrix(w[3], 9 * channels);
    const float* bias = vector(w[4], channels);
    const StoredType type = stored_.type;
    return add(static_cast<std::size_t>(10 * channels) * sizeof(float), [=](char* to) {
      const Operands taps(weight, type, StoredType::float32, 9 * channels);
      const auto* from = reinterpret_cast<const float*>(taps.data());
      auto* rows = reinterpret_cast<float*>(to);
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t tap = 0; tap < 9; ++tap) rows[tap * channels + c] = from[9 * c + tap];
        rows[9 * channels + c] = bias[c];
      }
    });
  }

  int64_t add_inverted_residual(const StoredStep& step) {
    const int64_t *w = step.words, in = step.source.channels, hidden = w[0], out = step.target.channels;
    MVIT_CHECK(is_size(hidden), "pack_network: an inverted residual of ", hidden, " hidden channels");
    const int64_t counts[3] = {hidden * in, hidden * 9, out * hidden};
    const char* const weights[3] = {matrix(w[4], counts[0]), matrix(w[6], counts[1]), matrix(w[8], counts[2])};
    const float* const biases[3] = {vector(w[5], hidden), vector(w[7], hidden), vector(w[9], out)};
    const InvertedResidualTable& table = MVIT_KERNELS_FOR(inverted_residual, pairs());
    const InvertedResidualKernels* kernels = pairs() ? &table.pairs : &table.single;
    const InvertedResidualShape shape{1, 1, in, hidden, out, 1, 1, false};
    const StoredType type = stored_.type, wanted = operands();
    const std::array all{weights[0], weights[1], weights[2]};
    const std::array vectors{biases[0], biases[1], biases[2]};
    const std::array sizes{counts[0], counts[1], counts[2]};
    return add(kernels->packed_bytes(shape), [=](char* to) {
      const Operands expand(all[0], type, wanted, sizes[0]), depthwise(all[1], type, wanted, sizes[1]),
          project(all[2], type, wanted, sizes[2]);
      kernels->pack(shape,
                    {expand.data(), vectors[0], depthwise.data(), vectors[1], project.data(), vectors[2]}, to);
    });
  }

  // A transformer's matrix, or `parts` of as many rows that are packed one after another.
  int64_t add_matrix(int64_t address, int64_t rows, int64_t columns, int64_t parts = 1) {
    const char* from = matrix(address, parts * rows * columns);
    const TransformerTable& table = MVIT_KERNELS_FOR(transformer, pairs());
    const TransformerKernels* kernels = pairs() ? &table.pairs : &table.single;
    const std::size_t bytes = kernels->matrix_bytes(rows, columns), element = pairs() ? 2 : 4;
    const StoredType type = stored_.type, wanted = operands();
    return add(static_cast<std::size_t>(parts) * bytes, [=](char* to) {
      const Operands values(from, type, wanted, parts * rows * columns);
      for (int64_t part = 0; part < parts; ++part) {
        const char* one = values.data() + static_cast<std::size_t>(part * rows * columns) * element;
        char* place = to + static_cast<std::size_t>(part) * bytes;
        if (kernels->pack == nullptr)
          std::memcpy(place, one, bytes);
        else
          kernels->pack(one, rows, columns, place);
      }
    });
  }

  // The steps' words after their places, with addresses of packed weights.
  std::vector<int64_t> transformer_words(const StoredStep& step) {
    const int64_t* w = step.words, d = step.source.channels, inner = w[1], hidden = w[2];
    MVIT_CHECK(is_size(w[0]) && is_size(inner) && is_size(hidden) && inner % w[0] == 0,
               "pack_network: a transformer has heads or widths that there are not");
    std::vector<int64_t> words(w, w + 7);
    for (int64_t norm = 7; norm < 9; ++norm) words.push_back(w[norm] < 0 ? -1 : add_vector(w[norm], d));
    for (const int64_t* layer = w + kTransformerWords; layer < w + step.count; layer += kLayerWords) {
      for (const int64_t norm : {layer[0], layer[1]}) words.push_back(add_vector(norm, d));
      words.push_back(add_matrix(layer[2], inner, d, 3));
      words.push_back(layer[kQkvBias] < 0 ? -1 : add_vector(layer[kQkvBias], 3 * inner));
      words.push_back(add_matrix(layer[4], d, inner));
      for (const int64_t vector : {layer[5], layer[6], layer[7]}) words.push_back(add_vector(vector, d));
      words.push_back(add_matrix(layer[8], hidden, d));
      words.push_back(add_vector(layer[9], hidden));
      words.push_back(add_matrix(layer[10], d, hidden));
      words.push_back(add_vector(layer[11], d));
    }
    return words;
  }

  std::vector<int64_t> words_of(const StoredStep& step) {
    const int64_t* w = step.words;
    switch (step.kind) {
      case kCopy:
      case kMean:
        return {};
      case kConvolution:
        return {w[0], w[1], w[2], w[3], add_convolution(step)};
      case kInvertedResidual:
        return {w[0], w[1], w[2], w[3], add_inverted_residual(step)};
      case kTransformer:
        return transformer_words(step);
      case kToWholePatches:
        return {w[0], w[1]};
      case kToSizeOf:
        MVIT_CHECK(w[0] >= 0 && w[0] <= last(), "pack_network: a step takes the size of what there is not");
        return {index_of(w[0])};
      case kDepthwiseConvolution:
        return {w[0], w[1], w[2], add_depthwise(step)};
    }
    return {};
  }

  std::vector<int64_t> packed(const StoredStep& step) {
    return made(step.kind, placed(step.source), placed(step.target), words_of(step));
  }

  static std::vector<int64_t> made(Kind kind, const Place& source, const Place& target, std::vector<int64_t> words) {
    std::vector<int64_t> step{kStepWords + static_cast<int64_t>(words.size()), kind, source.value, source.offset,
                              source.channels, target.value, target.offset, target.channels};
    step.insert(step.end(), words.begin(), words.end());
    return step;
  }

  void finish() {
    const auto whole = [&](std::size_t index) {
      return Place{static_cast<int64_t>(index), 0, values_[index][0]};
    };
    if (copies_x_) steps_.insert(steps_.begin(), made(kCopy, whole(0), whole(1), {}));
    if (converts()) steps_.push_back(made(kCopy, whole(values_.size() - 2), whole(values_.size() - 1), {}));
    auto& words = result_.words_;
    words = {kProgramVersion, static_cast<int64_t>(products_), static_cast<int64_t>(values_.size()),
             static_cast<int64_t>(steps_.size())};
    for (const auto& value : values_) words.insert(words.end(), value.begin(), value.end());
    for (const auto& step : steps_) words.insert(words.end(), step.begin(), step.end());
    const Program program = parse_program({words.data(), static_cast<int64_t>(words.size())});
    check_weights(program, {nullptr, result_.bytes_});
  }

  PackedProgram& result_;
  const Stored stored_;
  const Bytes weights_;
  Bf16Products products_ = Bf16Products::none;
  int64_t padded_image_ = -1;
  bool copies_x_ = false;
  std::vector<std::array<int64_t, 2>> values_;  // channels and border
  std::vector<std::vector<int64_t>> starts_;    // of the parts of each stored value
  std::vector<std::vector<int64_t>> steps_;
};

PackedProgram::PackedProgram(Words stored, Bytes weights) { Packing(*this, stored, weights); }

void PackedProgram::write_weights(char* to) const {
  ask_for_huge_pages(to, bytes_);
  if (bytes_ > 0) std::memset(to, 0, bytes_);  // gaps between parts: equal weights are to give equal bytes
  run_parts(static_cast<int64_t>(parts_.size()), 1, [&](int64_t begin, int64_t end) {
    for (auto i = static_cast<std::size_t>(begin); i < static_cast<std::size_t>(end); ++i)
      parts_[i].write(to + parts_[i].offset);
  });
}

}  // namespace mvit
