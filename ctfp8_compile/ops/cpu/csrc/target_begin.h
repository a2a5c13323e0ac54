// Compiles what follows for the instruction set in CTFP8_TARGET, whatever the compiler's flags say. A file includes the
// standard headers it needs before this one, so that nothing that other files share is compiled for that instruction set.
#define CTFP8_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define CTFP8_BEGIN(target_) CTFP8_PRAGMA(clang attribute push(__attribute__((target(target_))), apply_to = function))
#else
#define CTFP8_BEGIN(target_) CTFP8_PRAGMA(GCC target(target_))
#endif
CTFP8_BEGIN(CTFP8_TARGET)
