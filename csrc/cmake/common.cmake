# SPDX-License-Identifier: Apache-2.0
# Shared by the CMake projects csrc/cpu and csrc/cuda. They are separate projects, so that a failure of one does not
# affect the other.
#
# Both write ${CMAKE_BINARY_DIR}/build_info.json for setup.py: how the library is compiled, or {"reason": …} why it is
# not. "needed": false means that the library does not apply to this machine, which is never an error.

get_filename_component(MVIT_ROOT "${CMAKE_CURRENT_LIST_DIR}/../.." ABSOLUTE)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON) # for editors: see .clangd

# -- build_info.json -----------------------------------------------------------------------------------------------

set(MVIT_INFO "{}")

function(mvit_json_string result value)
  string(REPLACE "\\" "\\\\" value "${value}")
  string(REPLACE "\"" "\\\"" value "${value}")
  set(${result} "\"${value}\"" PARENT_SCOPE)
endfunction()

function(mvit_info_text key value)
  mvit_json_string(value "${value}")
  string(JSON info SET "${MVIT_INFO}" ${key} "${value}")
  set(MVIT_INFO "${info}" PARENT_SCOPE)
endfunction()

function(mvit_info_list key)
  set(array "[]")
  set(place 0)
  foreach(value IN LISTS ARGN)
    mvit_json_string(value "${value}")
    string(JSON array SET "${array}" ${place} "${value}")
    math(EXPR place "${place} + 1")
  endforeach()
  string(JSON info SET "${MVIT_INFO}" ${key} "${array}")
  set(MVIT_INFO "${info}" PARENT_SCOPE)
endfunction()

function(mvit_write_info)
  file(WRITE "${CMAKE_BINARY_DIR}/build_info.json" "${MVIT_INFO}\n")
endfunction()

function(mvit_refuse needed reason)
  mvit_json_string(text "${reason}")
  file(WRITE "${CMAKE_BINARY_DIR}/build_info.json" "{\"needed\": ${needed}, \"reason\": ${text}}\n")
  message(FATAL_ERROR "${reason}")
endfunction()

# mvit_cannot_build("the reason, and what to do"): the library applies to this machine, and this prevents the build
macro(mvit_cannot_build reason)
  mvit_refuse(true "${reason}")
endmacro()

macro(mvit_nothing_to_build reason)
  mvit_refuse(false "${reason}")
endmacro()

# -- Compilers and libraries ---------------------------------------------------------------------------------------

