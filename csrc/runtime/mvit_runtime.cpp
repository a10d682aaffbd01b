// SPDX-License-Identifier: Apache-2.0
// The functions of mvit_runtime.h.
#include "mvit_runtime.h"

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

#include "../cpu/isa.h"
#include "../cpu/pack_program.h"
#include "../cpu/program.h"
#include "file.h"
#include "images.h"
#include "thread_pool.h"

namespace mvit {
namespace {

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char[], Free>;

Memory allocate(std::size_t bytes) {
  void* memory = nullptr;
  MVIT_CHECK(posix_memalign(&memory, 64, bytes > 0 ? bytes : 1) == 0, "there is no memory for ", bytes, " bytes");
  return Memory(static_cast<char*>(memory));
}

int processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned count = std::thread::hardware_concurrency();
  return count > 0 ? static_cast<int>(count) : 1;
}

thread_local std::string error_text;

// Runs `body`; an exception becomes error_text and -1.
template <typename Body>
int guarded(const char* function, const Body& body) noexcept {
  try {
    body();
    error_text.clear();
    return 0;
  } catch (const std::bad_alloc&) {
    error_text = std::string(function) + ": there is not enough memory";
  } catch (const std::exception& error) {
    error_text = std::string(function) + ": " + error.what();
  }
  return -1;
}

constexpr int64_t kMostImages = int64_t{1} << 31;
constexpr int64_t kMostElements = int64_t{1} << 40;

}  // namespace
}  // namespace mvit

using namespace mvit;

struct mvit_network {
  NetworkFile file;  // without what it pointed to
  std::vector<int64_t> words;
  Memory weights;
  std::size_t weight_bytes;
  int64_t channels;  // of the images
  bool wants_rows;
  ThreadPool::Pointer pool;

  explicit mvit_network(Bytes bytes) : file(read_file(bytes)), pool(ThreadPool::make(processors())) {
    const PackedProgram packed(file.words, file.weights);
    words = packed.words();
    const Program program = parse();
    weight_bytes = packed.bytes();
    weights = allocate(weight_bytes);
    const ThreadPool::Use use(*pool);
    packed.write_weights(weights.get());
    file.words = {};
    file.weights = {};
    channels = program.values.front().channels;
    wants_rows = program.steps.front().kind != kCopy;
    MVIT_CHECK(file.channels > 0 && file.channels <= program.values.back().channels && !(file.normalizes && channels > 4),
               "the file is damaged: its program makes ", program.values.back().channels, " channels of ", channels);
  }

  Program parse() const { return parse_program({words.data(), static_cast<int64_t>(words.size())}); }

  Program program_for(const Images& images) const {
    Program program = parse();
    lay_out(program, images);
    return program;
  }

  Images sized(int64_t batch, int64_t height, int64_t width) const {
    MVIT_CHECK(batch > 0 && height > 0 && width > 0 && batch < kMostImages && height < kMostImages && width < kMostImages &&
                   static_cast<double>(batch) * static_cast<double>(height) * static_cast<double>(width) *
                           static_cast<double>(channels) < static_cast<double>(kMostElements),
               "images of ", batch, " x ", height, " x ", width, " are none, or too large");
    return {nullptr, file.type == StoredType::bfloat16, batch, channels, height, width,
            height * width * channels, 1, width * channels, channels};
  }

  void run(const mvit_images& given, float* result, std::size_t size) const {
    MVIT_CHECK(given.data != nullptr && result != nullptr, "images.data or result is NULL");
    MVIT_CHECK(given.type == MVIT_FLOAT32 || given.type == MVIT_UINT8, "images.type is ", static_cast<int>(given.type),
               "; MVIT_FLOAT32 or MVIT_UINT8 is wanted");
    MVIT_CHECK(given.layout == MVIT_NCHW || given.layout == MVIT_NHWC, "images.layout is ",
               static_cast<int>(given.layout), "; MVIT_NCHW or MVIT_NHWC is wanted");
    MVIT_CHECK(given.type == MVIT_FLOAT32 || file.normalizes,
               "the file does not say how uint8 images are normalized; normalize them yourself and pass MVIT_FLOAT32, or "
               "give freeze(model).save a preprocessing");
    sized(given.batch, given.height, given.width);
    const ThreadPool::Use use(*pool);
    std::optional<Scratch> memory, made;  // fresh pages take 2 % of XXS in bfloat16 at batch 8
    const Images images = read_images(given, file, channels, wants_rows, memory);
    const Program program = program_for(images);
    check_weights(program, {weights.get(), weight_bytes});
    const Value& last = program.values.back();
    const std::size_t element = images.bf16 ? 2 : 4;
    const int64_t pixels = given.batch * last.height * last.width;
    MVIT_CHECK(size == static_cast<std::size_t>(pixels * file.channels), "result has room for ", size,
               " floats, and the result has ", pixels * file.channels, ": ask mvit_output_shape");
    const bool in_place = file.type == StoredType::float32 && last.channels == file.channels &&
                          (given.layout == MVIT_NHWC || last.height * last.width == 1);
    if (!in_place) made.emplace(static_cast<std::size_t>(pixels * last.channels) * element, ScratchUse::result);
    const Images out{in_place ? static_cast<void*>(result) : made->data(), images.bf16, given.batch, last.channels,
                     last.height, last.width, last.height * last.width * last.channels, 1, last.width * last.channels,
                     last.channels};
    run_program(program, images, out, weights.get());
    if (!in_place) write_result(out, file, given.layout, result);
  }
};

