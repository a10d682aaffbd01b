# SPDX-License-Identifier: Apache-2.0
# Libraries for a wheel that runs wherever manylinux_2_28 does (RHEL 8, Ubuntu 20.04, Debian 11 and later), whatever the
# age of the glibc and libstdc++ that they are linked with. `make wheel` asks for it with MVIT_KERNELS_MANYLINUX=1; a
# library built for the machine itself needs none of it. `auditwheel repair` checks the result, and names what is too new.

# What glibc 2.34 took over from libdl, libpthread and librt. The CUDA runtime asks for all of them, our own sources for
# dlsym. Only what a library asks for gets into it.
set(MVIT_MOVED_IN_GLIBC_2_34
    dlclose dlerror dlmopen dlopen dlsym dlvsym
    pthread_condattr_setpshared pthread_create pthread_detach pthread_getspecific pthread_join pthread_key_create
    pthread_key_delete pthread_kill pthread_mutex_trylock pthread_mutexattr_destroy pthread_mutexattr_init
    pthread_mutexattr_setpshared pthread_mutexattr_settype pthread_once pthread_rwlock_destroy pthread_rwlock_init
    pthread_rwlock_rdlock pthread_rwlock_timedrdlock pthread_rwlock_timedwrlock pthread_rwlock_tryrdlock
    pthread_rwlock_trywrlock pthread_rwlock_unlock pthread_rwlock_wrlock pthread_rwlockattr_destroy
    pthread_rwlockattr_init pthread_rwlockattr_setpshared pthread_setspecific pthread_spin_destroy pthread_spin_init
    pthread_spin_lock pthread_spin_trylock pthread_spin_unlock
    sem_destroy sem_init sem_post sem_timedwait sem_trywait sem_wait shm_open shm_unlink)

# An archive, of which the linker takes what is asked for, and whose symbols are not exported.
function(mvit_make_manylinux)
  set(first GLIBC_2.2.5)
  set(first_of_dlmopen GLIBC_2.3.4)
  if(CMAKE_SYSTEM_PROCESSOR STREQUAL "aarch64")
    set(first GLIBC_2.17)
    set(first_of_dlmopen GLIBC_2.17)
  endif()
  set(sources)
  foreach(name IN LISTS MVIT_MOVED_IN_GLIBC_2_34)
    set(version ${first})
    if(DEFINED first_of_${name})
      set(version ${first_of_${name}})
    endif()
    configure_file("${MVIT_ROOT}/csrc/manylinux/forward.cpp.in" "${CMAKE_BINARY_DIR}/manylinux/${name}.cpp" @ONLY)
    list(APPEND sources "${CMAKE_BINARY_DIR}/manylinux/${name}.cpp")
  endforeach()
  add_library(mvit_manylinux STATIC ${sources} "${MVIT_ROOT}/csrc/manylinux/libstdcxx.cpp"
                                    "${MVIT_ROOT}/csrc/manylinux/single_threaded.cpp")
  target_link_libraries(mvit_manylinux PRIVATE mvit_cxx)
  set_target_properties(mvit_manylinux PROPERTIES CXX_STANDARD 20 CXX_STANDARD_REQUIRED ON CXX_EXTENSIONS OFF)
endfunction()

# mvit_link_for_manylinux(TARGET [LIBRARY…]): the LIBRARY names are those that TARGET needed before glibc 2.34
function(mvit_link_for_manylinux target)
  if(NOT "$ENV{MVIT_KERNELS_MANYLINUX}" STREQUAL "1")
    return()
  endif()
  if(NOT TARGET mvit_manylinux)
    mvit_make_manylinux()
  endif()
  # Where glibc is older than 2.34 these libraries have the symbols; newer ones have them too, empty.
  list(TRANSFORM ARGN PREPEND "-l:")
  target_link_libraries(${target} PRIVATE mvit_manylinux -Wl,--no-as-needed ${ARGN} -Wl,--as-needed)
  target_link_options(${target} PRIVATE -Wl,--exclude-libs,libmvit_manylinux.a -Wl,--strip-all)
endfunction()
