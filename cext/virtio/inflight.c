#include "virtio/inflight.h"

#include <errno.h>
#include <stdlib.h>

#define VERSION 1u

/* As docs/interop/vhost-user.rst lays it out ("DescStateSplit", "QueueRegionSplit"). */
struct entry {
	uint8_t inflight;
	uint8_t padding[5];
	uint16_t next;
	uint64_t counter;
};

struct region {
	uint64_t features;
	uint16_t version;
	uint16_t desc_num;
	uint16_t last_batch_head;
	uint16_t used_idx;
	struct entry entries[];
};

_Static_assert(sizeof(struct entry) == 16, "DescStateSplit has 16 bytes");
_Static_assert(sizeof(struct region) == 16, "QueueRegionSplit begins with 16 bytes");

struct vt_log {
	struct region *region;
	uint64_t counter;
	uint32_t size;
	uint32_t batched;
	uint16_t batch[];
};

/* The order of these stores is what a crash finds: the compiler must keep it, and the processor
 * does for whoever looks after this process has ended. */
static void order(void)
{
	__atomic_signal_fence(__ATOMIC_SEQ_CST);
}

uint64_t vt_log_size(uint32_t queue_size)
{
	return sizeof(struct region) + queue_size * sizeof(struct entry);
}

/* The batch that was becoming visible when the last process ended: clear what is visible. */
static int settle(struct region *region, uint32_t size, uint16_t used)
{
	uint16_t count = (uint16_t)(used - region->used_idx);
	uint16_t head = region->last_batch_head;

	if (count > size)
		return -EINVAL;
	while (count--) {
		if (head >= size)
			return -EINVAL;
		region->entries[head].inflight = 0;
		head = region->entries[head].next;
	}
	order();
	region->used_idx = used;
	return 0;
}

static void sort(uint16_t *heads, uint32_t count, const struct region *region)
{
	/* Few, and nearly in order: insertion. */
	for (uint32_t i = 1; i < count; i++) {
		uint16_t head = heads[i];
		uint64_t counter = region->entries[head].counter;
		uint32_t at = i;

		for (; at && region->entries[heads[at - 1]].counter > counter; at--)
			heads[at] = heads[at - 1];
		heads[at] = head;
	}
}

int vt_log_take_up(void *at, uint32_t queue_size, uint16_t used, uint16_t *heads,
		   struct vt_log **log)
{
	struct region *region = at;
	struct vt_log *made;
	uint64_t counter = 0;
	int count = 0;

	*log = NULL;
	if (!region->version) {
		for (uint32_t i = 0; i < queue_size; i++)
			region->entries[i] = (struct entry){ .inflight = 0 };
		region->desc_num = (uint16_t)queue_size;
		region->last_batch_head = 0;
		region->used_idx = used;
		order();
		region->version = VERSION;
	} else if (region->version != VERSION || region->desc_num != queue_size ||
		   settle(region, queue_size, used)) {
		return -EINVAL;
	}
	for (uint32_t i = 0; i < queue_size; i++) {
		const struct entry *entry = &region->entries[i];

		if (!entry->inflight)
			continue;
		heads[count++] = (uint16_t)i;
		if (entry->counter >= counter)
			counter = entry->counter + 1;
	}
	sort(heads, (uint32_t)count, region);
	made = calloc(1, sizeof(*made) + queue_size * sizeof(made->batch[0]));
	if (!made)
		return -ENOMEM;
	made->region = region;
	made->counter = counter;
	made->size = queue_size;
	*log = made;
	return count;
}

void vt_log_end(struct vt_log *log)
{
	free(log);
}

void vt_log_mark(struct vt_log *log, uint16_t head)
{
	struct entry *entry = &log->region->entries[head];

	entry->counter = log->counter++;
	order();
	entry->inflight = 1;
	order();
}

void vt_log_batch(struct vt_log *log, uint16_t head)
{
	log->region->entries[head].next = log->region->last_batch_head;
	order();
	log->region->last_batch_head = head;
	order();
	/* A ring completes no more heads between two publications than it has. */
	if (log->batched < log->size)
		log->batch[log->batched++] = head;
}

void vt_log_publish(struct vt_log *log, uint16_t used)
{
	order();
	for (uint32_t i = 0; i < log->batched; i++)
		log->region->entries[log->batch[i]].inflight = 0;
	log->batched = 0;
	order();
	log->region->used_idx = used;
}
