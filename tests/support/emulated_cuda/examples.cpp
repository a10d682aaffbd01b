// SPDX-License-Identifier: Apache-2.0
// Small kernels for tests/backends/cuda/test_emulation.py: each in a correct version and faulty ones, selected by
// `fault`.
#include <simt.h>  // csrc/cuda/simt.h, which includes the one in this folder

namespace mvit {
namespace {

constexpr int kThreads = 64;

// Each thread reads its neighbour's number, also across warps. Fault 1: no barrier. Fault 2: the number is stored again
// before the neighbour has read it.
MVIT_KERNEL(kThreads, 1) neighbour(uint32_t* out, int64_t fault) {
  const int i = thread_index();
  store_shared<uint32_t>(4 * i, i);
  if (fault != 1) sync_threads();
  const uint32_t found = load_shared<uint32_t>(4 * ((i + 1) % kThreads));
  if (fault == 2) store_shared<uint32_t>(4 * i, i);
  store_global(out + i, found);
}

// The same within a warp. Fault 1: no warp barrier. Fault 2: an mma instead, which does not order memory.
MVIT_KERNEL(kThreads, 1) neighbour_in_warp(uint32_t* out, int64_t fault) {
  const int i = thread_index();
  store_shared<uint32_t>(4 * i, i);
  if (fault == 0) sync_warp();
  float d[4] = {};
  if (fault == 2) mma<Half>(d, {0, 0}, {0});
  store_global(out + i, load_shared<uint32_t>(4 * (i / 32 * 32 + (i + 1) % 32)));
}

// Sums of `chunks` × 64 words, streamed through a ring of two slots. Fault 1: the wait is one group short. Fault 2: no
// wait. Fault 3: no barrier after the wait. Fault 4: the next chunk is requested before the barrier that frees its
// slot. Fault 5: copies are never committed.
MVIT_KERNEL(kThreads, 1) ring(const uint32_t* in, uint32_t* out, int64_t chunks, int64_t fault) {
  const int i = thread_index();
  const auto issue = [&](int64_t chunk) {
    if (chunk < chunks) copy_async<4>(chunk % 2 * 256 + 4 * i, in + chunk * kThreads + i);
    if (fault != 5) commit_copies();
  };
  issue(0);
  uint32_t sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    if (fault == 4) issue(chunk + 1);
    if (fault == 1 || fault == 4)
      wait_copies<1>();
    else if (fault != 2)
      wait_copies<0>();
    if (fault != 3) sync_threads();
    if (fault != 4) issue(chunk + 1);
    sum += load_shared<uint32_t>(chunk % 2 * 256 + 4 * (kThreads - 1 - i));
  }
  wait_copies<0>();
  store_global(out + i, sum);
}

// The sum over a warp. Fault 1: half of the lanes do not take part. Fault 2: half of the lanes are at another shuffle.
// Fault 3: one thread returns before the barrier.
MVIT_KERNEL(kThreads, 1) sum(uint32_t* out, int64_t fault) {
  const int i = thread_index();
  uint32_t total = i;
  for (int mask = 16; mask > 0; mask /= 2) {
    if (fault == 1 && i % 2) continue;
    if (fault == 2 && i % 2)
      total += shuffle_xor(total, mask);
    else
      total += shuffle_xor(total, mask);
  }
  if (fault == 3 && i == 5) return;
  sync_threads();
  store_global(out + i, total);
}

// Faults 1 to 8: shared memory out of range, misaligned, never written; global memory out of range, misaligned, in a
// read-only tensor, stored by two threads, read from another block that stores it.
MVIT_KERNEL(kThreads, 1) touch(const uint32_t* in, uint32_t* out, int64_t fault) {
  const int i = thread_index();
  uint32_t* mine = out + block_index() * kThreads + i;
  store_shared<uint32_t>(fault == 1 ? 4 * i + 4 : 4 * i, i);
  uint32_t value = i;
  if (fault == 2) value = load_shared<Words2>(8 * (i / 2) + 4).x;
  if (fault == 3 && i == 7) value = load_shared<uint32_t>(256);
  value += load_global<uint32_t>(in + (fault == 4 ? i + 1 : i));
  if (fault == 5) value += load_global<Words2>(in + (i & ~1) + 1).x;
  if (fault == 6) store_global(const_cast<uint32_t*>(in) + i, value);
  if (fault == 7) store_global(out + i / 2, 1u);
  if (fault == 8) value += load_global<uint32_t>(out + i);
  store_global(mine, value);
}

// One ldmatrix, plain or transposed. Fault 1: no barrier between the stores and the load.
MVIT_KERNEL(kThreads, 1)
matrices(const uint16_t* in, uint32_t* out, int64_t transposed, int64_t stride, int64_t fault) {
  const int i = thread_index(), warp = warp_index(), lane = lane_index();
  store_shared(stride * i, load_global<Words4>(in + 8 * i));  // 8 rows of 16 bytes for each of 8 matrices
  if (fault == 0) sync_threads();
  uint32_t r[4];
  if (transposed)
    load_matrices_transposed(r, stride * i);
  else
    load_matrices(r, stride * i);
  for (int matrix = 0; matrix < 4; ++matrix) store_global(out + (warp * 4 + matrix) * 32 + lane, r[matrix]);
}

// 16 × K · K × 8 for K = 16 and 8, from fragments laid out as csrc/cuda/simt.h describes.
template <typename T, int K>
MVIT_KERNEL(32, 1) product(const uint16_t* a, const uint16_t* b, float* d) {
  const int g = lane_index() / 4, t = lane_index() % 4 * 2;
  uint32_t left[K / 4], right[K / 8];
  for (int i = 0; i < K / 4; ++i) left[i] = load_global<uint32_t>(a + (g + i % 2 * 8) * K + t + i / 2 * 8);
  for (int i = 0; i < K / 8; ++i)
    right[i] = load_global<uint16_t>(b + (t + 8 * i) * 8 + g) |
               static_cast<uint32_t>(load_global<uint16_t>(b + (t + 1 + 8 * i) * 8 + g)) << 16;
  float sums[4] = {1, 1, 1, 1};
  mma<T>(sums, left, right);
  for (int i = 0; i < 4; ++i) store_global(d + (g + i / 2 * 8) * 8 + t + i % 2, sums[i]);
}

using emulation::emulate;

}  // namespace
}  // namespace mvit

