# SPDX-License-Identifier: Apache-2.0
# Compiles csrc/cpu for aarch64 with a GCC for it (Debian: g++-aarch64-linux-gnu). `make wheel ARCH=aarch64` uses it:
#
#     CMAKE_TOOLCHAIN_FILE=$PWD/csrc/cmake/aarch64-linux-gnu.cmake cmake -S csrc/cpu …
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
