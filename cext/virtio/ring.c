#include "virtio/ring_state.h"

#include "virtio/packed_log.h"

#include <stdlib.h>
#include <string.h>

#define AVAIL_NO_INTERRUPT 1u
#define USED_NO_NOTIFY 1u

struct used_element {
	uint32_t id;
	uint32_t length;
};

/* As the driver shares them: every field is read or written by an atomic access of its width. */
struct available {
	uint16_t flags, index, ring[];
};

struct used {
	uint16_t flags, index;
	struct used_element ring[];
};

static struct available *shared_available(const struct vt_ring *ring)
{
	return ring->available;
}

static struct used *shared_used(const struct vt_ring *ring)
{
	return ring->used;
}

/* The word behind the available ring, by which the driver says when to signal. */
static const uint16_t *used_event(const struct vt_ring *ring)
{
	return &shared_available(ring)->ring[ring->layout.size];
}

/* The word behind the used ring, by which the device says when to be notified. */
static uint16_t *available_event(const struct vt_ring *ring)
{
	return (uint16_t *)&shared_used(ring)->ring[ring->layout.size];
}

int vt_ring_breaks(struct vt_ring *ring, const char *why)
{
	if (!ring->broken)
		ring->broken = why;
	return -EPROTO;
}

static int place(struct vt_ring *ring, const struct vt_memory *memory)
{
	const struct vt_ring_layout *at = &ring->layout;
	uint64_t available = at->packed ? 4 : 6 + 2ull * at->size;
	uint64_t used = at->packed ? 4 : 6 + 8ull * at->size;

	ring->descriptors = vt_memory_user(memory, at->descriptors, 16ull * at->size, 16);
	ring->available = vt_memory_user(memory, at->available, available, at->packed ? 4 : 2);
	ring->used = vt_memory_user(memory, at->used, used, 4);
	return ring->descriptors && ring->available && ring->used ? 0 : -EFAULT;
}

const char *vt_ring_broken(const struct vt_ring *ring)
{
	if (!ring->broken && vt_memory_is_broken(ring->memory))
		return "guest memory is gone";
	return ring->broken;
}

int vt_ring_start(struct vt_memory *memory, const struct vt_ring_layout *layout, uint32_t base,
		  struct vt_ring **ring)
{
	struct vt_ring *made;

	*ring = NULL;
	if (!layout->size || layout->size > VT_RING_SIZE ||
	    (!layout->packed && layout->size & (layout->size - 1)))
		return -EINVAL;
	made = calloc(1, sizeof(*made) + layout->size);
	if (!made)
		return -ENOMEM;
	made->layout = *layout;
	made->mask = (uint16_t)(layout->size - 1);
	if (place(made, memory)) {
		free(made);
		return -EFAULT;
	}
	made->memory = vt_memory_get(memory);
	if (layout->packed) {
		int result = vt_packed_start(made, base);

		if (result) {
			vt_ring_stop(made);
			return result;
		}
		*ring = made;
		return 0;
	}
	made->fetched = (uint16_t)base;
	/* After a reconnect the used index is where the driver saw it last, not where we began. */
	made->completed = made->shown = made->published =
		load16(&shared_used(made)->index, __ATOMIC_RELAXED);
	*ring = made;
	return 0;
}

uint32_t vt_ring_stop(struct vt_ring *ring)
{
	uint32_t fetched;

	if (!ring)
		return 0;
	fetched = ring->layout.packed ? vt_packed_base(ring) : ring->fetched;
	vt_packed_end(ring);
	vt_memory_put(ring->memory);
	vt_log_end(ring->log);
	free(ring->again);
	free(ring);
	return fetched;
}

int vt_ring_set_log(struct vt_ring *ring, void *at)
{
	int count;

	if (ring->layout.packed)
		return vt_packed_set_log(ring, at);
	ring->again = calloc(ring->layout.size, sizeof(*ring->again));
	if (!ring->again)
		return -ENOMEM;
	count = vt_log_take_up(at, ring->layout.size, ring->completed, ring->again, &ring->log);
	if (count < 0)
		return count;
	ring->again_count = (uint32_t)count;
	/* What was fetched is what was used and what is in flight. */
	ring->fetched = (uint16_t)(ring->completed + count);
	return count;
}

