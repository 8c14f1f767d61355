# Included into every CMake project of llama-cpp-python's build (CMAKE_PROJECT_INCLUDE, see the Makefile).
# Its CMakeLists sets LLAMA_BUILD_COMMON in the cache by force; a variable of the same name goes before it (policy CMP0126).
set(LLAMA_BUILD_COMMON OFF)
