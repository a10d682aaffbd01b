# SPDX-License-Identifier: Apache-2.0
# Implements the list of instruction sets in csrc/cpu/CMakeLists.txt, and generates the header that passes it to the C++
# sources.

include(CheckCXXSourceCompiles)

set(INSTRUCTION_SETS) # those that this compiler supports, from the lowest to the highest
set(INSTRUCTION_SETS_LEFT_OUT)
set(INSTRUCTION_SETS_KNOWN)

# The emulation of tiles is a sixth of what there is to compile and a tenth of the library, and no user needs it.
option(MVIT_SETS_FOR_TESTS "Compile the instruction sets that only tests use" ON)

# instruction_set(NAME [FOR_TESTS] VECTOR_BYTES n [BF16_PAIRS] [TILES [EMULATED]] [FLAGS …] [REQUIRES expression]
#                 [PREFERRED expression])
# FOR_TESTS if only tests use the set, where they force it; BF16_PAIRS if it has products of bfloat16 pairs, TILES if on
# matrix tiles, EMULATED if these are done in software. REQUIRES and PREFERRED are C++ expressions for isa.cpp.
function(instruction_set name)
  cmake_parse_arguments(PARSE_ARGV 1 given "FOR_TESTS;BF16_PAIRS;TILES;EMULATED" "VECTOR_BYTES;REQUIRES;PREFERRED" "FLAGS")
  if(given_FOR_TESTS)
    if(NOT MVIT_SETS_FOR_TESTS)
      return()
    endif()
    set(given_PREFERRED false)
  endif()
  set(supported)
  foreach(flag IN LISTS given_FLAGS)
    # Every processor with AVX2 has F16C, and compilers from before 2021 cannot test for it.
    if(flag MATCHES "^-m([a-z0-9]+)$" AND NOT flag STREQUAL "-mf16c")
      list(APPEND supported "__builtin_cpu_supports(\"${CMAKE_MATCH_1}\")")
    endif()
  endforeach()
  list(JOIN supported " && " supported)
  if(given_FLAGS)
    list(JOIN given_FLAGS " " CMAKE_REQUIRED_FLAGS)
    string(APPEND CMAKE_REQUIRED_FLAGS " -Werror")
    check_cxx_source_compiles("int main() { return ${supported}; }" COMPILES_FOR_${name})
  else()
    set(supported true)
    set(COMPILES_FOR_${name} TRUE)
  endif()
  if(COMPILES_FOR_${name})
    set(INSTRUCTION_SETS ${INSTRUCTION_SETS} ${name} PARENT_SCOPE)
  else()
    set(INSTRUCTION_SETS_LEFT_OUT ${INSTRUCTION_SETS_LEFT_OUT} ${name} PARENT_SCOPE)
  endif()
  set(INSTRUCTION_SETS_KNOWN ${INSTRUCTION_SETS_KNOWN} ${name} PARENT_SCOPE)
  set(${name}_FLAGS ${given_FLAGS} PARENT_SCOPE)
  set(${name}_VECTOR_BYTES ${given_VECTOR_BYTES} PARENT_SCOPE)
  set(${name}_BF16_PAIRS ${given_BF16_PAIRS} PARENT_SCOPE)
  set(${name}_TILES ${given_TILES} PARENT_SCOPE)
  set(${name}_EMULATED ${given_EMULATED} PARENT_SCOPE)
  if(given_REQUIRES)
    string(APPEND supported " && ${given_REQUIRES}")
  endif()
  set(${name}_SUPPORTED ${supported} PARENT_SCOPE)
  if(NOT DEFINED given_PREFERRED)
    set(given_PREFERRED true)
  endif()
  set(${name}_PREFERRED ${given_PREFERRED} PARENT_SCOPE)
endfunction()

# Writes the header that csrc/cpu/isa.h describes.
function(write_instruction_sets header)
  set(entries)
  foreach(isa IN LISTS INSTRUCTION_SETS)
    set(products pairs)
    if(NOT ${isa}_BF16_PAIRS)
      set(products none)
      set(plain ${isa})
    elseif(${isa}_TILES)
      set(products tiles)
    endif()
    list(PREPEND entries "X(${isa}, ${plain}, ${${isa}_VECTOR_BYTES}, ${products}, ${${isa}_SUPPORTED}, ${${isa}_PREFERRED} __VA_OPT__(,) __VA_ARGS__)")
  endforeach()
  list(JOIN entries " \\\n  " entries)
  list(REVERSE INSTRUCTION_SETS_KNOWN)
  list(JOIN INSTRUCTION_SETS_KNOWN "\", \"" known)
  file(
    CONFIGURE
    OUTPUT "${header}"
    CONTENT "// Written by CMake from the list in csrc/cpu/CMakeLists.txt; csrc/cpu/isa.h says what this is.
#pragma once

#define MVIT_INSTRUCTION_SETS(X, ...) \\
  @entries@
#define MVIT_KNOWN_INSTRUCTION_SETS \"@known@\"
"
    @ONLY)
endfunction()
