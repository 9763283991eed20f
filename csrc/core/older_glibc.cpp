// What a static libstdc++ of today asks of glibc and glibc 2.28 does not have, for libraries that run there too
// (PGOLF_PORTABLE, cmake/older_glibc.py). Each library has its own; none is exported.
#include <fcntl.h>
#include <stdint.h>
#include <sys/random.h>
#include <sys/single_threaded.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

extern "C" {

char __libc_single_threaded = 0;  // not known: std::shared_ptr counts atomically

// Before 2.33 these were inline functions of <sys/stat.h>. On x86-64 the kernel's struct is the C library's.
int stat(const char* __restrict path, struct stat* __restrict found) noexcept {
  return static_cast<int>(syscall(SYS_newfstatat, AT_FDCWD, path, found, 0));
}

int lstat(const char* __restrict path, struct stat* __restrict found) noexcept {
  return static_cast<int>(syscall(SYS_newfstatat, AT_FDCWD, path, found, AT_SYMLINK_NOFOLLOW));
}

int fstat64(int file, struct stat64* found) noexcept { return static_cast<int>(syscall(SYS_fstat, file, found)); }

}  // extern "C"
