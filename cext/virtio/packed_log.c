#include "virtio/packed_log.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>

#define VERSION 1u
#define NEXT 1u
#define STRIDE 8u /* words of flags between two descriptors */
#define NONE UINT16_MAX

/* As docs/interop/vhost-user.rst lays it out ("DescStatePacked", "QueueRegionPacked"). */
struct entry {
	uint8_t inflight;
	uint8_t padding;
	uint16_t next, last, num;
	uint64_t counter;
	uint16_t id, flags;
	uint32_t len;
	uint64_t addr;
};

struct region {
	uint64_t features;
	uint16_t version, desc_num;
	uint16_t free_head, old_free_head;
	uint16_t used_idx, old_used_idx;
	uint8_t used_wrap_counter, old_used_wrap_counter;
	uint8_t padding[7];
	struct entry entries[];
};

_Static_assert(sizeof(struct entry) == 32, "DescStatePacked has 32 bytes");
_Static_assert(sizeof(struct region) == 32, "QueueRegionPacked begins with 32 bytes");

/* Where the free entries are linked is known here too: the region is the front end's to change. */
struct vt_packed_log {
	struct region *region;
	uint64_t counter;
	uint32_t size;
	uint32_t batched;
	uint16_t free_head;
	uint16_t *next;   /* by entry */
	uint16_t *entry;  /* by id: its first entry */
	uint16_t *last;   /* by id: its last one */
	uint16_t *batch;  /* first entries that are used and not visible */
};

/* The order of these stores is what a crash finds: see inflight.c. */
static void order(void)
{
	__atomic_signal_fence(__ATOMIC_SEQ_CST);
}

uint64_t vt_packed_log_size(uint32_t queue_size)
{
	return sizeof(struct region) + queue_size * sizeof(struct entry);
}

void vt_packed_log_end(struct vt_packed_log *log)
{
	free(log ? log->next : NULL);
	free(log);
}

static struct vt_packed_log *make(struct region *region, uint32_t size)
{
	struct vt_packed_log *made = calloc(1, sizeof(*made));

	if (!made)
		return NULL;
	made->region = region;
	made->size = size;
	made->next = calloc(4ull * size, sizeof(*made->next));
	if (!made->next) {
		free(made);
		return NULL;
	}
	made->entry = made->next + size;
	made->last = made->entry + size;
	made->batch = made->last + size;
	return made;
}

static void begin(struct region *region, uint32_t size, struct vt_packed_place used)
{
	for (uint32_t i = 0; i < size; i++)
		region->entries[i] = (struct entry){ .next = (uint16_t)(i + 1) };
	region->desc_num = (uint16_t)size;
	region->free_head = region->old_free_head = 0;
	region->used_idx = region->old_used_idx = used.place;
	region->used_wrap_counter = region->old_used_wrap_counter = used.wrap;
	order();
	region->version = VERSION;
}

/* The batch that was becoming visible when the last process ended either is visible, or is undone. */
static int settle(struct region *region, uint32_t size, const uint16_t *flags)
{
	uint16_t old = region->old_used_idx;
	bool wrap = region->old_used_wrap_counter;
	bool is_used;

	if (region->version != VERSION || region->desc_num != size || old >= size ||
	    region->used_idx >= size)
		return -EINVAL;
	if (old == region->used_idx && wrap == (bool)region->used_wrap_counter) {
		region->free_head = region->old_free_head;
		return 0;
	}
	is_used = (le16toh(__atomic_load_n(flags + (size_t)STRIDE * old, __ATOMIC_ACQUIRE)) &
		   0x8080u) == (wrap ? 0x8080u : 0);
	if (is_used) {
		region->old_free_head = region->free_head;
		region->old_used_idx = region->used_idx;
		region->old_used_wrap_counter = region->used_wrap_counter;
	} else {
		region->free_head = region->old_free_head;
		region->used_idx = old;
		region->used_wrap_counter = wrap;
	}
	return 0;
}

/* Mark what is free, by the list as it is now, as not in flight. Return: how many, or -EINVAL. */
static int free_entries(struct vt_packed_log *log)
{
	struct region *region = log->region;
	uint16_t at = region->free_head;
	uint32_t count = 0;

	while (at < log->size) {
		struct entry *entry = &region->entries[at];

		/* `entry` of ids is not used yet: here it says who was met. */
		if (log->entry[at] || count++ == log->size)
			return -EINVAL;
		log->entry[at] = 1;
		entry->inflight = 0;
		log->next[at] = entry->next;
		at = entry->next;
	}
	log->free_head = region->free_head;
	return (int)count;
}

static void sort(uint16_t *heads, uint32_t count, const struct region *region)
{
	for (uint32_t i = 1; i < count; i++) {
		uint16_t head = heads[i];
		uint64_t counter = region->entries[head].counter;
		uint32_t at = i;

		for (; at && region->entries[heads[at - 1]].counter > counter; at--)
			heads[at] = heads[at - 1];
		heads[at] = head;
	}
}

