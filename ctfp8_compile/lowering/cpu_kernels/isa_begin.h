// Compiles what follows, to the end of the file, for the instruction set in CTFP8_TARGET, whatever the compiler's own
// flags say. The file must have included its standard headers before, so that nothing shared is compiled for it.
#define CTFP8_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define CTFP8_ATTRIBUTE(target_) CTFP8_PRAGMA(clang attribute push(__attribute__((target(target_))), apply_to = function))
#else
#define CTFP8_ATTRIBUTE(target_) CTFP8_PRAGMA(GCC target(target_))
#endif
CTFP8_ATTRIBUTE(CTFP8_TARGET)
