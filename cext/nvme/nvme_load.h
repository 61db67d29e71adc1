/* A load on an NVMe queue pair, in the manner of fio: commands of one size, a number of them kept
 * in flight, their latencies in a histogram. */
#ifndef VT_NVME_LOAD_H
#define VT_NVME_LOAD_H

#include "nvme/nvme_queue.h"

#define VT_NVME_BUCKETS 1920u

/* A load for vt_nvme_run: `depth` commands kept in flight, each with a buffer of its own. */
struct vt_nvme_job {
	uint64_t first_lba, span;   /* the blocks that are touched: span / blocks runs of blocks */
	uint64_t iova, stride;      /* the buffer of slot i is at iova + i * stride */
	uint64_t runtime_ns, limit; /* the end: time, or number of commands (0: none) */
	uint64_t seed;
	uint32_t depth, batch;      /* refill when `batch` commands are done (1: each at once) */
	uint32_t blocks, bytes, nsid;
	uint32_t random;            /* 0: ascending */
	uint32_t read_percent;
	uint32_t reserved;
};

struct vt_nvme_report {
	uint64_t reads, writes, failed;
	uint64_t elapsed_ns, latency_min_ns, latency_max_ns, latency_sum_ns;
	uint64_t tail_writes, head_writes;
	uint32_t first_status; /* of the first command that failed, 0: none did */
	uint32_t reserved;
	uint64_t histogram[VT_NVME_BUCKETS];
};

/* Runs a load on an idle queue. 0; -ETIMEDOUT if the controller stops answering for 10 seconds,
 * or is given up (vt_nvme_abandon); -EPROTO for a completion of no command; -EACCES if the doorbells
 * are barred meanwhile: after these the queue is as after vt_nvme_stop, and the controller must be
 * reset. */
int vt_nvme_run(struct vt_nvme_queue *queue, const struct vt_nvme_job *job,
		struct vt_nvme_report *report);

/* The least latency, in nanoseconds, that falls into a bucket: 64 equal steps a power of two. */
uint64_t vt_nvme_bucket_floor(uint32_t bucket);
uint32_t vt_nvme_bucket(uint64_t nanoseconds);

#endif