/* Find what is in flight: each entry that is not free belongs to one chain. */
static int find_in_flight(struct vt_packed_log *log, uint16_t *heads, uint32_t *slots)
{
	struct region *region = log->region;
	int found = free_entries(log), count = 0;

	*slots = 0;
	if (found < 0)
		return found;
	for (uint32_t i = 0; i < log->size; i++) {
		uint16_t at = (uint16_t)i;
		uint32_t left;

		if (region->entries[i].inflight != 1)
			continue;
		left = region->entries[i].num;
		if (!left || left > log->size - *slots)
			return -EINVAL;
		*slots += left;
		for (; left; left--) {
			if (at >= log->size || log->entry[at])
				return -EINVAL;
			log->entry[at] = 1;
			log->next[at] = region->entries[at].next;
			at = region->entries[at].next;
		}
		heads[count++] = (uint16_t)i;
		if (region->entries[i].counter >= log->counter)
			log->counter = region->entries[i].counter + 1;
	}
	if (*slots + (uint32_t)found != log->size)
		return -EINVAL;
	sort(heads, (uint32_t)count, region);
	return count;
}

int vt_packed_log_take_up(void *at, uint32_t queue_size, const uint16_t *flags,
			  struct vt_packed_place *used, uint16_t *heads, uint32_t *slots,
			  struct vt_packed_log **log)
{
	struct region *region = at;
	struct vt_packed_log *made;
	int count;

	*log = NULL;
	if (!region->version)
		begin(region, queue_size, *used);
	else if (settle(region, queue_size, flags))
		return -EINVAL;
	made = make(region, queue_size);
	if (!made)
		return -ENOMEM;
	count = find_in_flight(made, heads, slots);
	if (count < 0) {
		vt_packed_log_end(made);
		return count;
	}
	for (uint32_t i = 0; i < queue_size; i++)
		made->entry[i] = made->last[i] = NONE;
	*used = (struct vt_packed_place){ region->used_idx, region->used_wrap_counter };
	if (used->place >= queue_size) {
		vt_packed_log_end(made);
		return -EINVAL;
	}
	*log = made;
	return count;
}

uint32_t vt_packed_log_chain(const struct vt_packed_log *log, uint16_t entry,
			     struct vt_packed_copy *copies, uint32_t room)
{
	uint32_t count = log->region->entries[entry].num;

	if (count > room || count > log->size)
		return 0;
	for (uint32_t i = 0; i < count; i++, entry = log->next[entry]) {
		const volatile struct entry *once = &log->region->entries[entry];

		copies[i] = (struct vt_packed_copy){ once->addr, once->len, once->id, once->flags };
		if ((i + 1 < count) != (bool)(copies[i].flags & NEXT))
			return 0;
		if (i + 1 < count && log->next[entry] >= log->size)
			return 0;
	}
	return count;
}

void vt_packed_log_adopt(struct vt_packed_log *log, uint16_t entry, uint32_t count, uint16_t id)
{
	log->entry[id] = log->last[id] = entry;
	for (uint32_t i = 1; i < count && log->next[log->last[id]] < log->size; i++)
		log->last[id] = log->next[log->last[id]];
}

void vt_packed_log_mark(struct vt_packed_log *log, const struct vt_packed_copy *copies,
			uint32_t count, uint16_t id)
{
	struct region *region = log->region;
	uint16_t at = log->free_head;
	struct entry *head;

	/* As many are free as the ring has descriptors that are not in flight. */
	if (at >= log->size)
		return;
	head = &region->entries[at];
	log->entry[id] = log->last[id] = at;
	for (uint32_t i = 0; i < count && at < log->size; i++) {
		struct entry *entry = &region->entries[at];

		entry->addr = copies[i].address;
		entry->len = copies[i].length;
		entry->flags = copies[i].flags;
		entry->id = copies[i].id;
		log->last[id] = at;
		at = log->next[at];
	}
	head->num = (uint16_t)count;
	head->last = log->last[id];
	head->counter = log->counter++;
	order();
	head->inflight = 1;
	order();
	region->free_head = log->free_head = at;
	order();
	/* A batch that is not visible keeps its own way back. */
	if (!log->batched)
		region->old_free_head = at;
	order();
}

void vt_packed_log_batch(struct vt_packed_log *log, uint16_t id, struct vt_packed_place used)
{
	struct region *region = log->region;
	uint16_t first = log->entry[id], last = log->last[id];

	if (first >= log->size || last >= log->size)
		return;
	region->entries[last].next = log->next[last] = log->free_head;
	order();
	region->free_head = log->free_head = first;
	order();
	region->used_idx = used.place;
	region->used_wrap_counter = used.wrap;
	order();
	if (log->batched < log->size)
		log->batch[log->batched++] = first;
}

void vt_packed_log_publish(struct vt_packed_log *log)
{
	struct region *region = log->region;

	order();
	for (uint32_t i = 0; i < log->batched; i++)
		region->entries[log->batch[i]].inflight = 0;
	log->batched = 0;
	order();
	region->old_free_head = region->free_head;
	region->old_used_idx = region->used_idx;
	region->old_used_wrap_counter = region->used_wrap_counter;
	order();
}