extern "C" {

int mvit_open_memory(const void* data, size_t size, mvit_network** network) {
  return guarded("mvit_open_memory", [&] {
    MVIT_CHECK(network != nullptr, "network is NULL");
    *network = nullptr;
    MVIT_CHECK(data != nullptr, "data is NULL");
    if (reinterpret_cast<uintptr_t>(data) % 64 == 0) {
      *network = new mvit_network({static_cast<const char*>(data), size});
    } else {
      const Memory copy = allocate(size);
      std::memcpy(copy.get(), data, size);
      *network = new mvit_network({copy.get(), size});
    }
  });
}

int mvit_open(const char* path, mvit_network** network) {
  return guarded("mvit_open", [&] {
    MVIT_CHECK(network != nullptr, "network is NULL");
    *network = nullptr;
    MVIT_CHECK(path != nullptr, "path is NULL");
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> stream(std::fopen(path, "rb"), std::fclose);
    long size = -1;
    if (stream != nullptr && std::fseek(stream.get(), 0, SEEK_END) == 0) size = std::ftell(stream.get());
    MVIT_CHECK(size >= 0 && size < (1L << 40) && std::fseek(stream.get(), 0, SEEK_SET) == 0, path, ": ",
               std::strerror(errno));
    const Memory bytes = allocate(static_cast<std::size_t>(size));
    const std::size_t read = std::fread(bytes.get(), 1, static_cast<std::size_t>(size), stream.get());
    MVIT_CHECK(read == static_cast<std::size_t>(size), path, ": ", read, " of ", size, " bytes could be read");
    try {
      *network = new mvit_network({bytes.get(), read});
    } catch (const std::runtime_error& error) {
      raise_error(path, ": ", error.what());
    }
  });
}

void mvit_close(mvit_network* network) { delete network; }

int mvit_input_shape(const mvit_network* network, int64_t shape[3]) {
  return guarded("mvit_input_shape", [&] {
    MVIT_CHECK(network != nullptr && shape != nullptr, "network or shape is NULL");
    shape[0] = network->channels;
    shape[1] = network->file.height;
    shape[2] = network->file.width;
  });
}

int mvit_output_shape(const mvit_network* network, int64_t batch, int64_t height, int64_t width, int64_t shape[4]) {
  return guarded("mvit_output_shape", [&] {
    MVIT_CHECK(network != nullptr && shape != nullptr, "network or shape is NULL");
    const Program program = network->program_for(network->sized(batch, height, width));
    shape[0] = batch;
    shape[1] = network->file.channels;
    shape[2] = program.values.back().height;
    shape[3] = program.values.back().width;
  });
}

int mvit_run(const mvit_network* network, const mvit_images* images, float* result, size_t size) {
  return guarded("mvit_run", [&] {
    MVIT_CHECK(network != nullptr && images != nullptr, "network or images is NULL");
    network->run(*images, result, size);
  });
}

int mvit_set_threads(mvit_network* network, int threads) {
  return guarded("mvit_set_threads", [&] {
    MVIT_CHECK(network != nullptr, "network is NULL");
    MVIT_CHECK(threads > 0 && threads <= 1024, "threads is ", threads, "; 1 to 1024 is wanted");
    if (threads != network->pool->threads()) network->pool = ThreadPool::make(threads);
  });
}

int mvit_threads(const mvit_network* network) { return network == nullptr ? 0 : network->pool->threads(); }

const char* mvit_metadata(const mvit_network* network) {
  return network == nullptr ? "" : network->file.metadata.c_str();
}

const char* mvit_error_text(void) { return error_text.c_str(); }

const char* mvit_runtime_version(void) { return MVIT_VERSION; }

const char* mvit_instruction_set(void) { return instruction_set_name(); }

}  // extern "C"
