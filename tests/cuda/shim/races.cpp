// The functions that -fsanitize=thread calls, and what they find. Compiled without it.
#include "races.h"

#include <algorithm>
#include <cstdio>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace races {

namespace {

struct Access {
  uintptr_t word;  // address / 4
  uint8_t bytes;   // which of the four
  bool write;
  Place place;
};

struct Owner {
  int64_t unit;
  uint8_t read, written;  // bytes
};

constexpr int64_t kSeveral = -1;  // units have read it

bool wanted = false, watching = false;
int64_t current = 0, clashes = 0;
const Place* here = nullptr;
std::string last;
std::vector<Access> accesses;                 // since the threads of the unit met
std::unordered_map<uintptr_t, Owner> owners;  // by word, of the launch
std::vector<std::pair<uintptr_t, uintptr_t>> private_memory;
std::pair<uintptr_t, uintptr_t> registers;  // the stack of the thread that runs

bool after(const Place& a, const Place& b) {  // whether b waited for a
  return (a.rank == b.rank && b.interval > a.interval) || b.waited > a.arrived;
}

void clash(const Access& a, const Access& b) {
  ++clashes;
  char text[200];
  std::snprintf(text, sizeof text, "block %d thread %d (%s) and block %d thread %d (%s) between the same barriers",
      a.place.rank, a.place.thread, a.write ? "writes" : "reads", b.place.rank, b.place.thread,
      b.write ? "writes" : "reads");
  last = text;
}

void between_units(uintptr_t word, uint8_t bytes, bool write) {
  for (const auto& [begin, end] : private_memory)
    if (word * 4 + 3 >= begin && word * 4 < end) return;
  Owner& owner = owners.try_emplace(word, Owner{current, 0, 0}).first->second;
  if (owner.unit != current) {
    if ((owner.written & bytes) || (write && (owner.read & bytes))) {
      ++clashes,
          last = "two blocks or items of a launch: " + std::to_string(owner.unit) + " and " + std::to_string(current);
    }
    owner.unit = kSeveral;
  }
  (write ? owner.written : owner.read) |= bytes;
}

}  // namespace

void watch(bool yes) { wanted = yes; }
void launch() { owners.clear(), private_memory.clear(); }
void unit(int64_t number) { current = number, private_memory.clear(); }
void own(const void* memory, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  private_memory.emplace_back(begin, begin + bytes);
}
void enter(const Place* place, const char* stack, const char* end) {
  here = place, watching = wanted;
  registers = {reinterpret_cast<uintptr_t>(stack), reinterpret_cast<uintptr_t>(end)};
}
void leave() { watching = false; }

void gone(int rank, const void* memory, size_t bytes, const Place& end) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  for (const Access& a : accesses)
    if (a.place.rank != rank && a.word * 4 >= begin && a.word * 4 < begin + bytes && !after(a.place, end))
      clash(a, {a.word, a.bytes, true, end});
}

void meet(int arrivals) {
  std::sort(accesses.begin(), accesses.end(), [](const Access& a, const Access& b) { return a.word < b.word; });
  for (size_t first = 0, end; first < accesses.size(); first = end) {
    bool written = false;
    for (end = first; end < accesses.size() && accesses[end].word == accesses[first].word; ++end)
      written |= accesses[end].write;
    if (!written) continue;
    for (size_t i = first; i < end; ++i) {
      if (!accesses[i].write) continue;
      for (size_t j = first; j < end; ++j) {
        const Access &a = accesses[i], &b = accesses[j];
        if ((a.place.rank == b.place.rank && a.place.thread == b.place.thread) || !(a.bytes & b.bytes) ||
            after(a.place, b.place) || after(b.place, a.place))
          continue;
        clash(a, b);
        break;
      }
    }
  }
  std::erase_if(accesses, [&](const Access& a) { return a.place.arrived < arrivals; });
}

int64_t found() {
  const int64_t n = clashes;
  clashes = 0;
  return n;
}
const char* example() { return last.c_str(); }

Pause::Pause() : before(std::exchange(watching, false)) {}
Pause::~Pause() { watching = before; }

void access(const void* address, size_t size, bool write) {
  if (!wanted) return;
  const Pause pause;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address), end = begin + size;
  if (begin >= registers.first && begin < registers.second) return;
  for (uintptr_t word = begin / 4; word * 4 < end; ++word) {
    uint8_t bytes = 0;
    for (uintptr_t at = std::max(begin, word * 4); at < std::min(end, word * 4 + 4); ++at) bytes |= 1 << at % 4;
    // A thread that comes by a word again between the same barriers says nothing new.
    const bool known = !accesses.empty() && accesses.back().word == word && accesses.back().write == write &&
        accesses.back().bytes == bytes && accesses.back().place.thread == here->thread &&
        accesses.back().place.rank == here->rank && accesses.back().place.interval == here->interval &&
        accesses.back().place.arrived == here->arrived && accesses.back().place.waited == here->waited;
    if (!known) accesses.push_back({word, bytes, write, *here});
    between_units(word, bytes, write);
  }
}

}  // namespace races

// Inline functions of the standard library, which are called below, are watched ones.
#define WATCH(p, n, write) \
  if (races::watching) races::access(p, n, write)
#define ACCESS(n)                                                           \
  extern "C" void __tsan_read##n(void* p) { WATCH(p, n, false); }           \
  extern "C" void __tsan_write##n(void* p) { WATCH(p, n, true); }           \
  extern "C" void __tsan_unaligned_read##n(void* p) { WATCH(p, n, false); } \
  extern "C" void __tsan_unaligned_write##n(void* p) { WATCH(p, n, true); } \
  extern "C" void __tsan_read_write##n(void* p) { WATCH(p, n, true); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
extern "C" void __tsan_read_range(void* p, size_t n) { WATCH(p, n, false); }
extern "C" void __tsan_write_range(void* p, size_t n) { WATCH(p, n, true); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void*, void*) {}
extern "C" void __tsan_vptr_read(void*) {}
// What the host's code does with shared pointers and static variables.
extern "C" int __tsan_atomic32_fetch_add(volatile int* p, int value, int) {
  return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST);
}
extern "C" char __tsan_atomic8_load(const volatile char* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
