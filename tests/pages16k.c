/* What user space sees of a kernel with pages of 16 KiB: LD_PRELOAD this. Misuse is told on stderr. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { PAGE = 16384, SMALL = 4096 };
#define UP(n) (((uintptr_t)(n) + PAGE - 1) / PAGE * PAGE)

static int refuse(const char *what, void *address) {
    fprintf(stderr, "pages16k: %s of %p\n", what, address);
    errno = EINVAL;
    return -1;
}

long sysconf(int name) {
    static long (*real)(int);
    if (!real) real = (long (*)(int))dlsym(RTLD_NEXT, "sysconf");
    return name == _SC_PAGESIZE ? PAGE : real(name);
}

int getpagesize(void) { return PAGE; }

int madvise(void *address, size_t length, int advice) {
    if ((uintptr_t)address % PAGE) return refuse("madvise", address);
    return syscall(SYS_madvise, address, UP(length), advice);
}

int munmap(void *address, size_t length) {
    if ((uintptr_t)address % PAGE) return refuse("munmap", address);
    return syscall(SYS_munmap, address, UP(length));
}

int mincore(void *address, size_t length, unsigned char *pages) {
    unsigned char small[PAGE / SMALL];
    if ((uintptr_t)address % PAGE) return refuse("mincore", address);
    for (size_t at = 0; at < length; at += PAGE, pages++) {
        if (syscall(SYS_mincore, (char *)address + at, (size_t)PAGE, small)) return -1;
        *pages = 0;
        for (int i = 0; i < PAGE / SMALL; i++) *pages |= small[i] & 1;
    }
    return 0;
}

void *mmap(void *address, size_t length, int prot, int flags, int fd, off_t offset) {
    if (flags & (MAP_FIXED | MAP_FIXED_NOREPLACE)) {
        if ((uintptr_t)address % PAGE) return (void *)(intptr_t)refuse("mmap", address);
        return (void *)syscall(SYS_mmap, address, flags & MAP_ANONYMOUS ? UP(length) : length, prot, flags, fd, offset);
    }
    /* room for an address that is a multiple of PAGE, of which the rest is given back */
    long at = syscall(SYS_mmap, NULL, UP(length) + PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0L);
    if (at == -1) return MAP_FAILED;
    uintptr_t start = UP(at), end = at + UP(length) + PAGE;
    if (start > (uintptr_t)at) syscall(SYS_munmap, at, start - at);
    if (end > start + UP(length)) syscall(SYS_munmap, start + UP(length), end - start - UP(length));
    size_t n = flags & MAP_ANONYMOUS ? UP(length) : length;
    return (void *)syscall(SYS_mmap, start, n, prot, flags | MAP_FIXED, fd, offset);
}

void *mmap64(void *address, size_t length, int prot, int flags, int fd, off_t offset) {
    return mmap(address, length, prot, flags, fd, offset);
}
