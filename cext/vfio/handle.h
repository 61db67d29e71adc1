/* Descriptors, and the failing of calls in test builds. */
#ifndef VT_HANDLE_H
#define VT_HANDLE_H

/* open(2) with O_RDWR | O_CLOEXEC: a descriptor or -errno. */
int vt_open(const char *path);
/* close(2): 0 or -errno. Never repeated: the descriptor is gone even after EINTR. */
int vt_close(int fd);

/* Test builds (VT_FAULT_INJECTION): let the `nth` call from now (1 is the next) fail with
 * `error`; 0 switches injection off. Returns the number of calls seen since the last setting, or
 * -ENOSYS in a build without injection. */
long vt_fault_set(long nth, int error);

#endif
