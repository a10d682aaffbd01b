# SPDX-License-Identifier: Apache-2.0
# The CUDA toolkit of csrc/cuda. Each macro checks one thing before CMake's enable_language(CUDA), whose own error
# messages are pages long.

# Finds nvcc: in $CUDA_HOME or $CUDA_PATH, on the PATH, or in the default folder.
macro(mvit_find_nvcc)
  set(CUDA_FOLDER "$ENV{CUDA_HOME}")
  if(NOT CUDA_FOLDER)
    set(CUDA_FOLDER "$ENV{CUDA_PATH}")
  endif()
  if(CUDA_FOLDER)
    get_filename_component(NVCC "${CUDA_FOLDER}/bin/nvcc" ABSOLUTE BASE_DIR "${MVIT_ROOT}")
    if(NOT EXISTS "${NVCC}")
      mvit_cannot_build("no CUDA compiler: CUDA_HOME is '${CUDA_FOLDER}', and there is no ${CUDA_FOLDER}/bin/nvcc")
    endif()
  else()
    find_program(NVCC nvcc PATHS ENV PATH /usr/local/cuda/bin NO_DEFAULT_PATH NO_CACHE)
    if(NOT NVCC)
      # Either asks for this library: without it among MVIT_KERNELS_BUILD_LIBRARIES setup.py would not be here.
      foreach(variable IN ITEMS MVIT_KERNELS_BUILD_LIBRARIES TORCH_CUDA_ARCH_LIST)
        if(NOT "$ENV{${variable}}" STREQUAL "")
          mvit_cannot_build("no CUDA compiler: nvcc is neither on the PATH nor in /usr/local/cuda (or set CUDA_HOME), and \
${variable}=$ENV{${variable}} asks for the CUDA library")
        endif()
      endforeach()
      mvit_nothing_to_build("no CUDA compiler: nvcc is neither on the PATH nor in /usr/local/cuda (or set CUDA_HOME); \
the kernels in CUDA C++ want a CUDA toolkit, and nothing else does")
    endif()
  endif()
endmacro()

# Sets CUDA_CODES, the code and PTX that the library will contain, from $TORCH_CUDA_ARCH_LIST, which has the syntax of
# torch's own builds, and CUDA_CODE_FLAGS, nvcc's options for it. Not CMAKE_CUDA_ARCHITECTURES: CMake 3.25 rejects 90a, and
# each later release knows only the architectures of its time.
macro(mvit_set_cuda_architectures default)
  set(wanted "$ENV{TORCH_CUDA_ARCH_LIST}")
  if(NOT wanted)
    set(wanted "${default}")
  endif()
  string(REPLACE " " ";" entries "${wanted}")
  list(REMOVE_ITEM entries "")
  set(numbers)
  foreach(entry IN LISTS entries)
    if(NOT entry MATCHES "^([0-9]+)\\.([0-9]+)([af]?)([+]PTX)?$")
      mvit_cannot_build("TORCH_CUDA_ARCH_LIST has '${entry}'; numbers such as 8.0 or 9.0+PTX are wanted, between \
semicolons")
    endif()
    if(CMAKE_MATCH_1 GREATER_EQUAL 8)
      set(number "${CMAKE_MATCH_1}${CMAKE_MATCH_2}${CMAKE_MATCH_3}")
      list(APPEND numbers ${number})
      set(ptx_of_${number} "${CMAKE_MATCH_4}") # for duplicates the last one counts
    endif()
  endforeach()
  if(NOT numbers)
    mvit_nothing_to_build("TORCH_CUDA_ARCH_LIST is '${wanted}', and the kernels want compute capability 8.0 or newer")
  endif()
  list(REMOVE_DUPLICATES numbers)
  set(CMAKE_CUDA_ARCHITECTURES OFF)
  set(CUDA_CODES)
  set(CUDA_CODE_FLAGS)
  foreach(number IN LISTS numbers)
    set(codes sm_${number})
    if(ptx_of_${number})
      list(APPEND codes compute_${number})
    endif()
    list(APPEND CUDA_CODES ${codes})
    list(JOIN codes "," codes)
    list(APPEND CUDA_CODE_FLAGS "-gencode=arch=compute_${number},code=[${codes}]")
  endforeach()
endmacro()

# Sets TOOLKIT_INCLUDES and TOOLKIT_LIBRARIES, the folders that nvcc itself passes to the C++ compiler. Unlike
# find_package(CUDAToolkit) this works for every layout, including toolkits installed in parts.
macro(mvit_find_toolkit_paths)
  execute_process(
    COMMAND "${NVCC}" -dryrun -E -x cu /dev/null
    OUTPUT_QUIET
    ERROR_VARIABLE printed)
  foreach(kind IN ITEMS INCLUDES LIBRARIES)
    set(TOOLKIT_${kind})
    if("${printed}" MATCHES "#[$] ${kind}=([^\n]*)")
      separate_arguments(options UNIX_COMMAND "${CMAKE_MATCH_1}")
      foreach(option IN LISTS options)
        string(SUBSTRING "${option}" 2 -1 folder)
        get_filename_component(folder "${folder}" ABSOLUTE)
        list(APPEND TOOLKIT_${kind} "${folder}")
      endforeach()
    endif()
  endforeach()
  if(NOT TOOLKIT_INCLUDES OR NOT TOOLKIT_LIBRARIES)
    mvit_cannot_build("${NVCC} does not tell where its headers and libraries are: '${printed}'")
  endif()
endmacro()

# After enable_language(CUDA): compile options of the kernels. MVIT_CUDA_FLAGS is for build_info.json.
macro(mvit_set_up_cuda)
  set(CMAKE_CUDA_FLAGS_RELEASE "-O3")
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  # -std not by CMAKE_CUDA_STANDARD either: CMake before 3.26 knows no C++20 of nvcc's.
  set(MVIT_KERNEL_FLAGS -std=c++20 --expt-relaxed-constexpr ${CUDA_CODE_FLAGS})
  set(MVIT_CUDA_FLAGS -O3 -Xcompiler=-fPIC,-fvisibility=hidden ${MVIT_KERNEL_FLAGS})
endmacro()
