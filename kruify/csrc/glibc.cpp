// A shared_ptr of gcc 11 and later asks glibc 2.32 and later whether the process has one thread only. Answered here,
// with no, so that the library loads with older ones, too: that is all that a wheel for manylinux_2_28 needs.
#include <cstdlib>

#if defined(__GLIBC__)
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
#endif