using namespace mvit;

extern "C" {

const char* neighbour(uint64_t seed, uint32_t* out, int64_t fault) {
  return emulation_result(emulate(seed, 1, 1, kThreads, 256, mvit::neighbour, out, fault));
}
const char* neighbour_in_warp(uint64_t seed, uint32_t* out, int64_t fault) {
  return emulation_result(emulate(seed, 1, 1, kThreads, 256, mvit::neighbour_in_warp, out, fault));
}
const char* ring(uint64_t seed, const uint32_t* in, uint32_t* out, int64_t chunks, int64_t fault) {
  return emulation_result(emulate(seed, 1, 1, kThreads, 512, mvit::ring, in, out, chunks, fault));
}
const char* sum(uint64_t seed, uint32_t* out, int64_t fault) {
  return emulation_result(emulate(seed, 1, 1, kThreads, 0, mvit::sum, out, fault));
}
const char* touch(uint64_t seed, const uint32_t* in, uint32_t* out, int64_t fault) {
  const uint32_t shared_bytes = fault == 1 ? 256 : 260;
  return emulation_result(emulate(seed, 2, 1, kThreads, shared_bytes, mvit::touch, in, out, fault));
}
const char* matrices(uint64_t seed, const uint16_t* in, uint32_t* out, int64_t transposed, int64_t stride,
                     int64_t fault) {
  return emulation_result(
      emulate(seed, 1, 1, kThreads, kThreads * stride, mvit::matrices, in, out, transposed, stride, fault));
}
const char* product(uint64_t seed, const uint16_t* a, const uint16_t* b, float* d, int64_t k, int64_t half) {
  const auto kernel = half ? (k == 16 ? mvit::product<Half, 16> : mvit::product<Half, 8>)
                           : (k == 16 ? mvit::product<BFloat16, 16> : mvit::product<BFloat16, 8>);
  return emulation_result(emulate(seed, 1, 1, 32, 0, kernel, a, b, d));
}

// Conversions and special functions of `count` values; no launch.
const char* rounded(uint64_t, const float* in, uint16_t* out, int64_t count, int64_t half) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = static_cast<uint16_t>(half ? pack<Half>(0, in[i]) >> 16 : pack<BFloat16>(in[i], 0));
  return nullptr;
}
const char* widened(uint64_t, const uint16_t* in, float* out, int64_t count, int64_t half) {
  for (int64_t i = 0; i < count; ++i) out[i] = half ? unpack_high<Half>(in[i] << 16) : unpack_low<BFloat16>(in[i]);
  return nullptr;
}
const char* approximated(uint64_t, const float* in, float* out, int64_t count, int64_t function) {
  float (*functions[])(float) = {exp2_approximate, log2_approximate, reciprocal_approximate, rsqrt_approximate,
                                 tanh_approximate};
  for (int64_t i = 0; i < count; ++i) out[i] = functions[function](in[i]);
  return nullptr;
}
// Of pairs: a · b + c, or tanh a where `b` is null.
const char* halves(uint64_t, const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = b ? fma_halves(a[i], b[i], c[i]) : tanh_halves(a[i]);
  return nullptr;
}

}  // extern "C"
