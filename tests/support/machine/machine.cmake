# SPDX-License-Identifier: Apache-2.0
# Adds the program `machine` to csrc/cpu: its own objects as its CMakeLists.txt compiles them, and main.cpp, on the
# stand-in for torch's headers in this folder. support/machine.py configures csrc/cpu with this file as
# CMAKE_PROJECT_INCLUDE, for another processor too.
if(NOT MVIT_MACHINE_DEFERRED)
  set(MVIT_MACHINE_DEFERRED TRUE)
  set(MVIT_MACHINE "${CMAKE_CURRENT_LIST_DIR}")
  cmake_language(DEFER CALL include "${MVIT_MACHINE}/machine.cmake") # after all else of CMakeLists.txt
else()
  set_target_properties(mvit_kernels_cpu PROPERTIES EXCLUDE_FROM_ALL ON) # there is no torch of that machine to link
  target_include_directories(fronts BEFORE PRIVATE "${MVIT_MACHINE}")
  set_target_properties(mvit_runtime PROPERTIES EXCLUDE_FROM_ALL ON)
  foreach(objects fronts engine) # a quarter of the compiler's time otherwise; kernels as they are
    target_compile_options(${objects} PRIVATE -O0)
  endforeach()
  add_executable(machine "${MVIT_MACHINE}/main.cpp" ${OBJECTS})
  target_include_directories(machine PRIVATE "${MVIT_MACHINE}")
  target_link_libraries(machine PRIVATE mvit_cxx)
  target_compile_options(machine PRIVATE -O0)
  target_link_options(machine PRIVATE -static)
  set_target_properties(machine PROPERTIES CXX_STANDARD 20 CXX_STANDARD_REQUIRED ON CXX_EXTENSIONS OFF)
endif()
