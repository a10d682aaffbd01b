// SPDX-License-Identifier: Apache-2.0
// A stand-in for what csrc/cpu uses of LibTorch's stable ABI, so that its fronts are compiled as they are for a machine
// that has no torch. Threads run one after another, with torch's own shares of the work. Every tensor lies between
// guards, and a new one is full of NaN.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#define STD_TORCH_CHECK(condition, ...) \
  ((condition) ? static_cast<void>(0) : throw std::runtime_error(::stand_in::text(__VA_ARGS__)))
#define TORCH_ERROR_CODE_CHECK(call) STD_TORCH_CHECK((call) == 0, #call)

namespace stand_in {

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

inline int64_t threads = 1;          // as many as a call asks for
inline bool overran_a_guard = false;  // set when a buffer is freed

struct Buffer {
  static constexpr std::size_t kGuard = 64;
  static constexpr unsigned char kGuardByte = 0xa5;
  char* data;
  std::size_t bytes;

  // `past`: bytes past a multiple of 64 at which the data begins
  Buffer(std::size_t size, std::size_t past) : bytes(size) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, size + past + 2 * kGuard) != 0) throw std::bad_alloc();
    block_ = static_cast<char*>(memory);
    data = block_ + kGuard + past;
    std::memset(block_, kGuardByte, size + past + 2 * kGuard);
    if (size > 0) std::memset(data, 0xff, size);  // NaN in every dtype
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    const auto is_whole = [](const char* p) {
      for (std::size_t i = 0; i < kGuard; ++i)
        if (static_cast<unsigned char>(p[i]) != kGuardByte) return false;
      return true;
    };
    if (!is_whole(data - kGuard) || !is_whole(data + bytes)) overran_a_guard = true;
    std::free(block_);
  }

 private:
  char* block_;
};

}  // namespace stand_in

struct AtenTensorOpaque;
using AtenTensorHandle = AtenTensorOpaque*;

namespace torch::headeronly {

enum class ScalarType : int32_t { Byte = 0, Long = 4, Half = 5, Float = 6, Double = 7, BFloat16 = 15 };

struct BFloat16 {
  uint16_t bits;
  explicit BFloat16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    bits = static_cast<uint16_t>(value != value ? 0x7fc0 : (wide + 0x7fff + (wide >> 16 & 1)) >> 16);
  }
};

}  // namespace torch::headeronly

namespace torch::stable {

using headeronly::ScalarType;

inline std::size_t bytes_of(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
      return 1;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Float:
      return 4;
    default:
      return 8;
  }
}

class Tensor {
 public:
  using Sizes = std::vector<int64_t>;

  Tensor() = default;
  Tensor(std::shared_ptr<stand_in::Buffer> buffer, Sizes sizes, Sizes strides, ScalarType type)
      : buffer_(std::move(buffer)), sizes_(std::move(sizes)), strides_(std::move(strides)), type_(type) {}
  Tensor(Sizes sizes, ScalarType type) : sizes_(std::move(sizes)), strides_(sizes_.size()), type_(type) {
    int64_t step = 1;
    for (std::size_t axis = sizes_.size(); axis-- > 0; step *= sizes_[axis] > 0 ? sizes_[axis] : 1) strides_[axis] = step;
    buffer_ = std::make_shared<stand_in::Buffer>(static_cast<std::size_t>(numel()) * bytes_of(type), 0);
  }
  explicit Tensor(AtenTensorHandle handle) {
    auto* given = reinterpret_cast<Tensor*>(handle);
    *this = *given;
    delete given;
  }
  AtenTensorHandle get() const { return reinterpret_cast<AtenTensorHandle>(const_cast<Tensor*>(this)); }

  int64_t dim() const { return static_cast<int64_t>(sizes_.size()); }
  const Sizes& sizes() const { return sizes_; }
  const Sizes& strides() const { return strides_; }
  int64_t size(int64_t axis) const { return sizes_.at(place(axis)); }
  int64_t stride(int64_t axis) const { return strides_.at(place(axis)); }
  int64_t numel() const {
    int64_t count = 1;
    for (const int64_t size : sizes_) count *= size;
    return count;
  }
  ScalarType scalar_type() const { return type_; }
  bool is_cpu() const { return true; }
  bool is_contiguous() const {
    if (numel() == 0) return true;
    int64_t step = 1;
    for (std::size_t axis = sizes_.size(); axis-- > 0; step *= sizes_[axis])
      if (sizes_[axis] != 1 && strides_[axis] != step) return false;
    return true;
  }
  const void* const_data_ptr() const { return data(); }
  void* mutable_data_ptr() const { return data(); }

 private:
  std::size_t place(int64_t axis) const { return static_cast<std::size_t>(axis < 0 ? axis + dim() : axis); }
  char* data() const { return numel() == 0 ? nullptr : buffer_->data; }

  std::shared_ptr<stand_in::Buffer> buffer_;
  Sizes sizes_, strides_;
  ScalarType type_ = ScalarType::Float;
};

// Of float16 alone, which is PyTorch's business on every processor (csrc/cpu/float16.h): not tested here.
inline Tensor to(const Tensor&, ScalarType) { throw std::runtime_error("this machine converts no tensors"); }

