// SPDX-License-Identifier: Apache-2.0
// What the headers of GCC 11 to 14 expect in libstdc++.so and GCC 8's, of manylinux_2_28, lacks. Newer ones have all of
// it, with the same meaning; ours are hidden, and meet no one else's.
#include <pthread.h>

#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <sstream>

// Every libstdc++.so has these; newer headers have them inline, and call _M_release and _M_addref.
extern "C" {
void mvit_destroy(void* self) noexcept __asm__("_ZNSt15__exception_ptr13exception_ptrD1Ev");
void mvit_copy(void* self, const void* other) noexcept __asm__("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
}

namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }

// The old symbol of this name may be cancelled by an exception; the headers' noexcept made a new one.
void condition_variable::wait(unique_lock<mutex>& lock) noexcept {
  pthread_cond_wait(native_handle(), lock.mutex()->native_handle());
}

namespace __exception_ptr {
void exception_ptr::_M_release() noexcept { mvit_destroy(this); }

void exception_ptr::_M_addref() noexcept {
  alignas(exception_ptr) char counted[sizeof(exception_ptr)];  // by a copy that is never destroyed
  mvit_copy(counted, this);
}
}  // namespace __exception_ptr
}  // namespace std

template std::ostringstream::basic_ostringstream();
template std::stringstream::basic_stringstream();
#ifdef _GLIBCXX_USE_CXX11_ABI
template std::string std::stringbuf::str() const&;
template std::string std::stringbuf::str() &&;
#endif
