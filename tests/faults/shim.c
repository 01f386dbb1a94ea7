// A library to preload: it makes one of a process's calls that change a folder fail, or kills the
// process there.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static const char* folder;  // calls on other paths do not count; null counts nothing
static long left;           // calls until the fault
static long seen;
static int fault;       // an error number, or 0 to kill
static int is_lasting;  // whether every later call that needs space fails too
static char* where;     // gets what the fault hit
enum { WHERE_BYTES = 4096 };

/// Starts counting the calls that change `path`; the one of number `step` fails. A negative step is
/// never reached.
void faults_arm(const char* path, long step, int error, int lasting, char* text) {
  folder = path;
  left = step;
  seen = 0;
  fault = error;
  is_lasting = lasting;
  where = text;
}

/// The calls since then.
long faults_seen(void) { return seen; }

static int is_below(int parent, const char* path) {
  char full[2 * PATH_MAX];
  if (path[0] == '/') return strncmp(path, folder, strlen(folder)) == 0;
  if (parent == AT_FDCWD) return 0;
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", parent);
  const ssize_t size = readlink(link, full, sizeof full - 1);
  if (size < 0) return 0;
  full[size] = 0;
  return strncmp(full, folder, strlen(folder)) == 0;
}

/// Whether this call is to fail; `errno` says why then. `path` is "" for a call on a descriptor.
static int is_hit(const char* call, int parent, const char* path, int needs_space) {
  if (folder == NULL || path == NULL || !is_below(parent, path)) return 0;
  ++seen;
  const int is_step = left-- == 0;
  if (!is_step && !(is_lasting && left < 0 && seen > 1 && where[0] != 0 && needs_space)) return 0;
  if (is_step) {
    char link[64], target[PATH_MAX] = "";
    if (path[0] == 0) {
      snprintf(link, sizeof link, "/proc/self/fd/%d", parent);
      const ssize_t size = readlink(link, target, sizeof target - 1);
      target[size < 0 ? 0 : size] = 0;
    }
    snprintf(where, WHERE_BYTES, "%s %s", call, path[0] == 0 ? target : path);
  }
  if (fault == 0) raise(SIGKILL);
  errno = fault;
  return 1;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define ON_DESCRIPTOR(result, name, needs_space, fd, types, values) \
  result name types {                                               \
    if (is_hit(#name, fd, "", needs_space)) return -1;              \
    return NEXT(name) values;                                       \
  }
#define ON_PATH(name, needs_space, parent, path, types, values) \
  int name types {                                              \
    if (is_hit(#name, parent, path, needs_space)) return -1;    \
    return NEXT(name) values;                                   \
  }

ON_DESCRIPTOR(ssize_t, write, 1, fd, (int fd, const void* data, size_t size), (fd, data, size))
ON_DESCRIPTOR(ssize_t, writev, 1, fd, (int fd, const struct iovec* parts, int count),
              (fd, parts, count))
ON_DESCRIPTOR(ssize_t, pwrite64, 1, fd, (int fd, const void* data, size_t size, off64_t at),
              (fd, data, size, at))
ON_DESCRIPTOR(int, fsync, 1, fd, (int fd), (fd))
ON_DESCRIPTOR(int, ftruncate64, 1, fd, (int fd, off64_t size), (fd, size))
ON_PATH(rename, 1, AT_FDCWD, to, (const char* from, const char* to), (from, to))
ON_PATH(renameat, 1, second, to, (int first, const char* from, int second, const char* to),
        (first, from, second, to))
ON_PATH(renameat2, 1, second, to,
        (int first, const char* from, int second, const char* to, unsigned flags),
        (first, from, second, to, flags))
ON_PATH(mkdir, 1, AT_FDCWD, path, (const char* path, mode_t mode), (path, mode))
ON_PATH(mkdirat, 1, parent, path, (int parent, const char* path, mode_t mode), (parent, path, mode))
ON_PATH(unlink, 0, AT_FDCWD, path, (const char* path), (path))
ON_PATH(unlinkat, 0, parent, path, (int parent, const char* path, int flags), (parent, path, flags))
ON_PATH(rmdir, 0, AT_FDCWD, path, (const char* path), (path))

#define ON_OPEN(name)                                                                      \
  int name(const char* path, int flags, ...) {                                             \
    va_list more;                                                                          \
    va_start(more, flags);                                                                 \
    const mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;          \
    va_end(more);                                                                          \
    if ((flags & O_ACCMODE) != O_RDONLY && is_hit(#name, AT_FDCWD, path, flags & O_CREAT)) \
      return -1;                                                                           \
    return NEXT(name)(path, flags, mode);                                                  \
  }
ON_OPEN(open)
ON_OPEN(open64)
