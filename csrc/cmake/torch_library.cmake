# SPDX-License-Identifier: Apache-2.0

# Sets TORCH_CPU, the libtorch_cpu.so to link with. For another processor, of which there is no torch here, it is a
# stand-in with the same name and, all empty, the functions of the stable ABI that the torch found has: the linker
# notes the name, and a function that torch does not have stays an error.
macro(mvit_set_torch_cpu)
  set(TORCH_CPU "${TORCH_FOLDER}/lib/libtorch_cpu.so")
  if(CMAKE_CROSSCOMPILING)
    mvit_make_stand_in("${TORCH_CPU}")
    set(TORCH_CPU torch_cpu_stand_in)
  endif()
endmacro()

function(mvit_make_stand_in library)
  execute_process(COMMAND "${CMAKE_NM}" -D --defined-only --format=posix "${library}" OUTPUT_VARIABLE symbols
                  COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "\n(aoti_torch|torch)_[A-Za-z0-9_]+ T" symbols "\n${symbols}")
  list(TRANSFORM symbols REPLACE "\n(.*) T" "extern \"C\" void \\1() {}\n")
  string(JOIN "" symbols ${symbols})
  file(CONFIGURE OUTPUT stand_in/torch_cpu.cpp CONTENT "${symbols}" @ONLY)
  add_library(torch_cpu_stand_in SHARED "${CMAKE_CURRENT_BINARY_DIR}/stand_in/torch_cpu.cpp")
  set_target_properties(torch_cpu_stand_in PROPERTIES OUTPUT_NAME torch_cpu CXX_VISIBILITY_PRESET default
                                                      LIBRARY_OUTPUT_DIRECTORY stand_in)
endfunction()
