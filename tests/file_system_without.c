/* Calls that answer as a file system does that lacks them: `cc -shared -fPIC`, then LD_PRELOAD. Locks as on Lustre without -o flock, hard
   links as on exFAT, directories that can't be synced as on some FUSE file systems. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

static int refuse(int error) {
  errno = error;
  return -1;
}

int flock(int descriptor, int operation) { return refuse(ENOSYS); }
int link(const char *from, const char *to) { return refuse(EPERM); }
int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags) { return refuse(EPERM); }

int fsync(int descriptor) {
  struct stat found;
  if (fstat(descriptor, &found) == 0 && S_ISDIR(found.st_mode)) return refuse(EINVAL);
  return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(descriptor);
}

static int control(const char *name, int descriptor, int command, void *argument) {
  if (command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || command == F_OFD_SETLKW) return refuse(ENOSYS);
  return ((int (*)(int, int, ...))dlsym(RTLD_NEXT, name))(descriptor, command, argument);
}

int fcntl(int descriptor, int command, ...) {
  va_list rest;
  va_start(rest, command);
  void *argument = va_arg(rest, void *);
  va_end(rest);
  return control("fcntl", descriptor, command, argument);
}

int fcntl64(int descriptor, int command, ...) {
  va_list rest;
  va_start(rest, command);
  void *argument = va_arg(rest, void *);
  va_end(rest);
  return control("fcntl64", descriptor, command, argument);
}
