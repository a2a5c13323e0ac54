// Closes target_begin.h. GCC's pragma ends with the file; clang wants its stack empty.
#if defined(__clang__)
#pragma clang attribute pop
#endif
