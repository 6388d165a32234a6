/* Preloaded into the processes of tests/chaos: a full disk, a slow disk and a clock that jumps, for one job at a time.
   DISTURB names a file of struct control, which the test writes while the job runs. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct control {
    volatile int64_t clock_ns; /* added to the wall clock */
    volatile int32_t full;     /* 1: no byte and no new file below the folder */
    volatile int32_t delay_us; /* of each read, write and fsync below the folder */
    char folder[240];
};

static struct control *control;

static struct control *now(void) {
    if (!control) {
        const char *name = getenv("DISTURB");
        int saved = errno, fd = name ? (int)open(name, O_RDWR | O_CLOEXEC) : -1;
        if (fd >= 0) {
            void *map = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
            close(fd);
            if (map != MAP_FAILED) control = map;
        }
        errno = saved;
    }
    return control;
}

static int below(struct control *c, const char *path) { return !strncmp(path, c->folder, strlen(c->folder)); }

static int is_ours(struct control *c, int fd) {
    char link[64], path[1024];
    int saved = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = saved;
    if (length < 0) return 0;
    path[length] = 0;
    return below(c, path);
}

/* Waits as long as the disk takes; whether it is full. */
static int disk(int fd) {
    struct control *c = now();
    if (!c || !(c->full || c->delay_us) || !is_ours(c, fd)) return 0;
    if (c->delay_us) usleep(c->delay_us);
    return c->full;
}

static int refuses(int dir, const char *path, int flags) {
    struct control *c = now();
    char absolute[2048];
    struct stat known;
    if (!c || !c->full || !(flags & O_CREAT) || !fstatat(dir, path, &known, 0)) return 0;
    if (path[0] != '/') {
        if (dir != AT_FDCWD) return is_ours(c, dir);
        if (!getcwd(absolute, 1000)) return 0;
        strncat(absolute, "/", 2);
        strncat(absolute, path, 1000);
        path = absolute;
    }
    return below(c, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FULL do { errno = ENOSPC; return -1; } while (0)

ssize_t write(int fd, const void *data, size_t size) {
    static __typeof__(&write) real;
    if (!real) real = REAL(write);
    if (size && disk(fd)) FULL;
    return real(fd, data, size);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    static __typeof__(&pwrite) real;
    if (!real) real = REAL(pwrite);
    if (size && disk(fd)) FULL;
    return real(fd, data, size, at);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    static __typeof__(&pwrite64) real;
    if (!real) real = REAL(pwrite64);
    if (size && disk(fd)) FULL;
    return real(fd, data, size, at);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    static __typeof__(&writev) real;
    if (!real) real = REAL(writev);
    if (count && disk(fd)) FULL;
    return real(fd, parts, count);
}

int ftruncate64(int fd, off64_t size) {
    static __typeof__(&ftruncate64) real;
    if (!real) real = REAL(ftruncate64);
    if (size && disk(fd)) FULL;
    return real(fd, size);
}

int fsync(int fd) {
    static __typeof__(&fsync) real;
    if (!real) real = REAL(fsync);
    disk(fd);
    return real(fd);
}

ssize_t read(int fd, void *data, size_t size) {
    static __typeof__(&read) real;
    if (!real) real = REAL(read);
    disk(fd);
    return real(fd, data, size);
}

#define MODE(flags) mode_t mode = 0; if (((flags) & O_CREAT) || ((flags) & O_TMPFILE) == O_TMPFILE) { \
    va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }

int open(const char *path, int flags, ...) {
    static __typeof__(&open) real;
    MODE(flags)
    if (!real) real = REAL(open);
    if ((flags & O_CREAT) && refuses(AT_FDCWD, path, flags)) FULL;
    return real(path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    static __typeof__(&open64) real;
    MODE(flags)
    if (!real) real = REAL(open64);
    if ((flags & O_CREAT) && refuses(AT_FDCWD, path, flags)) FULL;
    return real(path, flags, mode);
}

int openat(int dir, const char *path, int flags, ...) {
    static __typeof__(&openat) real;
    MODE(flags)
    if (!real) real = REAL(openat);
    if ((flags & O_CREAT) && refuses(dir, path, flags)) FULL;
    return real(dir, path, flags, mode);
}

int openat64(int dir, const char *path, int flags, ...) {
    static __typeof__(&openat64) real;
    MODE(flags)
    if (!real) real = REAL(openat64);
    if ((flags & O_CREAT) && refuses(dir, path, flags)) FULL;
    return real(dir, path, flags, mode);
}

int mkdir(const char *path, mode_t mode) {
    static __typeof__(&mkdir) real;
    if (!real) real = REAL(mkdir);
    if (refuses(AT_FDCWD, path, O_CREAT)) FULL;
    return real(path, mode);
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    static __typeof__(&clock_gettime) real;
    if (!real) real = REAL(clock_gettime);
    int code = real(clock, time);
    if (!code && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        struct control *c = now();
        if (c && c->clock_ns) {
            int64_t all = (int64_t)time->tv_sec * 1000000000 + time->tv_nsec + c->clock_ns;
            time->tv_sec = all / 1000000000;
            time->tv_nsec = all % 1000000000;
        }
    }
    return code;
}

int gettimeofday(struct timeval *restrict tv, void *restrict zone) {
    struct timespec time;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &time)) return -1;
    tv->tv_sec = time.tv_sec;
    tv->tv_usec = time.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    struct timespec time;
    if (clock_gettime(CLOCK_REALTIME, &time)) return -1;
    if (out) *out = time.tv_sec;
    return time.tv_sec;
}
