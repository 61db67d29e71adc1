/* Input and output on files that may take long: begun by one thread, finished when the disk is done.
 *
 * It is io_uring, by system calls of our own. A thread makes its ring, is alone in using it, and
 * waits for its descriptor beside others. Where the kernel has none or forbids it, the same jobs are
 * done at once (vt_io_do), and hold the thread as long as they take.
 */
#ifndef VT_VIRTIO_IO_H
#define VT_VIRTIO_IO_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

struct vt_io;

enum vt_io_kind { VT_IO_READ, VT_IO_WRITE, VT_IO_SYNC, VT_IO_ALLOCATE };

/* One system call's worth: preadv2, pwritev2, fdatasync or fallocate. */
struct vt_io_job {
	enum vt_io_kind kind;
	int fd;
	int flags;                    /* RWF_*, or fallocate's mode */
	bool elsewhere;               /* the kernel's threads do it from the start */
	const struct iovec *segments; /* of reads and writes; they stay until the job is done */
	uint32_t segment_count;
	uint64_t offset, length;      /* length: of VT_IO_ALLOCATE */
};

/* Make a ring for the calling thread.
 * Return: 0; -ENOSYS, -EPERM or another errno of io_uring_setup(2): there is none to be had;
 * -ENOTSUP: the kernel's is too old to be relied on. */
int vt_io_create(struct vt_io **io);

/* End a ring of which nothing is in flight. `io` may be NULL. */
void vt_io_destroy(struct vt_io *io);

/* Readable when something is done. */
int vt_io_descriptor(const struct vt_io *io);

/* Begin a job. It starts no later than vt_io_submit. Return: false if there is no room: do it now. */
bool vt_io_begin(struct vt_io *io, const struct vt_io_job *job, void *tag);

/* Ask that a job which has not started yet is not done, or is interrupted where that can be: its
 * result is -ECANCELED or -EINTR then, and what it would have been otherwise. Starts no later than
 * vt_io_submit. Return: false if there is no room for the question. */
bool vt_io_cancel(struct vt_io *io, void *tag);

/* Start what was begun. Return: whether all of it was; what was not is tried by the next call. */
bool vt_io_submit(struct vt_io *io);

/* Whether something is done: a plain look, for polling. */
bool vt_io_ready(const struct vt_io *io);

/* Take one job that is done. Return: whether there was one; `result` is what the system call gave,
 * or a negative errno. */
bool vt_io_reap(struct vt_io *io, void **tag, int32_t *result);

/* How many jobs are begun and not reaped. */
uint32_t vt_io_in_flight(const struct vt_io *io);

/* Do a job at once. Return: what the system call gives, or a negative errno. */
int64_t vt_io_do(const struct vt_io_job *job);

#endif
