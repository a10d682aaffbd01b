// SPDX-License-Identifier: Apache-2.0
// The operators of csrc/cpu as a program: reads calls from its standard input and writes what they give to its standard
// output, until there are no more. support/machine.py is the other end, and describes the messages.
#include <unistd.h>

#include <cstring>

#include "stable_abi.h"

extern "C" const char* mvit_kernels_cpu_isa() noexcept;
extern "C" const char* mvit_kernels_cpu_plain_isa() noexcept;
extern "C" int mvit_kernels_cpu_vector_bytes() noexcept;
extern "C" int mvit_kernels_cpu_bf16_products() noexcept;

namespace stand_in {
namespace {

using torch::headeronly::ScalarType;

void read_all(void* to, std::size_t bytes) {
  for (char* p = static_cast<char*>(to); bytes > 0;) {
    const ssize_t count = read(0, p, bytes);
    if (count <= 0) _exit(0);
    p += count;
    bytes -= static_cast<std::size_t>(count);
  }
}

void write_all(const void* from, std::size_t bytes) {
  for (const char* p = static_cast<const char*>(from); bytes > 0;) {
    const ssize_t count = write(1, p, bytes);
    if (count <= 0) _exit(1);
    p += count;
    bytes -= static_cast<std::size_t>(count);
  }
}

int64_t read_int() {
  int64_t value;
  read_all(&value, sizeof value);
  return value;
}

void write_int(int64_t value) { write_all(&value, sizeof value); }

std::vector<int64_t> read_ints() {
  std::vector<int64_t> values(static_cast<std::size_t>(read_int()));
  for (int64_t& value : values) value = read_int();
  return values;
}

std::string read_text() {
  std::string text(static_cast<std::size_t>(read_int()), ' ');
  read_all(text.data(), text.size());
  return text;
}

void write_text(const std::string& text) {
  write_int(static_cast<int64_t>(text.size()));
  write_all(text.data(), text.size());
}

// The buffers of a call's arguments, which it must not write.
struct Arguments {
  std::vector<std::pair<std::shared_ptr<Buffer>, std::string>> as_they_came;

  Tensor read_tensor() {
    const auto type = static_cast<ScalarType>(read_int());
    auto sizes = read_ints(), strides = read_ints();
    const auto past = static_cast<std::size_t>(read_int());
    std::string bytes = read_text();
    auto buffer = std::make_shared<Buffer>(bytes.size(), past);
    if (!bytes.empty()) std::memcpy(buffer->data, bytes.data(), bytes.size());
    as_they_came.emplace_back(buffer, std::move(bytes));
    return Tensor(std::move(buffer), std::move(sizes), std::move(strides), type);
  }

  Value read_value() {
    switch (read_int()) {
      case 1:
        return read_int();
      case 2: {
        double value;
        read_all(&value, sizeof value);
        return value;
      }
      case 3:
        return read_text();
      case 4:
        return read_ints();
      case 5:
        return read_tensor();
      case 6: {
        std::vector<Tensor> tensors(static_cast<std::size_t>(read_int()));
        for (Tensor& tensor : tensors) tensor = read_tensor();
        return tensors;
      }
      default:
        return {};
    }
  }

  void check_unchanged() const {
    for (const auto& [buffer, bytes] : as_they_came)
      STD_TORCH_CHECK(bytes.empty() || std::memcmp(buffer->data, bytes.data(), bytes.size()) == 0,
                      "an argument was written");
  }
};

std::vector<Tensor> run(const std::string& name, const std::vector<Value>& values) {
  const auto found = operators().find(name);
  STD_TORCH_CHECK(found != operators().end(), "there is no operator ", name);
  return found->second(values);
}

void answer_call() {
  threads = read_int();
  const std::string name = read_text();
  const int64_t count = read_int();
  std::vector<Tensor> results;
  std::string error;
  overran_a_guard = false;
  {
    Arguments arguments;
    std::vector<Value> values;
    for (int64_t i = 0; i < count; ++i) values.push_back(arguments.read_value());
    try {
      results = run(name, values);
      arguments.check_unchanged();
    } catch (const std::exception& raised) {
      error = raised.what();
    }
  }
  // Taken out of the results first, so that their guards are checked too.
  std::vector<std::pair<std::vector<int64_t>, std::string>> answers;
  for (const Tensor& tensor : results) {
    std::vector<int64_t> head{static_cast<int64_t>(tensor.scalar_type())};
    head.insert(head.end(), tensor.sizes().begin(), tensor.sizes().end());
    const std::size_t bytes = static_cast<std::size_t>(tensor.numel()) * torch::stable::bytes_of(tensor.scalar_type());
    answers.emplace_back(std::move(head), bytes == 0 ? std::string()
                                                     : std::string(static_cast<const char*>(tensor.const_data_ptr()), bytes));
  }
  results.clear();
  if (error.empty() && overran_a_guard) error = "wrote before or after a tensor";
  write_text(error);
  if (!error.empty()) return;
  write_int(static_cast<int64_t>(answers.size()));
  for (const auto& [head, bytes] : answers) {
    write_int(static_cast<int64_t>(head.size()));
    for (const int64_t value : head) write_int(value);
    write_text(bytes);
  }
}

}  // namespace
}  // namespace stand_in

int main() {
  using namespace stand_in;
  write_text(mvit_kernels_cpu_isa());
  write_text(mvit_kernels_cpu_plain_isa());
  write_int(mvit_kernels_cpu_vector_bytes());
  write_int(mvit_kernels_cpu_bf16_products());
  for (;;) answer_call();
}
