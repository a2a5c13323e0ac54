// Compiles what follows, to the end of the file, for the instruction set in CTFP8_TARGET, whatever the compiler's own
// flags say; the file must have included all its standard headers before, so that nothing shared is compiled for it.
#if defined(__clang__)
#define CTFP8_PRAGMA(x) _Pragma(#x)
#define CTFP8_ATTRIBUTE(target_) CTFP8_PRAGMA(clang attribute push(__attribute__((target(target_))), apply_to = function))
CTFP8_ATTRIBUTE(CTFP8_TARGET)
#else
#define CTFP8_PRAGMA(x) _Pragma(#x)
#define CTFP8_ATTRIBUTE(target_) CTFP8_PRAGMA(GCC target(target_))
CTFP8_ATTRIBUTE(CTFP8_TARGET)
#endif