int vt_ring_begin(struct vt_memory *memory, const struct vt_ring_layout *layout, uint32_t base,
		  struct vt_memory *log_memory, uint64_t log_at, struct vt_ring **ring)
{
	int result = vt_ring_start(memory, layout, base, ring);
	void *at;

	if (result || !log_memory)
		return result;
	at = vt_memory_user(log_memory, log_at, vt_ring_log_size(layout), 8);
	result = at ? vt_ring_set_log(*ring, at) : -EFAULT;
	if (result >= 0)
		return 0;
	vt_ring_stop(*ring);
	*ring = NULL;
	return result;
}

int vt_ring_set_memory(struct vt_ring *ring, struct vt_memory *memory)
{
	struct vt_memory *old = ring->memory;

	if (place(ring, memory)) {
		/* The old places stay, so that nothing points nowhere. */
		place(ring, old);
		vt_ring_breaks(ring, "the ring does not lie in the new memory");
		return -EFAULT;
	}
	ring->memory = vt_memory_get(memory);
	vt_memory_put(old);
	return 0;
}

/* A descriptor as it was at one moment. */
static struct descriptor copied(const struct descriptor *shared)
{
	const volatile struct descriptor *once = shared;
	struct descriptor copy = { once->address, once->length, once->flags, once->next };

	return (struct descriptor){ le64toh(copy.address), le32toh(copy.length),
				    le16toh(copy.flags), le16toh(copy.next) };
}

/* Return: 1 and the descriptor, or the ring is broken. */
static int load_descriptor(struct vt_ring *ring, const struct walk *walk, uint32_t index,
			   struct descriptor *found)
{
	struct descriptor shared;

	if (index >= walk->table_size)
		return vt_ring_breaks(ring, "a descriptor's number is not below the table's size");
	if (!walk->is_indirect) {
		*found = copied(&((const struct descriptor *)ring->descriptors)[index]);
		return 1;
	}
	if (vt_memory_read(ring->memory, walk->indirect + 16ull * index, &shared, sizeof(shared)))
		return vt_ring_breaks(ring, "an indirect table lies in no region");
	*found = copied(&shared);
	return 1;
}

int vt_ring_enter_table(struct vt_ring *ring, struct walk *walk, const struct descriptor *entry)
{
	if (!ring->layout.indirect)
		return vt_ring_breaks(ring, "an indirect descriptor that was not negotiated");
	if (walk->is_indirect)
		return vt_ring_breaks(ring, "an indirect table within an indirect table");
	if (entry->flags & DESC_NEXT)
		return vt_ring_breaks(ring, "an indirect descriptor with a next one");
	if (!entry->length || entry->length % 16)
		return vt_ring_breaks(ring, "an indirect table that holds no whole descriptors");
	if (entry->address + (entry->length - 1) < entry->address)
		return vt_ring_breaks(ring, "an indirect table that runs over the address space");
	walk->is_indirect = true;
	walk->indirect = entry->address;
	walk->table_size = entry->length / 16;
	return 1;
}

