#include "virtio/packed_log.h"
#include "virtio/ring_state.h"

#include <stdlib.h>
#include <string.h>

#define AVAILABLE 0x80u
#define USED 0x8000u
#define WRAP 0x8000u
/* Event suppression (section 2.8.10). */
#define EVENTS_ON 0u
#define EVENTS_OFF 1u
#define EVENTS_AT 2u

/* As the driver shares them. */
struct packed {
	uint64_t address;
	uint32_t length;
	uint16_t id, flags;
};

struct suppression {
	uint16_t place, flags;
};

_Static_assert(sizeof(struct packed) == 16 && sizeof(struct suppression) == 4, "section 2.8");
_Static_assert(sizeof(struct vt_packed_copy) == 16, "one descriptor");

static struct packed *shared(const struct vt_ring *ring, uint32_t place)
{
	return (struct packed *)ring->descriptors + place;
}

/* The flags of an available or a used descriptor under a wrap counter. */
static uint16_t available_flags(bool wrap)
{
	return wrap ? AVAILABLE : USED;
}

static uint16_t used_flags(bool wrap)
{
	return wrap ? AVAILABLE | USED : 0;
}

static void advance(const struct vt_ring *ring, uint16_t *place, bool *wrap, uint32_t by)
{
	uint32_t next = *place + by;

	if (next >= ring->layout.size) {
		next -= ring->layout.size;
		*wrap = !*wrap;
	}
	*place = (uint16_t)next;
}

int vt_packed_start(struct vt_ring *ring, uint32_t base)
{
	uint32_t size = ring->layout.size;

	ring->at = base & (WRAP - 1);
	ring->at_wrap = base & WRAP;
	ring->used_at = (uint16_t)(base >> 16) & (WRAP - 1);
	ring->used_wrap = base >> 16 & WRAP;
	/* Nothing is in flight at a start: what was fetched has been used, or is in the log. */
	if (ring->at >= size || ring->used_at >= size)
		return -EINVAL;
	ring->taken = calloc(size, sizeof(*ring->taken));
	return ring->taken ? 0 : -ENOMEM;
}

uint32_t vt_packed_base(const struct vt_ring *ring)
{
	uint32_t available = ring->at | (ring->at_wrap ? WRAP : 0);
	uint32_t used = ring->used_at | (ring->used_wrap ? WRAP : 0);

	return available | used << 16;
}

void vt_packed_end(struct vt_ring *ring)
{
	vt_packed_log_end(ring->packed_log);
	free(ring->copies);
	free(ring->taken);
}

int vt_packed_set_log(struct vt_ring *ring, void *at)
{
	struct vt_packed_place used = { ring->used_at, ring->used_wrap };
	const struct packed *descriptors = ring->descriptors;
	uint32_t slots;
	int count;

	ring->again = calloc(ring->layout.size, sizeof(*ring->again));
	ring->copies = calloc(VT_CHAIN_SEGMENTS, sizeof(*ring->copies));
	if (!ring->again || !ring->copies)
		return -ENOMEM;
	count = vt_packed_log_take_up(at, ring->layout.size, &descriptors->flags, &used, ring->again,
				      &slots, &ring->packed_log);
	if (count < 0)
		return count;
	ring->again_count = (uint32_t)count;
	ring->used_at = ring->at = used.place;
	ring->used_wrap = ring->at_wrap = used.wrap;
	/* What was fetched is what was used and what is in flight. Of that, nothing is used yet,
	 * whatever a batch that never became visible has left there. */
	for (uint32_t i = 0; i < slots; i++) {
		store16(&shared(ring, ring->at)->flags, available_flags(ring->at_wrap));
		advance(ring, &ring->at, &ring->at_wrap, 1);
	}
	ring->slots = slots;
	return count;
}

/* A descriptor as it was at one moment. */
static struct vt_packed_copy copied(const struct packed *from)
{
	const volatile struct packed *once = from;
	struct packed copy = { once->address, once->length, once->id, once->flags };

	return (struct vt_packed_copy){ le64toh(copy.address), le32toh(copy.length),
					le16toh(copy.id), le16toh(copy.flags) };
}

static struct descriptor as_descriptor(const struct vt_packed_copy *copy)
{
	return (struct descriptor){ copy->address, copy->length, copy->flags, 0 };
}

