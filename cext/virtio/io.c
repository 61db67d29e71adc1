#define _GNU_SOURCE
#include "virtio/io.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ENTRIES 256u
#define COMPLETIONS 4096u
/* Completions are never dropped, and what a submission points to is read before it returns. */
#define RELIED_ON (IORING_FEAT_NODROP | IORING_FEAT_SUBMIT_STABLE | IORING_FEAT_SINGLE_MMAP)

/* Of newer headers (linux/io_uring.h of 5.19 and 6.0). */
#ifndef IORING_SETUP_COOP_TASKRUN
#define IORING_SETUP_COOP_TASKRUN (1u << 8)
#endif
#ifndef IORING_SETUP_SINGLE_ISSUER
#define IORING_SETUP_SINGLE_ISSUER (1u << 12)
#endif

struct vt_io {
	int fd;
	void *rings;
	size_t rings_size;
	struct io_uring_sqe *entries;
	size_t entries_size;
	uint32_t *sq_head, *sq_tail, *cq_head, *cq_tail;
	uint32_t sq_mask, cq_mask, sq_entries;
	struct io_uring_cqe *completions;
	uint32_t tail;      /* of what was begun */
	uint32_t submitted; /* how much of it the kernel has taken */
	uint32_t in_flight;
};

static int setup(struct io_uring_params *params)
{
	static const uint32_t wishes[] = {
		/* Completions are found by this thread alone, when it enters the kernel anyway. */
		IORING_SETUP_COOP_TASKRUN | IORING_SETUP_SINGLE_ISSUER,
		0,
	};
	int fd = -1;

	for (size_t i = 0; i < sizeof(wishes) / sizeof(wishes[0]); i++) {
		*params = (struct io_uring_params){ .flags = wishes[i] | IORING_SETUP_CQSIZE |
							     IORING_SETUP_CLAMP,
						    .cq_entries = COMPLETIONS };
		fd = (int)syscall(SYS_io_uring_setup, ENTRIES, params);
		if (fd >= 0 || errno != EINVAL)
			break;
	}
	return fd < 0 ? -errno : fd;
}

static int map_rings(struct vt_io *io, const struct io_uring_params *params)
{
	size_t sq = params->sq_off.array + params->sq_entries * sizeof(uint32_t);
	size_t cq = params->cq_off.cqes + params->cq_entries * sizeof(struct io_uring_cqe);
	uint8_t *at;
	uint32_t *array;

	io->rings_size = sq > cq ? sq : cq;
	io->rings = mmap(NULL, io->rings_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
			 io->fd, IORING_OFF_SQ_RING);
	if (io->rings == MAP_FAILED)
		return -errno;
	io->entries_size = params->sq_entries * sizeof(struct io_uring_sqe);
	io->entries = mmap(NULL, io->entries_size, PROT_READ | PROT_WRITE,
			   MAP_SHARED | MAP_POPULATE, io->fd, IORING_OFF_SQES);
	if (io->entries == MAP_FAILED)
		return -errno;
	at = io->rings;
	io->sq_head = (uint32_t *)(void *)(at + params->sq_off.head);
	io->sq_tail = (uint32_t *)(void *)(at + params->sq_off.tail);
	io->sq_mask = *(uint32_t *)(void *)(at + params->sq_off.ring_mask);
	io->sq_entries = params->sq_entries;
	io->cq_head = (uint32_t *)(void *)(at + params->cq_off.head);
	io->cq_tail = (uint32_t *)(void *)(at + params->cq_off.tail);
	io->cq_mask = *(uint32_t *)(void *)(at + params->cq_off.ring_mask);
	io->completions = (struct io_uring_cqe *)(void *)(at + params->cq_off.cqes);
	array = (uint32_t *)(void *)(at + params->sq_off.array);
	for (uint32_t i = 0; i < params->sq_entries; i++)
		array[i] = i;
	return 0;
}

int vt_io_create(struct vt_io **io)
{
	struct io_uring_params params;
	struct vt_io *made = calloc(1, sizeof(*made));
	int result;

	*io = NULL;
	if (!made)
		return -ENOMEM;
	made->rings = made->entries = MAP_FAILED;
	made->fd = setup(&params);
	result = made->fd < 0 ? made->fd : 0;
	if (!result && (params.features & RELIED_ON) != RELIED_ON)
		result = -ENOTSUP;
	if (!result)
		result = map_rings(made, &params);
	if (result) {
		vt_io_destroy(made);
		return result;
	}
	fcntl(made->fd, F_SETFD, FD_CLOEXEC);
	*io = made;
	return 0;
}