inline Tensor contiguous(const Tensor& tensor) {
  const Tensor copy(tensor.sizes(), tensor.scalar_type());
  const std::size_t bytes = bytes_of(tensor.scalar_type());
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    int64_t rest = i, from = 0;
    for (int64_t axis = tensor.dim() - 1; axis >= 0; rest /= tensor.size(axis--))
      from += rest % tensor.size(axis) * tensor.stride(axis);
    std::memcpy(static_cast<char*>(copy.mutable_data_ptr()) + static_cast<std::size_t>(i) * bytes,
                static_cast<const char*>(tensor.const_data_ptr()) + from * static_cast<int64_t>(bytes), bytes);
  }
  return copy;
}

// Of a tensor without gaps, whose strides it keeps.
inline Tensor empty_like(const Tensor& tensor) {
  const std::size_t bytes = static_cast<std::size_t>(tensor.numel()) * bytes_of(tensor.scalar_type());
  return Tensor(std::make_shared<stand_in::Buffer>(bytes, 0), tensor.sizes(), tensor.strides(), tensor.scalar_type());
}

inline Tensor copy_(Tensor& to, const Tensor& from) {
  const std::size_t bytes = bytes_of(to.scalar_type());
  for (int64_t i = 0; i < to.numel(); ++i) {
    int64_t rest = i, at = 0, source = 0;
    for (int64_t axis = to.dim() - 1; axis >= 0; rest /= to.size(axis--)) {
      at += rest % to.size(axis) * to.stride(axis);
      source += rest % to.size(axis) * from.stride(axis);
    }
    std::memcpy(static_cast<char*>(to.mutable_data_ptr()) + at * static_cast<int64_t>(bytes),
                static_cast<const char*>(from.const_data_ptr()) + source * static_cast<int64_t>(bytes), bytes);
  }
  return to;
}

inline uint32_t get_num_threads() { return static_cast<uint32_t>(stand_in::threads); }

// The shares that at::parallel_for hands out; one inside another is not shared out.
template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  static bool inside = false;
  if (begin >= end) return;
  if (inside) return body(begin, end);
  const int64_t items = end - begin, most = (items + grain - 1) / grain;
  const int64_t share = (items + std::min(stand_in::threads, most) - 1) / std::min(stand_in::threads, most);
  inside = true;
  try {
    for (int64_t first = begin; first < end; first += share) body(first, std::min(end, first + share));
  } catch (...) {
    inside = false;
    throw;
  }
  inside = false;
}

namespace detail {
template <typename T>
uint64_t from(T value) {
  return static_cast<uint64_t>(value);
}
template <typename T>
T to(uint64_t value) {
  return static_cast<T>(value);
}
}  // namespace detail

}  // namespace torch::stable

inline int32_t aoti_torch_layout_strided() { return 0; }
inline int32_t aoti_torch_device_type_cpu() { return 0; }
inline int aoti_torch_aten_new_empty(AtenTensorHandle, const int64_t* sizes, int64_t axes, const int32_t* type,
                                     const int32_t*, const int32_t*, int32_t, const void*, AtenTensorHandle* result) {
  using namespace torch::stable;
  const auto* made = new Tensor(Tensor::Sizes(sizes, sizes + axes), static_cast<ScalarType>(*type));
  *result = made->get();
  return 0;
}

// ---- operators by name ----------------------------------------------------------------------------------------------

namespace stand_in {

using torch::stable::Tensor;
using Value = std::variant<std::monostate, int64_t, double, std::string, std::vector<int64_t>, Tensor, std::vector<Tensor>>;
using Operator = std::vector<Tensor> (*)(const std::vector<Value>&);

inline std::map<std::string, Operator>& operators() {
  static std::map<std::string, Operator> all;
  return all;
}

template <typename T>
T as(const Value& value) {
  if constexpr (std::is_same_v<T, std::optional<Tensor>>)
    return value.index() == 0 ? T() : T(std::get<Tensor>(value));
  else if constexpr (std::is_same_v<T, bool>)
    return std::get<int64_t>(value) != 0;
  else
    return std::get<T>(value);
}

inline std::vector<Tensor> listed(Tensor tensor) { return {std::move(tensor)}; }
template <typename... T>
std::vector<Tensor> listed(const std::tuple<T...>& tensors) {
  return std::apply([](const T&... each) { return std::vector<Tensor>{each...}; }, tensors);
}

template <typename Result, typename... A, std::size_t... i>
std::vector<Tensor> call(Result (*function)(A...), const std::vector<Value>& values, std::index_sequence<i...>) {
  STD_TORCH_CHECK(values.size() == sizeof...(A), "the operator takes ", sizeof...(A), " arguments");
  return listed(function(as<std::remove_cvref_t<A>>(values[i])...));
}
template <typename Result, typename... A>
std::vector<Tensor> call(Result (*function)(A...), const std::vector<Value>& values) {
  return call(function, values, std::index_sequence_for<A...>{});
}

struct Registration {
  explicit Registration(void (*fill)(Registration&)) { fill(*this); }
  void impl(const char* name, Operator op) { operators()[name] = op; }
};

}  // namespace stand_in

#define TORCH_BOX(function) [](const std::vector<::stand_in::Value>& values) { return ::stand_in::call(function, values); }
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m)                 \
  static void register_operators(::stand_in::Registration&);      \
  static const ::stand_in::Registration registration(register_operators); \
  static void register_operators(::stand_in::Registration& m)
