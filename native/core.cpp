// The plain C interface of the native core: what Python binds by ctypes. One file, compiled once for each processor level
// (src/meristem/native/build.py), without torch and without any library but that of the compiler.
//
// The interface has a version, ABI. Raise it here and in src/meristem/native/library.py when a function changes.
#define MERISTEM_EXPORT extern "C" __attribute__((visibility("default")))

constexpr int ABI = 1;

// Of the interface that this library was compiled with; the caller compares it before it calls anything else.
MERISTEM_EXPORT int meristem_abi() { return ABI; }
