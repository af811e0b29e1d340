// Watches which emulated thread reads and writes what, and tells of accesses that no barrier keeps apart. phases.cpp is
// compiled with -fsanitize=thread, which calls a function at every access to memory; races.cpp has those functions in
// place of the sanitizer's own, which know the threads of the machine alone. Without KRUIFY_RACES nothing is watched.
#pragma once

#include <cstddef>
#include <cstdint>

namespace races {

// Where in the program a phase stands, by the barriers before it.
struct Place {
  int rank, thread;
  int interval;         // barriers of its block before it
  int arrived, waited;  // the same of its cluster
};

#if defined(KRUIFY_RACES)
void launch();                                  // a kernel begins
void unit(int64_t number);                      // a block, a cluster or an item of it: units never wait for each other
void own(const void* memory, size_t bytes);     // a unit's own memory, which is another's after it
void ignore(const void* memory, size_t bytes);  // what only the emulation has
void enter(const Place& place);                 // what this CPU thread does from here on ..
void leave();                                   // .. to here is done by the emulated thread
void gone(
    int rank, const void* memory, size_t bytes, const Place& end);  // a block of a cluster ends, and its memory with it
void meet();            // all threads of the unit have met: nothing before can clash with what follows
int64_t found();        // clashes so far; forgets them
const char* example();  // of the last one
#else
inline void launch() {}
inline void unit(int64_t) {}
inline void own(const void*, size_t) {}
inline void ignore(const void*, size_t) {}
inline void enter(const Place&) {}
inline void leave() {}
inline void gone(int, const void*, size_t, const Place&) {}
inline void meet() {}
inline int64_t found() { return 0; }
inline const char* example() { return ""; }
#endif

}  // namespace races