/* In a table the descriptors follow each other to its end; of their flags only WRITE counts. */
static int walk_table(struct vt_ring *ring, struct walk *walk, const struct descriptor *entry)
{
	int result = vt_ring_enter_table(ring, walk, entry);

	for (uint32_t i = 0; result > 0 && i < walk->table_size; i++) {
		struct vt_packed_copy copy;
		struct descriptor inside;
		struct packed raw;

		if (vt_memory_read(ring->memory, walk->indirect + 16ull * i, &raw, sizeof(raw)))
			return vt_ring_breaks(ring, "an indirect table lies in no region");
		copy = copied(&raw);
		if (copy.flags & DESC_INDIRECT)
			return vt_ring_breaks(ring, "an indirect table within an indirect table");
		inside = as_descriptor(&copy);
		result = vt_ring_add_segments(ring, walk, &inside);
	}
	return result;
}

/* Add one descriptor of a chain. Return: 1; 0 if the arena has no room; or the ring is broken. */
static int add(struct vt_ring *ring, struct walk *walk, const struct vt_packed_copy *copy,
	       uint32_t before)
{
	struct descriptor entry = as_descriptor(copy);

	if (!(copy->flags & DESC_INDIRECT))
		return vt_ring_add_segments(ring, walk, &entry);
	if (before)
		return vt_ring_breaks(ring, "an indirect descriptor after others");
	return walk_table(ring, walk, &entry);
}

/* Take a chain apart that begins at the next available place. Return: 1, its id and how many
 * descriptors it has; 0 if the arena has no room; or the ring is broken. */
static int walk_ring(struct vt_ring *ring, struct walk *walk, uint16_t *id, uint32_t *length)
{
	uint16_t place = ring->at;
	bool wrap = ring->at_wrap;

	for (uint32_t steps = 0;; steps++) {
		struct vt_packed_copy copy;
		int result;

		if (ring->slots + steps >= ring->layout.size || steps == VT_CHAIN_SEGMENTS)
			return vt_ring_breaks(ring, "a chain that is longer than the ring");
		copy = copied(shared(ring, place));
		result = add(ring, walk, &copy, steps);
		if (result <= 0)
			return result;
		if (ring->copies)
			ring->copies[steps] = copy;
		advance(ring, &place, &wrap, 1);
		if (copy.flags & DESC_NEXT)
			continue;
		*id = copy.id;
		*length = steps + 1;
		return 1;
	}
}

/* The same of a chain that the log says is in flight. */
static int walk_log(struct vt_ring *ring, struct walk *walk, uint16_t *id, uint32_t *length)
{
	uint32_t count = vt_packed_log_chain(ring->packed_log, ring->again[ring->again_next],
					     ring->copies, VT_CHAIN_SEGMENTS);

	if (!count)
		return vt_ring_breaks(ring, "the in-flight log contradicts itself");
	for (uint32_t i = 0; i < count; i++) {
		int result = add(ring, walk, &ring->copies[i], i);

		if (result <= 0)
			return result;
	}
	*id = ring->copies[count - 1].id;
	*length = count;
	return 1;
}

/* A chain is ours now. Return: 1, or the ring is broken. */
static int take(struct vt_ring *ring, uint16_t id, uint32_t length, bool is_again)
{
	if (id >= ring->layout.size)
		return vt_ring_breaks(ring, "a buffer's id is not below the ring's size");
	if (ring->busy[id])
		return vt_ring_breaks(ring, "a buffer's id that is in use already");
	if (is_again && ring->adopted + length > ring->slots)
		return vt_ring_breaks(ring, "the in-flight log contradicts itself");
	ring->busy[id] = 1;
	ring->taken[id] = (uint16_t)length;
	ring->in_flight++;
	if (is_again) {
		ring->adopted += length;
		vt_packed_log_adopt(ring->packed_log, ring->again[ring->again_next++], length, id);
		return 1;
	}
	if (ring->packed_log)
		vt_packed_log_mark(ring->packed_log, ring->copies, length, id);
	ring->slots += length;
	advance(ring, &ring->at, &ring->at_wrap, length);
	return 1;
}

static bool is_available(const struct vt_ring *ring)
{
	uint16_t flags = load16(&shared(ring, ring->at)->flags, __ATOMIC_ACQUIRE);

	return ring->slots < ring->layout.size &&
	       (flags & (AVAILABLE | USED)) == available_flags(ring->at_wrap);
}

int vt_packed_fetch(struct vt_ring *ring, struct vt_chain *chains, uint32_t most,
		    struct iovec *arena, uint32_t room)
{
	uint32_t taken = 0, used_room = 0;

