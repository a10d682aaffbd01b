// SPDX-License-Identifier: Apache-2.0
// What the headers of GCC 11 to 14 expect in libstdc++.so and GCC 8's, of manylinux_2_28, lacks. Newer ones have all of
// it, with the same meaning; ours are hidden, and meet no one else's.
#include <new>
#include <sstream>

namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std

template std::ostringstream::basic_ostringstream();
template std::stringstream::basic_stringstream();
#ifdef _GLIBCXX_USE_CXX11_ABI
template std::string std::stringbuf::str() const&;
template std::string std::stringbuf::str() &&;
#endif