/* Return: 1; 0 if the arena has no room for this chain; or the ring is broken. */
int vt_ring_add_segments(struct vt_ring *ring, struct walk *walk, const struct descriptor *entry)
{
	struct vt_chain *chain = walk->chain;
	bool written = entry->flags & DESC_WRITE;
	uint32_t *bytes = written ? &chain->writable_bytes : &chain->readable_bytes;
	uint32_t left = VT_CHAIN_SEGMENTS - walk->count;
	int got;

	if (!entry->length)
		return vt_ring_breaks(ring, "a descriptor without a length");
	if (!written && chain->writable)
		return vt_ring_breaks(ring, "a readable descriptor after a writable one");
	if (entry->length > UINT32_MAX - *bytes)
		return vt_ring_breaks(ring, "a chain of 4 GiB or more");
	if (left > walk->room - walk->count)
		left = walk->room - walk->count;
	got = vt_memory_segments(ring->memory, entry->address, entry->length,
				 walk->segments + walk->count, left);
	if (got == -EFAULT)
		return vt_ring_breaks(ring, "a descriptor's memory lies in no region");
	if (got < 0)
		return walk->room < VT_CHAIN_SEGMENTS ?
			       0 :
			       vt_ring_breaks(ring, "a chain of too many segments");
	*bytes += entry->length;
	walk->count += (uint32_t)got;
	if (written)
		chain->writable = (uint16_t)(chain->writable + got);
	else
		chain->readable = (uint16_t)(chain->readable + got);
	return 1;
}

/* Return: 1; 0 if the arena has no room; or the ring is broken. */
static int walk_chain(struct vt_ring *ring, struct walk *walk)
{
	uint32_t index = walk->chain->head;
	uint32_t steps = 0;
	struct descriptor entry;

	walk->table_size = ring->layout.size;
	for (;;) {
		int result = load_descriptor(ring, walk, index, &entry);

		if (result < 0)
			return result;
		if (entry.flags & DESC_INDIRECT) {
			result = vt_ring_enter_table(ring, walk, &entry);
			if (result < 0)
				return result;
			index = 0;
			steps = 0;
			continue;
		}
		/* A chain cannot be longer than its table without going round in it. */
		if (steps++ == walk->table_size)
			return vt_ring_breaks(ring, "a chain that goes round");
		result = vt_ring_add_segments(ring, walk, &entry);
		if (result <= 0)
			return result;
		if (!(entry.flags & DESC_NEXT))
			return 1;
		index = entry.next;
	}
}

/* The next head to fetch. Return: 1 and the head; 0 if there is none; or the ring is broken. */
static int next_head(struct vt_ring *ring, uint16_t available, uint16_t *head)
{
	if (ring->again_next < ring->again_count) {
		*head = ring->again[ring->again_next];
	} else if (ring->fetched != available) {
		*head = load16(&shared_available(ring)->ring[ring->fetched & ring->mask],
			       __ATOMIC_RELAXED);
	} else {
		return 0;
	}
	if (*head >= ring->layout.size)
		return vt_ring_breaks(ring, "a head is not below the ring's size");
	if (ring->busy[*head])
		return vt_ring_breaks(ring, "a head that is in use already");
	return 1;
}

static void take_head(struct vt_ring *ring, uint16_t head)
{
	ring->busy[head] = 1;
	ring->in_flight++;
	if (ring->again_next < ring->again_count) {
		ring->again_next++;
		return;
	}
	ring->fetched++;
	if (ring->log)
		vt_log_mark(ring->log, head);
}

int vt_ring_fetch(struct vt_ring *ring, struct vt_chain *chains, uint32_t most,
		  struct iovec *arena, uint32_t room)
{
	uint16_t available, head;
	uint32_t taken = 0, used_room = 0;
	int result;

	if (vt_ring_broken(ring))
		return -EPROTO;
	if (ring->layout.packed)
		return vt_packed_fetch(ring, chains, most, arena, room);
	available = load16(&shared_available(ring)->index, __ATOMIC_ACQUIRE);
	if ((uint16_t)(available - ring->fetched) > ring->layout.size)
		return vt_ring_breaks(ring, "the available index ran ahead of the ring");
	while (taken < most && (result = next_head(ring, available, &head)) != 0) {
		struct walk walk = { .chain = &chains[taken],
				     .segments = arena + used_room,
				     .room = room - used_room };

		if (result < 0)
			return result;
		chains[taken] = (struct vt_chain){ .head = head, .first = used_room };
		result = walk_chain(ring, &walk);
		if (result < 0)
			return result;
		if (!result)
			break;
		take_head(ring, head);
		used_room += walk.count;
		taken++;
	}
	if (vt_ring_broken(ring))
		return -EPROTO;
	return (int)taken;
}

