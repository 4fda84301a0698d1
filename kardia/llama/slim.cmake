# Read by llama-cpp-python's build (CMAKE_PROJECT_INCLUDE, see the Makefile). Its own file forces llama.cpp's `common`
# library on through the cache; a plain variable of the same name wins over that. We use the C library alone.
set(LLAMA_BUILD_COMMON OFF)