	/* The log reuses what a batch has given up: the batch has to be past undoing. */
	if (ring->packed_log)
		vt_packed_show(ring);
	while (taken < most) {
		bool is_again = ring->again_next < ring->again_count;
		struct vt_chain *chain = &chains[taken];
		struct walk walk = { .chain = chain,
				     .segments = arena + used_room,
				     .room = room - used_room };
		uint32_t length = 0;
		uint16_t id = 0;
		int result;

		if (!is_again && !is_available(ring))
			break;
		*chain = (struct vt_chain){ .first = used_room };
		result = is_again ? walk_log(ring, &walk, &id, &length) :
				    walk_ring(ring, &walk, &id, &length);
		if (result > 0)
			result = take(ring, id, length, is_again);
		if (result < 0)
			return result;
		if (!result)
			break;
		chain->head = id;
		used_room += walk.count;
		taken++;
	}
	return vt_ring_broken(ring) ? -EPROTO : (int)taken;
}

uint16_t vt_packed_waiting(const struct vt_ring *ring)
{
	return is_available(ring) ? (uint16_t)(ring->layout.size - ring->slots) : 0;
}

void vt_packed_complete(struct vt_ring *ring, uint16_t id, uint32_t written)
{
	struct packed *place = shared(ring, ring->used_at);
	uint16_t flags = used_flags(ring->used_wrap) | (written ? DESC_WRITE : 0);
	uint16_t length = ring->taken[id];

	__atomic_store_n(&place->id, htole16(id), __ATOMIC_RELAXED);
	__atomic_store_n(&place->length, htole32(written), __ATOMIC_RELAXED);
	if (!ring->batched) {
		/* The driver looks here next: nothing behind it is seen before its flags. */
		ring->batched = true;
		ring->first = ring->used_at;
		ring->first_flags = flags;
	} else {
		__atomic_store_n(&place->flags, htole16(flags), __ATOMIC_RELEASE);
	}
	ring->batch_slots = (uint16_t)(ring->batch_slots + length);
	advance(ring, &ring->used_at, &ring->used_wrap, length);
	ring->slots -= length;
	ring->adopted -= ring->adopted < length ? ring->adopted : length;
	ring->busy[id] = 0;
	ring->in_flight--;
	if (ring->packed_log)
		vt_packed_log_batch(ring->packed_log, id,
				    (struct vt_packed_place){ ring->used_at, ring->used_wrap });
}

/* Whether the driver wants to hear of what became visible just now. */
static bool wants_signal(const struct vt_ring *ring)
{
	const struct suppression *driver = ring->available;
	uint16_t flags = load16(&driver->flags, __ATOMIC_RELAXED) & 3;
	uint16_t place = load16(&driver->place, __ATOMIC_RELAXED);
	uint16_t now = ring->used_at, event = place & (WRAP - 1);

	if (flags != EVENTS_AT || !ring->layout.event_index)
		return flags != EVENTS_OFF;
	/* A place of the lap before lies so much behind. */
	if ((place & WRAP) != (ring->used_wrap ? WRAP : 0))
		event = (uint16_t)(event - ring->layout.size);
	return (uint16_t)(now - event - 1) < ring->batch_slots;
}

void vt_packed_show(struct vt_ring *ring)
{
	if (!ring->batched)
		return;
	ring->batched = false;
	__atomic_store_n(&shared(ring, ring->first)->flags, htole16(ring->first_flags),
			 __ATOMIC_RELEASE);
	if (ring->packed_log)
		vt_packed_log_publish(ring->packed_log);
}

bool vt_packed_publish(struct vt_ring *ring)
{
	bool wanted = !ring->told;

	if (!ring->batch_slots)
		return false;
	ring->told = true;
	/* The flags are seen before the driver's wish is read. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	wanted = wants_signal(ring) || wanted;
	ring->batch_slots = 0;
	return wanted;
}

bool vt_packed_notify_on(struct vt_ring *ring)
{
	struct suppression *device = ring->used;

	store16(&device->place, (uint16_t)(ring->at | (ring->at_wrap ? WRAP : 0)));
	__atomic_store_n(&device->flags, htole16(ring->layout.event_index ? EVENTS_AT : EVENTS_ON),
			 __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return ring->again_next < ring->again_count || is_available(ring);
}

void vt_packed_notify_off(struct vt_ring *ring)
{
	store16(&((struct suppression *)ring->used)->flags, EVENTS_OFF);
}