uint16_t vt_ring_waiting(const struct vt_ring *ring)
{
	if (ring->again_next < ring->again_count)
		return (uint16_t)(ring->again_count - ring->again_next);
	if (ring->layout.packed)
		return vt_packed_waiting(ring);
	return (uint16_t)(load16(&shared_available(ring)->index, __ATOMIC_ACQUIRE) - ring->fetched);
}

uint32_t vt_ring_in_flight(const struct vt_ring *ring)
{
	return ring->in_flight;
}

int vt_ring_complete(struct vt_ring *ring, uint16_t head, uint32_t written)
{
	struct used_element *element;

	if (head >= ring->layout.size || !ring->busy[head])
		return -EINVAL;
	if (ring->layout.packed) {
		vt_packed_complete(ring, head, written);
		return 0;
	}
	element = &shared_used(ring)->ring[ring->completed & ring->mask];
	__atomic_store_n(&element->id, htole32(head), __ATOMIC_RELAXED);
	__atomic_store_n(&element->length, htole32(written), __ATOMIC_RELAXED);
	if (ring->log)
		vt_log_batch(ring->log, head);
	ring->completed++;
	ring->busy[head] = 0;
	ring->in_flight--;
	return 0;
}

uint16_t vt_ring_used(const struct vt_ring *ring)
{
	return ring->layout.packed ? ring->used_at : ring->completed & ring->mask;
}

uint64_t vt_ring_log_size(const struct vt_ring_layout *layout)
{
	return layout->packed ? vt_packed_log_size(layout->size) : vt_log_size(layout->size);
}

uint64_t vt_ring_used_guest(const struct vt_ring *ring)
{
	const struct descriptor *descriptors = ring->descriptors;

	return ring->layout.packed ? vt_memory_guest(ring->memory, &descriptors[ring->used_at]) :
				     UINT64_MAX;
}

void vt_ring_show(struct vt_ring *ring)
{
	uint16_t now = ring->completed;

	if (ring->layout.packed) {
		vt_packed_show(ring);
		return;
	}
	if (ring->shown == now)
		return;
	__atomic_store_n(&shared_used(ring)->index, htole16(now), __ATOMIC_RELEASE);
	if (ring->log)
		vt_log_publish(ring->log, now);
	ring->shown = now;
}

bool vt_ring_publish(struct vt_ring *ring)
{
	uint16_t old = ring->published, now = ring->completed;
	bool told = ring->told;

	vt_ring_show(ring);
	if (ring->layout.packed)
		return vt_packed_publish(ring);
	if (old == now)
		return false;
	ring->published = now;
	ring->told = true;
	/* Section 2.7.10: the index is seen before used_event is read. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (ring->layout.event_index) {
		uint16_t event = load16(used_event(ring), __ATOMIC_RELAXED);

		return !told || (uint16_t)(now - event - 1) < (uint16_t)(now - old);
	}
	return !(load16(&shared_available(ring)->flags, __ATOMIC_RELAXED) & AVAIL_NO_INTERRUPT);
}

bool vt_ring_notify_on(struct vt_ring *ring)
{
	ring->quiet = false;
	if (ring->layout.packed)
		return vt_packed_notify_on(ring);
	if (ring->layout.event_index)
		store16(available_event(ring), ring->fetched);
	else
		store16(&shared_used(ring)->flags, 0);
	/* The wish is seen before the index is looked at: a notification that was left out because
	 * of the old wish cannot be missed. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return vt_ring_waiting(ring) != 0;
}

void vt_ring_notify_off(struct vt_ring *ring)
{
	if (ring->quiet)
		return;
	ring->quiet = true;
	if (ring->layout.packed) {
		vt_packed_notify_off(ring);
		return;
	}
	/* With the event index nothing is said: the index stays where it is and is passed by. */
	if (!ring->layout.event_index)
		store16(&shared_used(ring)->flags, USED_NO_NOTIFY);
}
