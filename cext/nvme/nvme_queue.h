/* NVMe queue pairs: the hot path of a driver, over plain memory and two doorbells.
 *
 * A queue pair belongs to one thread at a time: a call that finds another one inside returns
 * -EBUSY; and one while the gate of the doorbells, or of a submission queue in the device's memory,
 * is shut, -EACCES. Nothing here allocates DMA memory or talks to the kernel; the addresses of the
 * rings and of the doorbells come from the caller, who keeps them mapped until vt_nvme_stop has
 * returned 0. NVM Express Base Specification 2.0: section 3.3.1 (queues), 4.2 (submission and
 * completion entries), 4.1.1 (PRP lists), 5.8 (Doorbell Buffer Config), 8.5 (Controller Memory
 * Buffer).
 */
#ifndef VT_NVME_QUEUE_H
#define VT_NVME_QUEUE_H

#include <stdint.h>

struct vt_nvme_done;
struct vt_nvme_queue;

/* Where a queue pair lies. Addresses are this process's, except `lists_iova`. */
struct vt_nvme_layout {
	uint64_t submission;    /* `sq_entries` commands of 64 bytes */
	uint64_t completion;    /* `cq_entries` completions of 16 bytes, all zero */
	uint64_t tail_doorbell; /* the submission queue's */
	uint64_t head_doorbell; /* the completion queue's */
	uint64_t tail_shadow;   /* shadow doorbells and event indices: all four, or 0 */
	uint64_t head_shadow;
	uint64_t tail_event;
	uint64_t head_event;
	uint64_t lists;         /* `sq_entries` pages for PRP lists, or 0 */
	uint64_t lists_iova;
	uint64_t gate;          /* the struct vt_gate before the doorbells, or 0: there is none */
	uint64_t memory_gate;   /* the one before `submission` where that is memory of the device (a
				 * Controller Memory Buffer), or 0: it is ordinary memory */
	uint32_t sq_entries;
	uint32_t cq_entries;
	uint32_t page_size;     /* the controller's, CC.MPS */
	uint32_t id;            /* what completions must carry as the submission queue's id */
	uint32_t lazy;          /* not 0: tell the controller late which completions were taken */
};

/* A command on a run of blocks; without data where `bytes` is 0. */
struct vt_nvme_io {
	uint64_t tag;           /* comes back with the completion */
	uint64_t lba;
	uint64_t iova;          /* of the data: one run of addresses, a multiple of 4 */
	uint32_t bytes;
	uint32_t blocks;        /* at least 1 where `bytes` is not 0 */
	uint32_t nsid;
	uint16_t control;       /* command dword 12, bits 31:16 (FUA is 0x4000) */
	uint8_t opcode;
	uint8_t reserved;
};

struct vt_nvme_done {
	uint64_t tag;
	uint64_t latency_ns;
	uint64_t number;        /* completions before this one */
	uint32_t result;        /* dword 0 of the completion */
	uint16_t status;        /* 0: success; otherwise type << 8 | code, do-not-retry in bit 14 */
	uint16_t cid;
};

struct vt_nvme_counters {
	uint64_t submitted, completed, failed;
	uint64_t strays;        /* completions of no command: each was dropped */
	uint64_t tail_writes, head_writes; /* doorbells really written */
	uint32_t in_flight, depth;
	uint32_t last_stray;    /* its command identifier; its status in the upper half */
	uint32_t reserved;
};

/* 0 with `queue` set; -EINVAL for a layout that cannot be; -ENOMEM. */
int vt_nvme_new(const struct vt_nvme_layout *layout, struct vt_nvme_queue **queue);
/* No call that begins after this one touches rings or doorbells: they return -ESHUTDOWN. -EBUSY
 * while another thread is still inside: a poll then ends as soon as it sees this, a load as
 * vt_nvme_halt and vt_nvme_abandon say; then again, until 0. In a child process, where every call
 * returns -ESTALE, 0 at once. */
