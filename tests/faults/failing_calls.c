/* Makes the n-th system call on the files of one folder fail, or kills the process right before it.
 *
 * Loaded with LD_PRELOAD. Nothing happens before `faults_arm`. The calls that are counted are those
 * that change a folder, and those that open or lock its files; each is also written to a trace.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long nth;
static int error_of_nth; /* an errno, or -1: SIGKILL */
static int trace = -1;
static long n_seen;

/* path: of the folder, without links. n: the call that fails, from 1; 0 for none. */
void faults_arm(const char *path, long n, int error, int trace_handle) {
    nth = n;
    error_of_nth = error;
    trace = trace_handle;
    n_seen = 0;
    snprintf(folder, sizeof folder, "%s", path);
}

static int fails(const char *call, const char *path) {
    size_t length = strlen(folder);
    if (!length || strncmp(path, folder, length) || (path[length] && path[length] != '/')) return 0;
    char line[PATH_MAX + 32];
    int n = snprintf(line, sizeof line, "%s %s\n", call, path);
    long i = __atomic_add_fetch(&n_seen, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_write, trace, line, (size_t)n);
    if (i != nth) return 0;
    if (error_of_nth < 0)
        for (;;) syscall(SYS_kill, getpid(), SIGKILL);
    errno = error_of_nth;
    return 1;
}

static int of_link(const char *link, char *path) {
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    path[n < 0 ? 0 : n] = 0;
    return n > 0;
}

static int fails_on_handle(const char *call, int handle) {
    char link[64], path[PATH_MAX];
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    int failed = folder[0] && of_link(link, path) && fails(call, path);
    if (!failed) errno = before;
    return failed;
}

static int fails_on_path(const char *call, int at, const char *name) {
    char link[64], base[PATH_MAX], path[2 * PATH_MAX];
    if (name[0] == '/') return fails(call, name);
    if (at == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", at);
    if (!folder[0] || !of_link(link, base)) return 0;
    snprintf(path, sizeof path, "%s/%s", base, name);
    return fails(call, path);
}

#define REAL(name)                        \
    static __typeof__(name) *real;        \
    if (!real) real = dlsym(RTLD_NEXT, #name)

#define ON_HANDLE(result, name, call, failure, parameters, ...)   \
    result name parameters {                                      \
        REAL(name);                                               \
        return fails_on_handle(call, fd) ? (failure) : real(__VA_ARGS__); \
    }

#define ON_PATH(name, call, at, path, parameters, ...)            \
    int name parameters {                                         \
        REAL(name);                                               \
        return fails_on_path(call, at, path) ? -1 : real(__VA_ARGS__); \
    }

#define OPENING(name, at, parameters, ...)                        \
    int name parameters {                                         \
        REAL(name);                                               \
        va_list rest;                                             \
        va_start(rest, flags);                                    \
        mode_t mode = va_arg(rest, mode_t);                       \
        va_end(rest);                                             \
        return fails_on_path("open", at, path) ? -1 : real(__VA_ARGS__, mode); \
    }

OPENING(open, AT_FDCWD, (const char *path, int flags, ...), path, flags)
OPENING(open64, AT_FDCWD, (const char *path, int flags, ...), path, flags)
OPENING(openat, at, (int at, const char *path, int flags, ...), at, path, flags)
OPENING(openat64, at, (int at, const char *path, int flags, ...), at, path, flags)

ON_HANDLE(ssize_t, write, "write", -1, (int fd, const void *data, size_t n), fd, data, n)
ON_HANDLE(ssize_t, pwrite, "pwrite", -1, (int fd, const void *data, size_t n, off_t to), fd, data, n, to)
ON_HANDLE(ssize_t, pwrite64, "pwrite", -1, (int fd, const void *data, size_t n, off64_t to), fd, data, n, to)
ON_HANDLE(ssize_t, writev, "writev", -1, (int fd, const struct iovec *data, int n), fd, data, n)
ON_HANDLE(ssize_t, pwritev, "pwritev", -1, (int fd, const struct iovec *data, int n, off_t to), fd, data, n, to)
ON_HANDLE(ssize_t, pwritev64, "pwritev", -1, (int fd, const struct iovec *data, int n, off64_t to), fd, data, n, to)
ON_HANDLE(int, fsync, "fsync", -1, (int fd), fd)
ON_HANDLE(int, fdatasync, "fdatasync", -1, (int fd), fd)
ON_HANDLE(int, ftruncate, "ftruncate", -1, (int fd, off_t n), fd, n)
ON_HANDLE(int, ftruncate64, "ftruncate", -1, (int fd, off64_t n), fd, n)
ON_HANDLE(int, posix_fallocate, "posix_fallocate", errno, (int fd, off_t from, off_t n), fd, from, n)
ON_HANDLE(int, posix_fallocate64, "posix_fallocate", errno, (int fd, off64_t from, off64_t n), fd, from, n)
ON_HANDLE(int, fallocate, "fallocate", -1, (int fd, int mode, off_t from, off_t n), fd, mode, from, n)
ON_HANDLE(int, fallocate64, "fallocate", -1, (int fd, int mode, off64_t from, off64_t n), fd, mode, from, n)
ON_HANDLE(int, flock, "flock", -1, (int fd, int how), fd, how)

ON_PATH(rename, "rename", AT_FDCWD, to, (const char *from, const char *to), from, to)
ON_PATH(renameat, "rename", to_at, to, (int at, const char *from, int to_at, const char *to), at, from, to_at, to)
ON_PATH(link, "link", AT_FDCWD, to, (const char *from, const char *to), from, to)
ON_PATH(unlink, "unlink", AT_FDCWD, path, (const char *path), path)
ON_PATH(unlinkat, "unlink", at, path, (int at, const char *path, int flags), at, path, flags)
ON_PATH(rmdir, "rmdir", AT_FDCWD, path, (const char *path), path)
ON_PATH(mkdir, "mkdir", AT_FDCWD, path, (const char *path, mode_t mode), path, mode)
ON_PATH(mkdirat, "mkdir", at, path, (int at, const char *path, mode_t mode), at, path, mode)
ON_PATH(truncate, "truncate", AT_FDCWD, path, (const char *path, off_t n), path, n)
ON_PATH(truncate64, "truncate", AT_FDCWD, path, (const char *path, off64_t n), path, n)
