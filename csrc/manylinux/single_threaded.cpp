// SPDX-License-Identifier: Apache-2.0
// glibc 2.32's flag by which std::shared_ptr counts without atomics while a process has one thread. 0 says "several
// threads", which is what a process with torch has anyway.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