void vt_io_destroy(struct vt_io *io)
{
	if (!io)
		return;
	if (io->rings != MAP_FAILED)
		munmap(io->rings, io->rings_size);
	if (io->entries != MAP_FAILED)
		munmap(io->entries, io->entries_size);
	if (io->fd >= 0)
		close(io->fd);
	free(io);
}

int vt_io_descriptor(const struct vt_io *io)
{
	return io->fd;
}

static void fill(struct io_uring_sqe *entry, const struct vt_io_job *job, void *tag)
{
	memset(entry, 0, sizeof(*entry));
	entry->fd = job->fd;
	entry->flags = job->elsewhere ? IOSQE_ASYNC : 0;
	entry->off = job->offset;
	entry->user_data = (uintptr_t)tag;
	switch (job->kind) {
	case VT_IO_READ:
	case VT_IO_WRITE:
		entry->opcode = job->kind == VT_IO_READ ? IORING_OP_READV : IORING_OP_WRITEV;
		entry->addr = (uintptr_t)job->segments;
		entry->len = job->segment_count;
		entry->rw_flags = (uint32_t)job->flags;
		break;
	case VT_IO_SYNC:
		entry->opcode = IORING_OP_FSYNC;
		entry->off = 0;
		entry->fsync_flags = IORING_FSYNC_DATASYNC;
		break;
	case VT_IO_ALLOCATE:
		entry->opcode = IORING_OP_FALLOCATE;
		entry->len = (uint32_t)job->flags;
		entry->addr = job->length;
		break;
	}
}

/* The next free entry, or NULL. */
static struct io_uring_sqe *free_entry(struct vt_io *io)
{
	uint32_t head = __atomic_load_n(io->sq_head, __ATOMIC_ACQUIRE);

	if (io->tail - head == io->sq_entries &&
	    (!vt_io_submit(io) ||
	     io->tail - __atomic_load_n(io->sq_head, __ATOMIC_ACQUIRE) == io->sq_entries))
		return NULL;
	return &io->entries[io->tail & io->sq_mask];
}

static void give(struct vt_io *io)
{
	io->tail++;
	__atomic_store_n(io->sq_tail, io->tail, __ATOMIC_RELEASE);
	io->in_flight++;
}

bool vt_io_begin(struct vt_io *io, const struct vt_io_job *job, void *tag)
{
	struct io_uring_sqe *entry = free_entry(io);

	if (!entry)
		return false;
	fill(entry, job, tag);
	give(io);
	return true;
}

bool vt_io_cancel(struct vt_io *io, void *tag)
{
	struct io_uring_sqe *entry = free_entry(io);

	if (!entry)
		return false;
	*entry = (struct io_uring_sqe){ .opcode = IORING_OP_ASYNC_CANCEL,
					.fd = -1,
					.addr = (uintptr_t)tag };
	give(io);
	return true;
}

bool vt_io_submit(struct vt_io *io)
{
	while (io->submitted != io->tail) {
		long taken = syscall(SYS_io_uring_enter, io->fd, io->tail - io->submitted, 0, 0,
				     NULL, 0);

		if (taken < 0 && errno == EINTR)
			continue;
		if (taken <= 0)
			return false;
		io->submitted += (uint32_t)taken;
	}
	return true;
}

bool vt_io_ready(const struct vt_io *io)
{
	return __atomic_load_n(io->cq_tail, __ATOMIC_ACQUIRE) != *io->cq_head;
}

bool vt_io_reap(struct vt_io *io, void **tag, int32_t *result)
{
	do {
		uint32_t head = *io->cq_head;
		const struct io_uring_cqe *done;

		if (head == __atomic_load_n(io->cq_tail, __ATOMIC_ACQUIRE))
			return false;
		done = &io->completions[head & io->cq_mask];
		*tag = (void *)(uintptr_t)done->user_data;
		*result = done->res;
		__atomic_store_n(io->cq_head, head + 1, __ATOMIC_RELEASE);
		io->in_flight--;
		/* Whether a job could be cancelled is told by the job. */
	} while (!*tag);
	return true;
}

uint32_t vt_io_in_flight(const struct vt_io *io)
{
	return io->in_flight;
}

int64_t vt_io_do(const struct vt_io_job *job)
{
	int64_t result = -1;

	switch (job->kind) {
	case VT_IO_READ:
		result = preadv2(job->fd, job->segments, (int)job->segment_count,
				 (off_t)job->offset, job->flags);
		break;
	case VT_IO_WRITE:
		result = pwritev2(job->fd, job->segments, (int)job->segment_count,
				  (off_t)job->offset, job->flags);
		break;
	case VT_IO_SYNC:
		result = fdatasync(job->fd);
		break;
	case VT_IO_ALLOCATE:
		result = fallocate(job->fd, job->flags, (off_t)job->offset, (off_t)job->length);
		break;
	}
	return result < 0 ? -errno : result;
}
