// SPDX-License-Identifier: Apache-2.0
// Errors of what has to work without torch, too: std::runtime_error, which torch passes on as a RuntimeError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace mvit {

template <typename... Parts>
[[noreturn]] void raise_error(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(std::move(text).str());
}

}  // namespace mvit

// MVIT_CHECK(condition, "the error's text, with ", 1, " or more parts");
#define MVIT_CHECK(condition, ...) ((condition) ? static_cast<void>(0) : ::mvit::raise_error(__VA_ARGS__))
