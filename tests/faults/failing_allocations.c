// A library to preload: between resume and pause it counts allocations, and makes one of them fail.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);

enum { kMost = 16 };
static struct {
  uintptr_t begin, end;
} spared[kMost];
static int spared_count;

static atomic_bool armed;
static atomic_long seen, spared_calls, target;
static _Atomic(void*) failed_at;

// Whether this call is to fail. Calls from spared libraries, which would end the process, are only counted.
static int fails(void* caller) {
  if (!atomic_load(&armed)) return 0;
  const uintptr_t at = (uintptr_t)caller;
  for (int k = 0; k < spared_count; ++k)
    if (at >= spared[k].begin && at < spared[k].end) {
      atomic_fetch_add(&spared_calls, 1);
      return 0;
    }
  if (atomic_fetch_add(&seen, 1) + 1 != atomic_load(&target)) return 0;
  atomic_store(&failed_at, caller);
  errno = ENOMEM;
  return 1;
}

#define FAILS() fails(__builtin_return_address(0))

// C++'s operator new, so that its caller is known and not only that the C++ library has called malloc.
extern void throw_bad_alloc(void) __asm__("_ZSt17__throw_bad_allocv");
void* operator_new(size_t size) __asm__("_Znwm");
void* operator_new(size_t size) {
  void* const found = FAILS() ? NULL : __libc_malloc(size ? size : 1);
  if (!found) throw_bad_alloc();
  return found;
}
void* operator_new_array(size_t size) __asm__("_Znam");
void* operator_new_array(size_t size) {
  void* const found = FAILS() ? NULL : __libc_malloc(size ? size : 1);
  if (!found) throw_bad_alloc();
  return found;
}
void* operator_new_aligned(size_t size, size_t alignment) __asm__("_ZnwmSt11align_val_t");
void* operator_new_aligned(size_t size, size_t alignment) {
  void* const found = FAILS() ? NULL : __libc_memalign(alignment, size ? size : 1);
  if (!found) throw_bad_alloc();
  return found;
}

void* malloc(size_t size) { return FAILS() ? NULL : __libc_malloc(size); }
void* calloc(size_t count, size_t size) { return FAILS() ? NULL : __libc_calloc(count, size); }
void* realloc(void* memory, size_t size) { return FAILS() ? NULL : __libc_realloc(memory, size); }
void* memalign(size_t alignment, size_t size) { return FAILS() ? NULL : __libc_memalign(alignment, size); }
void* aligned_alloc(size_t alignment, size_t size) { return FAILS() ? NULL : __libc_memalign(alignment, size); }
int posix_memalign(void** memory, size_t alignment, size_t size) {
  void* const found = FAILS() ? NULL : __libc_memalign(alignment, size);
  if (!found) return ENOMEM;
  *memory = found;
  return 0;
}
void* mmap(void* address, size_t size, int protection, int flags, int file, off_t offset) {
  if (FAILS()) return MAP_FAILED;
  return (void*)syscall(SYS_mmap, address, size, protection, flags, file, offset);
}

static int spare_library(struct dl_phdr_info* info, size_t size, void* name) {
  (void)size;
  if (!strstr(info->dlpi_name, name)) return 0;
  for (int k = 0; k < info->dlpi_phnum && spared_count < kMost; ++k) {
    const ElfW(Phdr)* const part = &info->dlpi_phdr[k];
    if (part->p_type != PT_LOAD || !(part->p_flags & PF_X)) continue;
    spared[spared_count].begin = info->dlpi_addr + part->p_vaddr;
    spared[spared_count++].end = info->dlpi_addr + part->p_vaddr + part->p_memsz;
  }
  return 0;
}

// Lets the libraries with this in their name have all they want.
void failing_spare(const char* name) { dl_iterate_phdr(spare_library, (void*)name); }

// The k-th allocation while resumed fails; none if k is 0.
void failing_arm(long k) {
  atomic_store(&seen, 0);
  atomic_store(&spared_calls, 0);
  atomic_store(&target, k);
  atomic_store(&failed_at, NULL);
}
void failing_resume(void) { atomic_store(&armed, 1); }
void failing_pause(void) { atomic_store(&armed, 0); }
long failing_spared(void) { return atomic_load(&spared_calls); }
// The file of the code whose allocation failed; null if none has.
const char* failing_culprit(void) {
  Dl_info info;
  void* const at = atomic_load(&failed_at);
  return at && dladdr(at, &info) ? info.dli_fname : NULL;
}