int vt_nvme_stop(struct vt_nvme_queue *queue);
void vt_nvme_free(struct vt_nvme_queue *queue);
/* Ends a running vt_nvme_poll or vt_nvme_run soon; with vt_nvme_abandon the only call allowed from
 * another thread. */
void vt_nvme_halt(struct vt_nvme_queue *queue);
/* The same for a controller that is known not to answer: vt_nvme_run does not wait for what is in
 * flight, and returns -ETIMEDOUT. */
void vt_nvme_abandon(struct vt_nvme_queue *queue);
/* After a reset of the controller, on a stopped queue pair: takes the completions that had come,
 * as vt_nvme_poll, and returns how many; then both rings are empty and nothing is in flight, as
 * vt_nvme_new left it; counters go on. -EBUSY if it was not stopped. */
int vt_nvme_restart(struct vt_nvme_queue *queue, struct vt_nvme_done *done, uint32_t room,
		    uint32_t *held);

/* Submits commands in order with one write of the doorbell. Returns how many were taken: fewer
 * than `count` where the queue is full. -EINVAL for a run of data that no PRP list can tell. */
int vt_nvme_submit(struct vt_nvme_queue *queue, const struct vt_nvme_io *ios, uint32_t count);
/* The same for equal commands on many places: command i works on lbas[i] with the data at
 * pattern->iova + tags[i] * stride, and carries tags[i], which is less than `slots`. */
int vt_nvme_submit_many(struct vt_nvme_queue *queue, const struct vt_nvme_io *pattern,
			const uint64_t *lbas, const uint64_t *tags, uint32_t count,
			uint64_t stride, uint64_t slots);
/* One command of 64 bytes as it stands, but for its command identifier: 1, or 0 if full. */
int vt_nvme_submit_raw(struct vt_nvme_queue *queue, const void *command, uint64_t tag);

/* Makes a command whose data lies in pages apart from each other, not told to the controller before
 * vt_nvme_tell: `entries` are the PRP entries of it in order (4.1.1; all but the first begin a page),
 * of which `io->bytes` says how many there are; io->iova is not looked at. Returns 1, 0 if the queue
 * is full, -EINVAL for more entries than a list has. */
int vt_nvme_put(struct vt_nvme_queue *queue, const struct vt_nvme_io *io, const uint64_t *entries);
/* Writes the doorbell for what was put. 0, or why nothing can be told. */
int vt_nvme_tell(struct vt_nvme_queue *queue);

/* Takes completions: waits until there are `least` (or none is in flight), or `timeout_ns` has
 * passed. `done` has `room` places of which the first `*held` are filled already; those taken are
 * put behind them and counted in `*held`, so that an interrupted caller finds them there. Returns
 * how many it took. A completion of no command is counted as a stray and otherwise ignored: a wait
 * ends by its own commands or by time. */
int vt_nvme_poll(struct vt_nvme_queue *queue, struct vt_nvme_done *done, uint32_t room,
		 uint32_t least, uint64_t timeout_ns, uint32_t *held);
/* The same where only tags matter; `status` is that of the first command that failed, or 0. */
int vt_nvme_poll_tags(struct vt_nvme_queue *queue, uint64_t *tags, uint32_t room, uint32_t least,
		      uint64_t timeout_ns, uint32_t *held, uint32_t *status);

/* The command identifier of the command that is out with this tag, or -ENOENT. */
int vt_nvme_identifier(const struct vt_nvme_queue *queue, uint64_t tag);

/* Where the numbers of commands that are out, and that were sent, can be read at any time, also by
 * other threads, as long as the queue pair is there: for who cannot afford a call. */
const uint32_t *vt_nvme_in_flight(const struct vt_nvme_queue *queue);
const uint64_t *vt_nvme_submitted(const struct vt_nvme_queue *queue);

void vt_nvme_count(const struct vt_nvme_queue *queue, struct vt_nvme_counters *counters);

#endif
