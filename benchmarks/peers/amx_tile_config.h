/* Put in front of every C++ file of llama.cpp by CXXFLAGS="-include .../amx_tile_config.h" (requirements-benchmarks.txt).
 *
 * gcc 12's _tile_loadconfig says that it reads 8 bytes of the 64 that it reads. The optimizer then drops the stores of
 * the others, the tiles stay unconfigured, and llama.cpp ends with an illegal instruction on CPUs with AMX. Seen with
 * gcc 12.2, llama-cpp-python 0.3.36 (ggml-cpu/amx/mmq.cpp, ggml_tile_config_init).
 */
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#undef _tile_loadconfig
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg\t%X0" ::"m"(*(const char(*)[64])(config)))
#endif
