/* SPDX-License-Identifier: Apache-2.0
 *
 * Classifies a photo with a frozen network, in C, without Python or PyTorch.
 *
 *     cc -O2 -I "$(python -c 'from mvit_kernels import runtime as r; print(r.header_path().parent)')" \
 *         classify.c -o classify "$(python -c 'from mvit_kernels import runtime as r; print(r.library_path())')"
 *     ./classify s.mvit photo.ppm
 *
 * The photo is a binary PPM (P6), as ImageMagick's `convert photo.jpg -resize 288x288^ -gravity center -extent 256x256
 * photo.ppm` makes one. The classes are printed by number; names are in the file's metadata.
 */
#include <stdio.h>
#include <stdlib.h>

#include "mvit_runtime.h"

static void fail(const char* why) {
  fprintf(stderr, "classify: %s\n", why);
  exit(1);
}

static unsigned char* read_ppm(const char* path, long* width, long* height) {
  FILE* file = fopen(path, "rb");
  long most = 0;
  if (file == NULL) fail("the photo cannot be opened");
  if (fscanf(file, "P6 %ld %ld %ld", width, height, &most) != 3 || most != 255 || fgetc(file) == EOF || *width < 1 ||
      *height < 1 || *width > 10000 || *height > 10000)
    fail("the photo is no binary PPM of 8 bits");
  size_t bytes = (size_t)*width * (size_t)*height * 3;
  unsigned char* pixels = (unsigned char*)malloc(bytes);
  if (pixels == NULL || fread(pixels, 1, bytes, file) != bytes) fail("the photo is cut off");
  fclose(file);
  return pixels;
}

int main(int count, char** arguments) {
  if (count != 3) fail("classify NETWORK.mvit PHOTO.ppm");
  mvit_network* network;
  if (mvit_open(arguments[1], &network) != 0) fail(mvit_error_text());

  long width, height;
  unsigned char* pixels = read_ppm(arguments[2], &width, &height);
  const mvit_images images = {pixels, MVIT_UINT8, MVIT_NHWC, 1, height, width};
  int64_t shape[4];
  if (mvit_output_shape(network, 1, height, width, shape) != 0) fail(mvit_error_text());
  const size_t classes = (size_t)(shape[1] * shape[2] * shape[3]);
  float* logits = (float*)malloc(classes * sizeof *logits);
  if (logits == NULL) fail("there is no memory");
  if (mvit_run(network, &images, logits, classes) != 0) fail(mvit_error_text());

  for (int place = 0; place < 5 && (size_t)place < classes; ++place) {
    size_t best = 0;
    for (size_t i = 1; i < classes; ++i)
      if (logits[i] > logits[best]) best = i;
    printf("%d. class %zu, logit %.4f\n", place + 1, best, (double)logits[best]);
    logits[best] = -1e30f;
  }
  free(logits);
  free(pixels);
  mvit_close(network);
  return 0;
}
