/* SPDX-License-Identifier: Apache-2.0
 *
 * Runs a frozen MobileViT from a file, on the CPU, without PyTorch or Python. The file is what Python's
 * mvit_kernels.freeze(model).save("s.mvit") writes; results are the same bits that the frozen model gives there.
 *
 *     mvit_network* network;
 *     if (mvit_open("s.mvit", &network) != 0) die(mvit_error_text());
 *     int64_t input[3], output[4];
 *     mvit_input_shape(network, input);                                         // 3, 256, 256
 *     mvit_output_shape(network, 1, input[1], input[2], output);                // 1, 1000, 1, 1
 *     mvit_images images = {pixels, MVIT_UINT8, MVIT_NHWC, 1, input[1], input[2]};
 *     if (mvit_run(network, &images, logits, 1000) != 0) die(mvit_error_text());
 *     mvit_close(network);
 *
 * Functions that return int return 0, or -1 where they fail; mvit_error_text then says why. Any number of threads may
 * run one network at the same time; mvit_set_threads and mvit_close must not run beside another call on it.
 */
#ifndef MVIT_RUNTIME_H
#define MVIT_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define MVIT_API __attribute__((visibility("default")))
#else
#define MVIT_API
#endif

typedef struct mvit_network mvit_network;

/* float: as the network was trained, scaled and normalized. uint8: RGB pixels from 0 to 255, which are normalized as the
 * file says, and put in its order of channels. */
typedef enum { MVIT_FLOAT32 = 0, MVIT_UINT8 = 1 } mvit_type;
typedef enum { MVIT_NCHW = 0, MVIT_NHWC = 1 } mvit_layout;

/* A batch of images, contiguous. */
typedef struct {
  const void* data;
  mvit_type type;
  mvit_layout layout;
  int64_t batch, height, width;
} mvit_images;

/* Read a file, or its bytes from memory (which need not outlive the call), and pack its weights for this processor. */
MVIT_API int mvit_open(const char* path, mvit_network** network);
MVIT_API int mvit_open_memory(const void* data, size_t size, mvit_network** network);

/* Free a network; NULL is ignored. */
MVIT_API void mvit_close(mvit_network* network);

/* What an image should be: channels, height, width. Other heights and widths work; these are what it was trained for. */
MVIT_API int mvit_input_shape(const mvit_network* network, int64_t shape[3]);

/* Of the result for such a batch: batch, channels (logits), height, width. */
MVIT_API int mvit_output_shape(const mvit_network* network, int64_t batch, int64_t height, int64_t width,
                               int64_t shape[4]);

/* Run a batch. `result` has room for `size` floats, as many as the output's shape has. A map has the images' layout. */
MVIT_API int mvit_run(const mvit_network* network, const mvit_images* images, float* result, size_t size);

/* How many threads a run uses, the calling one included. At first, as many as this process may use processors. */
MVIT_API int mvit_set_threads(mvit_network* network, int threads);
MVIT_API int mvit_threads(const mvit_network* network);

/* What the file says of itself, JSON in UTF-8: labels, preprocessing, where it comes from. Valid until mvit_close. */
MVIT_API const char* mvit_metadata(const mvit_network* network);

/* Why the last call on this thread failed. Valid until the next one. */
MVIT_API const char* mvit_error_text(void);

/* The library's version, and the instruction set that it uses here ("" where MVIT_KERNELS_CPU_ISA names none). */
MVIT_API const char* mvit_runtime_version(void);
MVIT_API const char* mvit_instruction_set(void);

#ifdef __cplusplus
}
#endif

#endif
