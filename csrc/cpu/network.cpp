// SPDX-License-Identifier: Apache-2.0
// network.cpu and pack_network.cpu: a frozen network in one call, and the weights and program that it takes, made of
// what mvit_kernels/freezing/network.py writes. The work is in run_program.cpp and pack_program.cpp.
#include <cstring>
#include <tuple>

#include "pack_program.h"
#include "program.h"
#include "tensors.h"

namespace mvit {
namespace {

Words words_of(const char* op, const Tensor& words) {
  STD_TORCH_CHECK(words.scalar_type() == ScalarType::Long && words.is_cpu() && words.dim() == 1 && words.is_contiguous(),
                  op, ": the program must be one stretch of int64 on the CPU");
  return {static_cast<const int64_t*>(words.const_data_ptr()), words.numel()};
}

Bytes bytes_of(const char* op, const Tensor& bytes) {
  STD_TORCH_CHECK(bytes.scalar_type() == ScalarType::Byte && bytes.is_cpu() && bytes.dim() == 1 && bytes.is_contiguous() &&
                      reinterpret_cast<uintptr_t>(bytes.const_data_ptr()) % 64 == 0,
                  op, ": the weights must be one stretch of bytes on the CPU, at a multiple of 64");
  return {static_cast<const char*>(bytes.const_data_ptr()), static_cast<std::size_t>(bytes.numel())};
}

Tensor network(const Tensor& x, const Tensor& weights, const Tensor& program_tensor, int64_t out_channels,
               int64_t halvings) {
  Program program = parse_program(words_of("network", program_tensor));
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && x.size(1) == program.values[0].channels && x.numel() > 0,
                  "network: x must be a (B, ", program.values[0].channels, ", H, W) map on the CPU, and not empty");
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                  "network: x must be of float32 or bfloat16");
  STD_TORCH_CHECK(!program.pairs || type == ScalarType::BFloat16,
                  "network: the weights were packed for products of bfloat16 pairs");
  const bool bf16 = type == ScalarType::BFloat16;
  const Images images{const_cast<void*>(x.const_data_ptr()), bf16, x.size(0), x.size(1), x.size(2), x.size(3),
                      x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
  const Bytes bytes = bytes_of("network", weights);
  lay_out(program, images);
  check_weights(program, bytes);
  const Value& last = program.values.back();
  STD_TORCH_CHECK(halvings >= 0 && halvings < 32 && last.channels == out_channels &&
                      last.height == ((x.size(2) - 1) >> halvings) + 1 && last.width == ((x.size(3) - 1) >> halvings) + 1,
                  "network: the program makes ", last.channels, " x ", last.height, " x ", last.width,
                  " of x, which are not ", out_channels, " channels of a map halved ", halvings, " times");
  const Tensor out = new_empty(x, {x.size(0), last.height, last.width, last.channels}, type);
  const Images result{out.mutable_data_ptr(), bf16,          out.size(0),   out.size(3),   out.size(1),
                      out.size(2),            out.stride(0), out.stride(3), out.stride(1), out.stride(2)};
  with_team([&] { run_program(program, images, result, bytes.data); });
  return out;
}

std::tuple<Tensor, Tensor> pack_network(const Tensor& program, const Tensor& weights) {
  const PackedProgram packed(words_of("pack_network", program), bytes_of("pack_network", weights));
  const auto& words = packed.words();
  const Tensor packed_program = new_empty(program, {static_cast<int64_t>(words.size())}, ScalarType::Long);
  std::memcpy(packed_program.mutable_data_ptr(), words.data(), words.size() * sizeof(int64_t));
  const Tensor packed_weights = new_empty(weights, {static_cast<int64_t>(packed.bytes())}, ScalarType::Byte);
  packed.write_weights(static_cast<char*>(packed_weights.mutable_data_ptr()));
  return {packed_program, packed_weights};
}

}  // namespace
}  // namespace mvit

STABLE_TORCH_LIBRARY_IMPL(mvit_kernels, CPU, m) {
  m.impl("network.cpu", TORCH_BOX(&mvit::network));
  m.impl("pack_network.cpu", TORCH_BOX(&mvit::pack_network));
}
