// SPDX-License-Identifier: Apache-2.0
// What the emulation and the kernels' sources include of the C++ library and the system: a third of the time that a
// source takes to compile without optimisation, so that support/emulation.py compiles it once.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <source_location>
#include <string>
#include <type_traits>
#include <vector>
