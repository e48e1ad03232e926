// An allocator to preload. After fail_after(n, bytes), n allocations of at least this many bytes succeed and
// the next one fails; with a negative n none fails. refused() returns whether one has failed.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>

static atomic_long left = -1;
static atomic_int has_refused;
static atomic_size_t least;

void fail_after(long n, size_t bytes) {
  least = bytes;
  has_refused = 0;
  left = n;
}

int refused(void) { return has_refused; }

static int refuses(size_t bytes) {
  if (left < 0 || bytes < least) return 0;
  if (atomic_fetch_sub(&left, 1) != 0) return 0;
  has_refused = 1;
  return 1;
}

void* malloc(size_t bytes) {
  static void* (*next)(size_t);
  if (next == NULL) next = (void* (*)(size_t))dlsym(RTLD_NEXT, "malloc");
  if (!refuses(bytes)) return next(bytes);
  errno = ENOMEM;
  return NULL;
}

int posix_memalign(void** out, size_t alignment, size_t bytes) {
  static int (*next)(void**, size_t, size_t);
  if (next == NULL) next = (int (*)(void**, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
  return refuses(bytes) ? ENOMEM : next(out, alignment, bytes);
}
