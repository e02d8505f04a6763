// What the headers of a GCC and a glibc of today ask of libstdc++ and libc, but those of
// manylinux_2_28 do not have (GLIBCXX_3.4.25, GLIBC_2.28): defined here out of what they have, for
// the linker to find first. So one compiler serves every Linux since 2018, with no toolchain of its
// own. What is still too new shows in tests/test_wheel.py.
#include <cstdlib>  // defines __GLIBC__ and __GLIBCXX__, where they are what is compiled for

#if defined(__GLIBC__) && defined(__GLIBCXX__)
#include <dlfcn.h>

#include <new>
#include <sstream>

#define HIDDEN __attribute__((visibility("hidden")))
#define AS(name) __asm__(name) HIDDEN

// GLIBCXX_3.4.29, of std::allocator.
void too_long() AS("_ZSt28__throw_bad_array_new_lengthv");
void too_long() { throw std::bad_array_new_length(); }

// GLIBCXX_3.4.26: the constructors without arguments, by those that are told the mode.
void empty(std::ostringstream*)
    AS("_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev");
void empty(std::ostringstream* self) { new (self) std::ostringstream(std::ios::out); }
void empty(std::stringstream*)
    AS("_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev");
void empty(std::stringstream* self) { new (self) std::stringstream(std::ios::out | std::ios::in); }

// GLIBC_2.32, of std::shared_ptr, which counts atomically where this is false.
char single_threaded AS("__libc_single_threaded") = 0;

// GLIBC_2.34 has moved these to libc from libdl, which libtorch_cpu brings, and named them anew.
// Who calls is told from the address, which is within this library still.
#if defined(__x86_64__)
#define OLD(name) __asm__(".symver old_" #name ", " #name "@GLIBC_2.2.5")
#elif defined(__aarch64__)
#define OLD(name) __asm__(".symver old_" #name ", " #name "@GLIBC_2.17")
#endif
#ifdef OLD
extern "C" {
void* old_dlopen(const char*, int);
void* old_dlsym(void*, const char*);
OLD(dlopen);
OLD(dlsym);
HIDDEN void* dlopen(const char* file, int mode) noexcept { return old_dlopen(file, mode); }
HIDDEN void* dlsym(void* handle, const char* name) noexcept { return old_dlsym(handle, name); }
}
#endif
#endif
