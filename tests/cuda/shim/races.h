// Watches which GPU thread of the shim reads and writes what, and tells of accesses that no barrier keeps apart. The
// kernels are compiled with -fsanitize=thread, which calls a function at every access to memory; races.cpp has those
// functions in place of the sanitizer's own, which know the threads of the CPU alone.
#pragma once

#include <cstddef>
#include <cstdint>

namespace races {

// Where in the program a thread stands, by the barriers before it.
struct Place {
  int rank, thread;
  int interval;         // barriers of its block before it
  int arrived, waited;  // the same of its cluster
};

void watch(bool yes);                        // from the next launch on; slow
void launch();                               // a kernel begins
void unit(int64_t number);                   // a block or cluster of it: units never wait for each other
void own(const void* memory, size_t bytes);  // a unit's own memory, which is another's after it
// What this CPU thread does from here on is done by the thread at `place`; its stack holds what would be registers.
void enter(const Place* place, const char* stack, const char* end);
void leave();
void access(const void* address, size_t size, bool write);
// What the shim does in the kernel's stead is not watched: it shares inline functions with the kernels.
struct Pause {
  bool before;
  Pause();
  ~Pause();
};
// A block of a cluster ends, and its memory with it.
void gone(int rank, const void* memory, size_t bytes, const Place& end);
// All threads of the unit have met: what was done before cannot clash with what follows. In a cluster: what was done
// before the arrival number `arrivals`, counted from 1.
void meet(int arrivals = INT32_MAX);
int64_t found();        // clashes so far; forgets them
const char* example();  // of the last one

}  // namespace races