# Defines the target torch_stable_abi (torch's headers), TORCH_FOLDER and TORCH_VERSION. Not find_package(Torch): it
# takes seconds and adds torch's own compiler flags, CUDA and C++ ABI, none of which apply to a library on the stable
# ABI. Python's find_spec locates torch without the second that importing it takes.
macro(mvit_find_torch)
  find_package(Python 3.10 COMPONENTS Interpreter REQUIRED)
  execute_process(
    COMMAND
      "${Python_EXECUTABLE}" -c [==[
import importlib.metadata, importlib.util
spec = importlib.util.find_spec("torch")
if spec and spec.submodule_search_locations:
    print(spec.submodule_search_locations[0], importlib.metadata.version("torch"), sep=";", end="")
]==]
    OUTPUT_VARIABLE TORCH_FOUND)
  if(NOT TORCH_FOUND)
    mvit_cannot_build("torch is not importable in the build's environment: install torch first, then \
`pip install --no-build-isolation .` (pip's isolated environment has no torch)")
  endif()
  list(GET TORCH_FOUND 0 TORCH_FOLDER)
  list(GET TORCH_FOUND 1 TORCH_VERSION)
  if(TORCH_VERSION VERSION_LESS 2.10)
    mvit_cannot_build("torch ${TORCH_VERSION} lacks the stable ABI that is needed: install torch 2.10 or newer")
  endif()
  add_library(torch_stable_abi INTERFACE)
  # SYSTEM: no warnings from torch's headers
  target_include_directories(torch_stable_abi SYSTEM INTERFACE "${TORCH_FOLDER}/include"
                                                               "${TORCH_FOLDER}/include/torch/csrc/api/include")
  # Target the ABI of torch 2.10 whatever the version of the headers: one library serves every torch from 2.10 on.
  target_compile_definitions(torch_stable_abi INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
endmacro()

# Makes enable_language(CXX) use $CXX, which may contain arguments ("g++ -m64") and a launcher ("ccache g++"), else the
# first of the usual names on the PATH. CMake itself would also search folders that are not on the PATH.
macro(mvit_find_cxx_compiler)
  # Ignore flags from the environment. conda's CXXFLAGS and LDFLAGS, for example, set a processor and an rpath.
  foreach(variable IN ITEMS CXXFLAGS CPPFLAGS LDFLAGS CUDAFLAGS)
    unset(ENV{${variable}})
  endforeach()
  if(NOT CMAKE_CXX_COMPILER)
    separate_arguments(mvit_words UNIX_COMMAND "$ENV{CXX}")
    list(LENGTH mvit_words mvit_count)
    set(mvit_names c++ g++ clang++)
    if(mvit_words)
      list(GET mvit_words 0 mvit_names)
    endif()
    find_program(mvit_compiler NAMES ${mvit_names} PATHS ENV PATH NO_DEFAULT_PATH NO_CACHE)
    if(NOT mvit_compiler AND mvit_words)
      mvit_cannot_build("no C++ compiler: CXX names '${mvit_names}', which is not on the PATH")
    elseif(NOT mvit_compiler)
      mvit_cannot_build("no C++ compiler: none of c++, g++, clang++ is on the PATH (or set CXX)")
    elseif(NOT mvit_words)
      set(ENV{CXX} "${mvit_compiler}")
    elseif(mvit_words MATCHES "^[^;]+;[^-]")
      set(CMAKE_CXX_COMPILER_LAUNCHER "${mvit_compiler}" CACHE FILEPATH "What the compiler is started by")
      list(POP_FRONT mvit_words)
      list(JOIN mvit_words " " mvit_words)
      set(ENV{CXX} "${mvit_words}")
    endif()
  endif()
endmacro()

# After enable_language(CXX): compile and link options of all C++ here. MVIT_CXX_FLAGS is for build_info.json.
macro(mvit_set_up_cxx)
  if(NOT CMAKE_BUILD_TYPE)
    set(CMAKE_BUILD_TYPE Release)
  endif()
  set(CMAKE_CXX_FLAGS_RELEASE "-O3")
  # -O0 compiles in a third of the time of -O1, and no access is optimised away. An error ends the process.
  set(CMAKE_CXX_FLAGS_SANITIZE
      "-O0 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all")
  set(CMAKE_POSITION_INDEPENDENT_CODE ON)
  set(CMAKE_CXX_VISIBILITY_PRESET hidden)
  # No rpath: the process that loads the library has already loaded torch's libraries, which have the required names.
  set(CMAKE_SKIP_RPATH ON)

  string(TOUPPER "CMAKE_CXX_FLAGS_${CMAKE_BUILD_TYPE}" mvit_flags)
  separate_arguments(MVIT_CXX_FLAGS UNIX_COMMAND "${${mvit_flags}} -std=c++20 -fPIC -fvisibility=hidden -Wall -Wextra")
  add_library(mvit_cxx INTERFACE)
  # Error messages contain file names (__FILE__): relative to the repository, wherever it is.
  target_compile_options(mvit_cxx INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -fmacro-prefix-map=${MVIT_ROOT}/=>)

  separate_arguments(mvit_arguments UNIX_COMMAND "${CMAKE_CXX_COMPILER_ARG1}")
  execute_process(COMMAND "${CMAKE_CXX_COMPILER}" ${mvit_arguments} --version OUTPUT_VARIABLE MVIT_CXX_NAME)
  string(REGEX REPLACE "\n.*" "" MVIT_CXX_NAME "${MVIT_CXX_NAME}")
endmacro()

# mvit_add_objects(TARGET SOURCE…): C++ sources that are compiled alike. The standard is the target's and no variable:
# CUDA sources would take that over, and CMake before 3.26 knows no C++20 of nvcc's.
function(mvit_add_objects target)
  add_library(${target} OBJECT ${ARGN})
  target_link_libraries(${target} PRIVATE mvit_cxx)
  set_target_properties(${target} PROPERTIES CXX_STANDARD 20 CXX_STANDARD_REQUIRED ON CXX_EXTENSIONS OFF)
endfunction()
